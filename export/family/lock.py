"""The lock on a family's folder: one command at a time writes into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tocom.runtime.errors import InputError
from tocom.runtime.family_files import LOCK


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Makes the folder and holds its lock, which goes when the process does, however it ends.

    Raises:
        InputError: If another process holds it.
        OSError: If the folder cannot be made or written.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK, blocking=False, fallback_to_soft=False)  # a soft lock would outlive its process
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"another compile or choose-scale is writing into {out}: wait for it, or choose another --out."
        ) from error
    try:
        yield
    finally:
        lock.release()
