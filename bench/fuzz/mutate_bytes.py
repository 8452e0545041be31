"""Damage that knows nothing of a file's format."""

from __future__ import annotations

import random

from bench.fuzz.case import Mutate

# numbers at the edge of what fits
_EXTREMES = (b"\xff" * 8, b"\xff" * 7 + b"\x7f", bytes(7) + b"\x80", b"\xff\xff\xff\x7f", b"\x80", b"\xff")


def _flip_bits(draw: random.Random, whole: bytes) -> bytes:
    damaged = bytearray(whole)
    for _ in range(draw.randint(1, 8) if damaged else 0):
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def _at(length: int, at: int, whole: bytes, content: bytes = b"") -> bytes:
    """Some bytes of a file, replaced by others."""
    return whole[:at] + content + whole[at + length :]


def _zero(draw: random.Random, whole: bytes) -> bytes:
    """A range holds zeros, as after a crash of the file system."""
    at, count = draw.randrange(len(whole)), draw.choice((1, 16, 512, 4096))
    return _at(count, at, whole, bytes(min(count, len(whole) - at)))


def _overwrite(draw: random.Random, whole: bytes) -> bytes:
    at, value = draw.randrange(len(whole)), draw.choice(_EXTREMES)
    return _at(len(value), at, whole, value)


def _section_twice(draw: random.Random, whole: bytes) -> bytes:
    at = draw.randrange(len(whole))
    end = min(len(whole), at + draw.choice((1, 8, 64, 1024)))
    return whole[:end] + whole[at:]


BYTES: dict[str, Mutate] = {
    "bits flipped": _flip_bits,
    "bytes inserted": lambda draw, whole: _at(
        0, draw.randint(0, len(whole)), whole, draw.randbytes(draw.choice((1, 1, 4, 8, 100)))),
    "bytes deleted": lambda draw, whole: _at(draw.choice((1, 1, 4, 8, 100)), draw.randrange(len(whole)), whole),
    "truncated": lambda draw, whole: whole[: draw.choice(
        (draw.randrange(len(whole)), draw.randrange(min(64, len(whole))), len(whole) - 1))],
    "range zeroed": _zero,
    "extreme numbers": _overwrite,
    # the beginning, then the end from another place: one half twice, or one missing
    "spliced": lambda draw, whole: whole[: draw.randrange(len(whole))] + whole[draw.randrange(len(whole)) :],
    "section twice": _section_twice,
    "another file": lambda draw, whole: draw.choice(
        (b"", b"\0", b"this is no such file, it is a sentence\n", b"{}", b"PK\x03\x04", whole[::-1],
         draw.randbytes(1000), b"\x89PNG\r\n\x1a\n" + draw.randbytes(50), bytes(4096))),
}  # fmt: skip
