"""Files that are either whole or absent."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place when the block succeeds.

    The block may create a file or a folder there. When it raises, nothing is left and whatever
    stood at ``path`` is untouched. The parent folder is made when missing.

    Raises:
        ValueError: The folder cannot be written to, or ``path`` is a folder with files in it.
    """
    path = Path(path)
    check_writable(path.parent)
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"{path} is a folder with files in it; name a new one or empty it")
    # A folder of its own, so that the final name (and its suffix) is what the writer sees.
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield scratch / path.name
        os.replace(scratch / path.name, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file in one piece, see `atomic`."""
    with atomic(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def check_writable(folder: str | Path) -> None:
    """Make ``folder`` and prove that a file can be made in it.

    Raises:
        ValueError: It cannot be made or written to; the message says why.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"cannot write to {folder} ({reason}); choose a folder you may write to"
        ) from error
