"""Everything that is drawn at random in a training run: each draw follows from the run's seed and a number alone.

So a run goes on exactly after an interruption, and any number of processes draw alike.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch

_DEGREES, _ORDER, _PAIR, _REPLACEMENT, _WEIGHTS = range(5)


def degrees_at(step: int, groups: int, seed: int) -> tuple[int, int]:
    """Source and target degree of a step: different, uniform over all ordered pairs from 0..G (ToCom, section 3.4)."""
    draw = np.random.default_rng([_DEGREES, seed, step])
    source, target = int(draw.integers(groups + 1)), int(draw.integers(groups))
    return source, target + (target >= source)


def image_at(position: int, images: int, seed: int) -> int:
    """Which image stands at a position of the endless sequence in which every epoch has every image once."""
    epoch, place = divmod(position, images)
    return int(_order(epoch, images, seed)[place])


def replacement_for(position: int, attempt: int, images: int, seed: int) -> int:
    """Which image is tried, at the given attempt, in place of the one at a position that cannot be read."""
    return int(np.random.default_rng([_REPLACEMENT, seed, position, attempt]).integers(images))


@contextmanager
def drawn_for_pair(number: int, seed: int) -> Iterator[None]:
    """Whatever Python, numpy and torch draw inside follows from the pair's number; outside they go on undisturbed."""
    with _seeded(_PAIR, seed, number):
        yield


@contextmanager
def drawn_for_weights(seed: int) -> Iterator[None]:
    """Whatever Python, numpy and torch draw inside follows from the seed; outside they go on undisturbed."""
    with _seeded(_WEIGHTS, seed):
        yield


@lru_cache(maxsize=2)  # a batch may lie across two epochs
def _order(epoch: int, images: int, seed: int) -> np.ndarray:
    return np.random.default_rng([_ORDER, seed, epoch]).permutation(np.arange(images, dtype=np.uint32))


@contextmanager
def _seeded(*numbers: int) -> Iterator[None]:
    for_python, for_numpy, for_torch = map(int, np.random.SeedSequence(numbers).generate_state(3))
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(for_python)
        np.random.seed(for_numpy)
        torch.default_generator.manual_seed(for_torch)
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
