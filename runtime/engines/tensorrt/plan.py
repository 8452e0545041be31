"""What is known of a TensorRT plan without a GPU: who built it, and how a batch is cut to fit its profiles."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from ...backends import BACKENDS
from ...errors import InputError, one_line

TITLES = {row.name: row.title for row in BACKENDS.values() if row.builds_plans}

_TAGS = {b"ftrt": "tensorrt", b"vtrt": "tensorrt-rtx"}
# tag, format of the header, 8 bytes of it, length of the file (TensorRT for RTX), version of the library
_HEADER = struct.Struct("<4sI8xQ4B")


@dataclass(frozen=True)
class Profile:
    """The batch sizes that one optimization profile of a plan allows.

    Attributes:
        index: Its number in the plan.
        smallest: Images, at least.
        best: Images that its kernels were chosen for.
        largest: Images, at most.
    """

    index: int
    smallest: int
    best: int
    largest: int


@dataclass(frozen=True)
class Part:
    """What of a batch runs at once.

    Attributes:
        start: Its first image.
        images: How many images of the batch it holds.
        size: How many images the engine is given; those beyond `images` are padding.
        profile: The number of the profile that it runs under.
    """

    start: int
    images: int
    size: int
    profile: int


def check_header(plan: bytes, backend: str, name: str) -> str:
    """Makes sure that a file is a plan of one library, without that library.

    Args:
        plan: The whole file.
        backend: Who is to load it, one of `TITLES`.
        name: The file's, for messages; printable.

    Returns:
        The version of the library that built it, like "11.4.0.106".

    Raises:
        InputError: It is no plan, one of the other library, or cut off.
    """
    title = TITLES[backend]
    builder = _TAGS.get(plan[:4])
    if builder is None:
        raise InputError(f"{name} is not a plan of {title}: it starts with {one_line(plan[:4])}; compile it again")
    if len(plan) < _HEADER.size:
        raise InputError(f"{name} is cut off after {len(plan)} bytes: compile it again")
    _, _, length, *numbers = _HEADER.unpack_from(plan)
    version = ".".join(map(str, numbers))
    if builder != backend:
        got = f"one of {TITLES[builder]} {version}"
        raise InputError(f"{name} must be a plan of {title}, got {got}: open it as {builder}, or compile it again")
    if builder == "tensorrt-rtx" and len(plan) < length:
        raise InputError(f"{name} is cut off: it must have {length} bytes, got {len(plan)}; compile it again")
    return version


def cut(batch: int, profiles: Sequence[Profile]) -> list[Part]:
    """Cuts a batch into parts that profiles allow: as few as possible, with as little padding as possible.

    >>> [(part.images, part.size) for part in cut(9, [Profile(0, smallest=2, best=4, largest=4)])]
    [(4, 4), (4, 4), (1, 2)]

    Args:
        batch: Images, 1 or more.
        profiles: At least one. Of several that fit a part equally well, the one runs it whose best size is closest,
            and of those the first.
    """
    most = max(profile.largest for profile in profiles)
    parts = []
    for start in range(0, batch, most):
        images = min(most, batch - start)
        fitting = [profile for profile in profiles if images <= profile.largest]
        profile = min(fitting, key=lambda fit: (max(images, fit.smallest), abs(fit.best - images), fit.index))
        parts.append(Part(start, images, max(images, profile.smallest), profile.index))
    return parts
