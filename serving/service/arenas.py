"""Memory of a process with many threads that runs for long."""

from __future__ import annotations

import contextlib
import ctypes

_M_ARENA_MAX = -8  # of malloc.h
_ARENAS = 2


def limit_arenas() -> None:
    """Has the C library keep its free memory in few places, where it can be told to.

    glibc keeps up to eight for each core, and what threads free in one serves no other: a server would grow for hours.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _ARENAS)
