"""``--again``: what counts as measured already, over all the commands that one repetition takes."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Any


class Again:
    """When a repetition began; kept beside the results until nothing of it is left.

    Args:
        out: File of the results.
        asked: Whether ``--again`` was given; without it whatever is in the file counts.
    """

    def __init__(self, out: Path, asked: bool) -> None:
        self.file = out.with_name(out.name + ".again")
        self.start: str | None = None
        if not asked:
            return
        if self.file.exists():
            self.start = self.file.read_text(encoding="utf-8").strip()
            print(f"--again goes on with what began {self.start}; to begin anew, rm {self.file}")
        else:
            self.start = datetime.now(timezone.utc).isoformat(timespec="seconds")

    def counts(self, row: dict[str, Any]) -> bool:
        """Whether a row need not be measured again."""
        return self.start is None or row.get("time", "") > self.start

    def end(self, left: bool) -> None:
        """Keep the start while something is left; forget it afterwards."""
        from gen_accel.eval.files import write_text

        if self.start is None:
            return
        if left:
            write_text(self.file, self.start + "\n")
        else:
            self.file.unlink(missing_ok=True)
