"""Damage that knows nothing of a file's format."""

from __future__ import annotations

import random

from bench.fuzz.case import Mutate


def flip_bits(draw: random.Random, whole: bytes) -> bytes:
    """One to eight bits are the other way round."""
    damaged = bytearray(whole)
    for _ in range(draw.randint(1, 8) if damaged else 0):
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def insert_bytes(draw: random.Random, whole: bytes) -> bytes:
    """Some bytes too many."""
    at = draw.randint(0, len(whole))
    return whole[:at] + draw.randbytes(draw.choice((1, 1, 4, 8, 100))) + whole[at:]


def delete_bytes(draw: random.Random, whole: bytes) -> bytes:
    """Some bytes too few."""
    at = draw.randrange(len(whole))
    return whole[:at] + whole[at + draw.choice((1, 1, 4, 8, 100)) :]


def truncate(draw: random.Random, whole: bytes) -> bytes:
    """The end is missing, or all but a few bytes."""
    return whole[: draw.choice((draw.randrange(len(whole)), draw.randrange(min(64, len(whole))), len(whole) - 1))]


def zero_range(draw: random.Random, whole: bytes) -> bytes:
    """A range holds zeros, as after a crash of the file system."""
    at, count = draw.randrange(len(whole)), draw.choice((1, 16, 512, 4096))
    return whole[:at] + bytes(min(count, len(whole) - at)) + whole[at + count :]


def overwrite(draw: random.Random, whole: bytes) -> bytes:
    """Numbers at the edge of what fits: 0xff, 0x7f, 0x80."""
    at = draw.randrange(len(whole))
    value = draw.choice((b"\xff" * 8, b"\xff" * 7 + b"\x7f", bytes(7) + b"\x80", b"\xff\xff\xff\x7f", b"\x80", b"\xff"))
    return whole[:at] + value + whole[at + len(value) :]


def splice(draw: random.Random, whole: bytes) -> bytes:
    """The beginning of the file, then the end of it from another place: one half of it twice, or one missing."""
    return whole[: draw.randrange(len(whole))] + whole[draw.randrange(len(whole)) :]


def duplicate_section(draw: random.Random, whole: bytes) -> bytes:
    """A section stands there twice."""
    at = draw.randrange(len(whole))
    end = min(len(whole), at + draw.choice((1, 8, 64, 1024)))
    return whole[:end] + whole[at:end] + whole[end:]


def another_file(draw: random.Random, whole: bytes) -> bytes:
    """Something else under this name."""
    return draw.choice((b"", b"\0", b"this is no such file, it is a sentence\n", b"{}", b"PK\x03\x04", whole[::-1],
                        draw.randbytes(1000), b"\x89PNG\r\n\x1a\n" + draw.randbytes(50), bytes(4096)))  # fmt: skip


BYTES: dict[str, Mutate] = {
    "bits flipped": flip_bits,
    "bytes inserted": insert_bytes,
    "bytes deleted": delete_bytes,
    "truncated": truncate,
    "range zeroed": zero_range,
    "extreme numbers": overwrite,
    "spliced": splice,
    "section twice": duplicate_section,
    "another file": another_file,
}
