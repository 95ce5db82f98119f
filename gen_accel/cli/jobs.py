"""Pieces of work that several processes share through a folder: each is done once, whoever dies.

A claim is a lock on a file, which the system takes back when its process ends, however it ends.
So there is no heartbeat, and no time after which a slow worker counts as dead. Locks have to work
on the folder's file system; local disks, NFS 4, Lustre (``-o flock``) and GPFS have them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gen_accel.cli.options import UsageError

MANIFEST = "manifest.json"
_POLL = 0.2  # seconds


class Jobs:
    """Numbered pieces of work, done by whoever comes first.

    Args:
        folder: Shared by all processes; takes ``manifest.json``, and ``work/`` until all is done.
        settings: What the results follow from, as plain data.
        count: How many pieces there are.
        shared: Several processes run at once: they go on with what is there, and refuse a folder
            that holds something else. One alone begins anew, unless the same was interrupted.

    Raises:
        UsageError: The folder holds another run.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], count: int, *, shared: bool
    ) -> None:
        self.folder = folder
        self.work = folder / "work"
        self.settings = json.loads(json.dumps(settings, default=str))
        self.count = count
        self._shared = shared
        self._open()

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder, wait=True):
            known = self._manifest()
            self._before = known
            same = known.get("settings") == self.settings
            if self._shared and known and not same:
                raise UsageError(
                    f"--output {self.folder}: holds a run with other settings or versions; "
                    "name another folder, or remove it"
                )
            if not same or (known.get("complete") and not self._shared):
                shutil.rmtree(self.work, ignore_errors=True)
                manifest = {"settings": self.settings, "complete": False}
                self._keep(manifest)
            if not self.complete:
                self.work.mkdir(exist_ok=True)

    @property
    def complete(self) -> bool:
        """Whether all is done and written up."""
        return bool(self._manifest().get("complete"))

    def claims(self, first_alone: bool = False) -> Iterator[int]:
        """Pieces for this process to do, until none is left; each has to end with `done`.

        Waits for those that others are at, and takes over what a process left that died.

        Args:
            first_alone: Nothing else begins before piece 0 is done.
        """
        while True:
            left = [i for i in range(self.count) if not self._is_done(i)]
            if not left:
                return
            began = False
            for i in left[:1] if first_alone and left[0] == 0 else left:
                with _locked(self.work / f"{i:04d}.lock") as mine:
                    # Asked again: it may have been done since.
                    if mine and not self._is_done(i):
                        began = True
                        yield i
            if not began:
                time.sleep(_POLL)

    def done(self, i: int, record: Mapping[str, Any]) -> None:
        """Keep what a piece gave, as plain data."""
        from gen_accel.eval.files import write_text

        write_text(self._record(i), json.dumps(record) + "\n")

    @contextmanager
    def finish(self) -> Iterator[list[dict[str, Any]] | None]:
        """All records, for the one process that writes them up; None in the others.

        When the block succeeds, the manifest says that all is done, and ``work/`` is removed.
        """
        with _locked(self.folder, wait=True):
            if self.complete:
                yield None
                return
            records = [json.loads(self._record(i).read_text()) for i in range(self.count)]
            yield records
            manifest = {"settings": self.settings, "complete": True, "jobs": records}
            self._keep(manifest)
            shutil.rmtree(self.work, ignore_errors=True)

    def abandon(self) -> None:
        """Leave no trace of a run that gave nothing; a shared one stays for the others.

        The manifest of the run before it says again what is in the folder.
        """
        if not self._shared and not any(self._record(i).exists() for i in range(self.count)):
            shutil.rmtree(self.work, ignore_errors=True)
            if self._before.get("complete"):
                self._keep(self._before)
                return
            (self.folder / MANIFEST).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # something else is in it
                self.folder.rmdir()

    def _is_done(self, i: int) -> bool:
        return self._record(i).exists() or self.complete

    def _record(self, i: int) -> Path:
        return self.work / f"{i:04d}.json"

    def _keep(self, manifest: Mapping[str, Any]) -> None:
        from gen_accel.eval.files import write_text

        write_text(self.folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")

    def _manifest(self) -> dict[str, Any]:
        try:
            found = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


@contextmanager
def _locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Hold a lock on a file or folder; False when another process does, or the place is gone."""
    try:
        file = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT)
    except FileNotFoundError:
        yield False
        return
    try:
        yield _lock(file, path, wait)
    finally:
        os.close(file)


def _lock(file: int, path: Path, wait: bool) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows: a single process has nobody to keep out
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        raise UsageError(
            f"--output {path.parent}: its file system has no locks ({error.strerror}); "
            "choose another one"
        ) from error
    return True
