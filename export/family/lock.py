"""The lock on a family's folder: one command at a time writes into it."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    with Path(out / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another compile or choose-scale is writing into {out}: wait for it, or choose another "
                             "--out.") from error  # fmt: skip
        yield
