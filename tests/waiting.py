"""Waiting for a state that a test can see; how long it takes is never what is judged."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

SAFETY_S = 120.0
"""After so long a test gives up waiting: a net for what hangs, far beyond what a busy machine needs."""

_State = TypeVar("_State")


def eventually(look: Callable[[], _State], what: str = "the state that is waited for", every: float = 0.01) -> _State:
    """Looks until what is seen is true, and returns it; fails the test where it never is.

    Args:
        look: Called again and again.
        what: Is waited for, in words.
        every: Seconds between two looks.
    """
    until = time.monotonic() + SAFETY_S
    while not (seen := look()):
        assert time.monotonic() < until, f"{what} has not come in {SAFETY_S:g} s"
        time.sleep(every)
    return seen
