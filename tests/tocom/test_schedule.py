"""tocom.schedule, and the examples in the docstrings of the whole room."""

from __future__ import annotations

import doctest
import importlib
import math
import pkgutil
from fractions import Fraction

import pytest

import tocom
from tocom.runtime.errors import InputError
from tocom.schedule import MergeSchedule, ScheduleFamily

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
@pytest.mark.parametrize("r", [0, 4, 13])
def test_decreasing_equals_the_formula_in_exact_fractions(r, depth):
    schedule = ScheduleFamily("decreasing").at(r, depth=depth, tokens=1000)
    expected = [math.floor(2 * r * (1 - Fraction(block, depth - 1))) for block in range(depth)] if depth > 1 else [r]
    assert schedule.requested == tuple(expected)


@pytest.mark.parametrize("stride", [2, 3, 4])
@pytest.mark.parametrize("r", [0, 1, 8, 16])
def test_strided_removes_what_constant_does_in_fewer_merges(r, stride):
    strided = ScheduleFamily(f"strided:{stride}").at(r, depth=12, tokens=1000)
    constant = MergeSchedule.constant(r, depth=12, tokens=1000)
    assert strided.tokens[-1] == constant.tokens[-1]
    assert sum(count > 0 for count in strided.removed) == (12 // stride if r else 0)
    # in the middle of its group, so that over a group about as many tokens are computed with
    for group in range(0, 12, stride):
        sums = [sum(each.tokens[group : group + stride]) for each in (strided, constant)]
        assert abs(sums[0] - sums[1]) <= r * stride / 2


def test_a_list_is_multiplied_by_the_degree():
    family = ScheduleFamily(" 0, 2.75,0 , 0.5")
    assert family.name == "0,2.75,0,0.5"
    schedule = family.at(15, depth=4, tokens=100)
    assert schedule.requested == (0, 41, 0, 7)
    assert schedule.tokens == (100, 100, 59, 59, 52)
    assert ScheduleFamily("1,1").at(5, depth=2, tokens=65) == MergeSchedule.constant(5, depth=2, tokens=65)


@pytest.mark.parametrize("count", [-1, -3, 1.5, "8", True, None])
def test_a_count_must_be_a_whole_number_of_0_or_more(count):
    with pytest.raises(InputError, match=f"0 or more tokens per block, got {count!r}"):
        MergeSchedule((4, count), 65)


@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_there_must_be_a_token_behind_the_prefix(tokens):
    with pytest.raises(InputError, match=f"more tokens than the 2 protected, got {tokens}"):
        MergeSchedule.constant(1, depth=2, tokens=tokens, protected=2)


@pytest.mark.parametrize(
    "name",
    ["", "Constant", "strided", "strided:", "strided:1", "strided:-2", "strided:x", "strided:2:2", "strided:٣", "0,0",
     "1,-1", "1,x", "nan,1", "inf", "1,,2", "1e9,0", "growing", "constant ", "strided:" + "9" * 5000],
)  # fmt: skip
def test_a_schedule_must_be_one_of_those_known(name):
    with pytest.raises(InputError, match="a schedule must be constant, decreasing"):
        ScheduleFamily(name)


@pytest.mark.parametrize("counts", ["1", "1,1", "1,1,1,1,1"])
def test_a_list_needs_one_number_per_block(counts):
    with pytest.raises(InputError, match=f"each of 4 blocks, got {len(counts.split(','))}"):
        ScheduleFamily(counts).at(4, depth=4, tokens=65)


def test_a_stride_must_not_exceed_the_blocks():
    assert ScheduleFamily("strided:4").at(2, depth=4, tokens=65).requested == (0, 8, 0, 0)
    with pytest.raises(InputError, match="must not exceed the 4 blocks, got strided:5"):
        ScheduleFamily("strided:5").at(2, depth=4, tokens=65)


def test_room_is_required_by_name():
    MergeSchedule.constant(16, depth=12, tokens=197).require_room()
    with pytest.raises(InputError, match="got 64: of 197 tokens none are left to merge in block 9"):
        MergeSchedule.constant(64, depth=12, tokens=197).require_room()
