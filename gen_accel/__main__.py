from gen_accel.cli.main import main

raise SystemExit(main())
