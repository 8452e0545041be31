"""Temporary files of a process that may be killed: the next one clears away what it left."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "tocom-scratch-"
_LOCK = ".lock"


def own_scratch() -> Path | None:
    """Makes a folder for this process and has `tempfile` use it; removes folders of processes that are gone.

    A folder whose process lives is known by a lock that the system frees when the process ends, however it does. Where
    there are no such locks, nothing is made or removed.

    Returns:
        The folder, to be removed when the process ends in order; None where there are no such locks.

    Raises:
        OSError: There is no place for temporary files.
    """
    root = Path(tempfile.gettempdir())
    with contextlib.suppress(ImportError):  # no fcntl on this system
        import fcntl

        for left in root.glob(f"{_PREFIX}*"):
            with contextlib.suppress(OSError), (left / _LOCK).open("rb") as lock:  # OSError: it is held, or not ours
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
        making = Path(tempfile.mkdtemp(prefix=".tocom-scratch-", dir=root))
        descriptor = os.open(making / _LOCK, os.O_RDWR | os.O_CREAT)  # open for as long as the process lives
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        folder = root / making.name.removeprefix(".")
        making.rename(folder)  # only now others may look at its lock
        tempfile.tempdir = str(folder)
        return folder
    return None
