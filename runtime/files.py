"""Files: hashed without reading them into memory, written whole or not at all, and where those of a user lie."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def sha256_file(path: Path | str) -> str:
    """Hashes a file without reading it into memory.

    Returns:
        64 lower-case hexadecimal digits.

    Raises:
        OSError: The file cannot be read.
    """
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path | str, content: bytes | Callable[[BinaryIO], object]) -> Path:
    """Writes a file so that a reader finds the old content or the new, whole, at any time and after any crash.

    Args:
        path: Where the file belongs; its folder exists. A file that is there is replaced.
        content: The bytes, or a function that writes them to the binary file it is handed.

    Returns:
        `path`.

    Raises:
        OSError: The file cannot be written. Whatever the failure, no temporary file is left and `path` is untouched.
    """
    path = Path(path)
    # In the same folder, because a rename is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with Path(temporary).open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a failed write does not say which file
        raise
    return path


def user_cache() -> Path | None:
    """This project's folder among the user's caches, in $XDG_CACHE_HOME or ~/.cache; None where there is no home."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        # the specification of XDG has relative paths ignored
        return (named if named.is_absolute() else Path.home() / ".cache") / "tocom"
    except RuntimeError:
        return None
