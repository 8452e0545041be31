"""tocom.schedule, and the examples in the docstrings of the whole room."""

from __future__ import annotations

import doctest
import importlib
import math
import pkgutil
from fractions import Fraction

import pytest

import tocom
from tocom.errors import InputError
from tocom.schedule import MergeSchedule

MODULES = ["tocom", *(f"tocom.{module.name}" for module in pkgutil.iter_modules(tocom.__path__))]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_hold(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_docstring_examples():
    assert sum(doctest.testmod(importlib.import_module(name)).attempted for name in MODULES) >= 4


@pytest.mark.parametrize("r", range(17))
def test_constant_counts_down_and_clamps(r):
    schedule = MergeSchedule.constant(r, depth=12, tokens=197, protected=1)
    tokens = 197
    for block in range(12):
        assert schedule.tokens[block] == tokens
        removed = min(r, (tokens - 1) // 2)
        assert schedule.removed[block] == removed
        tokens -= removed
    assert schedule.tokens[12] == tokens


@pytest.mark.parametrize("protected", [0, 1, 2, 5])
def test_a_prefix_is_never_used_up(protected):
    schedule = MergeSchedule.constant(100, depth=20, tokens=protected + 64, protected=protected)
    assert min(schedule.tokens) == protected + 1
    assert schedule.tokens[-1] == protected + 1


@pytest.mark.parametrize("depth", [1, 2, 5, 12])
@pytest.mark.parametrize("inflection", [-1, -0.5, 0, 0.25, 1])
@pytest.mark.parametrize("r", [0, 4, 13])
def test_linear_equals_the_formula_in_exact_fractions(r, inflection, depth):
    schedule = MergeSchedule.linear(r, inflection, depth=depth, tokens=1000)
    bend = Fraction(inflection)
    expected = []
    for block in range(depth):
        share = Fraction(block, depth - 1) if depth > 1 else Fraction(0)
        expected.append(math.floor((1 - bend) * r + 2 * bend * r * share))
    assert schedule.requested == tuple(expected)


def test_per_block_takes_any_counts():
    schedule = MergeSchedule.per_block([0, 44, 0, 7], depth=4, tokens=100)
    assert schedule.tokens == (100, 100, 56, 56, 49)
    assert schedule.removed == (0, 44, 0, 7)


@pytest.mark.parametrize("count", [-1, -3, 1.5, "8", True, None])
def test_a_count_must_be_a_whole_number_of_0_or_more(count):
    with pytest.raises(InputError, match=f"0 or more tokens per block, got {count!r}"):
        MergeSchedule((4, count), 65)


@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_there_must_be_a_token_behind_the_prefix(tokens):
    with pytest.raises(InputError, match=f"more tokens than the 2 protected, got {tokens}"):
        MergeSchedule.constant(1, depth=2, tokens=tokens, protected=2)


@pytest.mark.parametrize("inflection", [-1.01, 2, float("nan"), float("inf")])
def test_inflection_must_lie_between(inflection):
    with pytest.raises(InputError, match="inflection must lie between"):
        MergeSchedule.linear(4, inflection, depth=4, tokens=65)


@pytest.mark.parametrize("counts", [[], [1], [1] * 5])
def test_per_block_needs_one_count_per_block(counts):
    with pytest.raises(InputError, match=f"each of 4 blocks, got {len(counts)}"):
        MergeSchedule.per_block(counts, depth=4, tokens=65)


def test_room_is_required_by_name():
    MergeSchedule.constant(16, depth=12, tokens=197).require_room()
    with pytest.raises(InputError, match="got 64: of 197 tokens none are left to merge in block 9"):
        MergeSchedule.constant(64, depth=12, tokens=197).require_room()
