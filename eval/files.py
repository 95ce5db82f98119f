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
    path.parent.mkdir(parents=True, exist_ok=True)
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


def put_between(page: str | Path, begin: str, end: str, text: str | None = None) -> None:
    """Replace what stands between two marks of a page; without a text only look for them.

    Raises:
        ValueError: The page has no such marks.
    """
    found = Path(page).read_text(encoding="utf-8")
    before, opened, rest = found.partition(begin)
    _, closed, after = rest.partition(end)
    if not (opened and closed):
        raise ValueError(f"{page}: no lines {begin} and {end} to put tables between; add them")
    if text is not None:
        write_text(page, f"{before}{begin}\n{text}\n{end}{after}")


def check_writable(folder: str | Path) -> None:
    """Prove that files can be made in ``folder``, or that it could be made; leaves nothing behind.

    Raises:
        ValueError: They cannot; the message says why.
    """
    existing = Path(folder).absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"cannot write to {folder} ({reason}: {existing}); choose a folder you may write to"
        ) from error
