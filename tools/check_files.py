"""Pre-commit guards: text files end with one newline, and no large file slips in."""

from __future__ import annotations

import argparse
from pathlib import Path


def end_of_file(path: Path) -> bool:
    """Mend the end of a text file; True when it had to be."""
    text = path.read_bytes()
    mended = text.rstrip(b"\r\n \t") + b"\n" if text.strip() else b""
    if mended == text:
        return False
    path.write_bytes(mended)
    return True


def main() -> int:
    """Check the files named on the command line; 1 when one was mended or is too large."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--end-of-file", action="store_true", help="mend the last newline")
    parser.add_argument("--max-megabytes", type=float, help="largest size allowed")
    parser.add_argument("files", nargs="*", type=Path)
    args = parser.parse_args()
    failed = False
    for path in filter(Path.is_file, args.files):
        if args.end_of_file and end_of_file(path):
            print(f"{path}: mended the end of the file")
            failed = True
        size = path.stat().st_size / 1e6
        if args.max_megabytes is not None and size > args.max_megabytes:
            print(f"{path}: {size:.1f} MB, the limit is {args.max_megabytes:g} MB")
            failed = True
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
