"""The frontier against brute force over all pairs, the choice against a search of all."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tocom.runtime.degrees.choose import Point, choose, points
from tocom.runtime.degrees.local_latency import Times
from tocom.runtime.errors import GateError, InputError
from tocom.runtime.manifest import EngineEntry, Family, InputSpec

SPEC = InputSpec((3, 8, 8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bicubic", 1.0, "center")


def family_of(*accuracies: float | None) -> Family:
    """Degrees 0, 4, 8, ... with these accuracies."""
    entries = tuple(
        EngineEntry(4 * index, None, (4 * index,), (65, 65), 1.0, "onnxruntime", "fp32", "g", "g", {"g": "a" * 64}, "",
                    {}, {}, {} if top1 is None else {"top1": top1})
        for index, top1 in enumerate(accuracies)
    )  # fmt: skip
    return Family("tiny", 3, SPEC, 0, None, None, None, entries)


def made(rows: list[tuple[float, float | None]]) -> tuple[Point, ...]:
    times = {4 * index: Times(time, 2 * time) for index, (time, _) in enumerate(rows)}
    return points(family_of(*(top1 for _, top1 in rows)), times)


def frontier(*rows: tuple[float, float | None]) -> list[int]:
    return [point.degree for point in made(list(rows)) if point.on_frontier]


def test_a_point_tells_what_the_manifest_and_the_clock_say():
    first, second = made([(10.0, 0.9), (9.0, 0.8)])
    assert first == Point(0, 10.0, 20.0, 1.0, 0.9, pays=True, on_frontier=True)
    assert second == Point(4, 9.0, 18.0, 1.0, 0.8, pays=True, on_frontier=True)


def test_a_degree_pays_from_two_percent_on():
    pays = [point.pays for point in made([(10.0, 0.9), (9.81, 0.9), (9.8, 0.9), (11.0, 0.95)])]
    assert pays == [True, False, True, False]


def test_what_is_slower_and_less_accurate_is_off_the_frontier():
    assert frontier((10.0, 0.9), (8.0, 0.7), (7.0, 0.8)) == [0, 8]
    assert frontier((10.0, 0.9), (8.0, 0.9), (7.0, 0.8)) == [4, 8]  # 0 is no better than 4
    assert frontier((10.0, 0.9), (8.0, 0.8), (8.0, 0.8)) == [0, 4]  # equals: the lower degree
    assert frontier((10.0, 0.9), (9.9, 0.95), (7.0, 0.8)) == [0, 8]  # 4 does not pay, so it pushes nobody out


def test_without_accuracies_a_lower_degree_counts_as_more_accurate():
    assert frontier((10.0, None), (8.0, None), (9.0, None)) == [0, 4]
    assert frontier((10.0, 0.9), (8.0, None), (7.0, 0.99)) == [0, 4, 8]  # not all are known, so none is used


def test_only_degrees_that_were_timed_are_points():
    family = family_of(0.9, 0.8, 0.7)
    assert [point.degree for point in points(family, {4: Times(3, 3), 8: Times(2, 2)})] == [4, 8]
    with pytest.raises(InputError, match="at least one"):
        points(family, {})


def test_choosing_by_budget_and_by_accuracy():
    found = made([(10.0, 0.9), (8.0, 0.85), (5.0, 0.8), (6.0, 0.7)])
    assert choose(found, budget_ms=100).degree == 0
    assert choose(found, budget_ms=9.9).degree == 4
    assert choose(found, budget_ms=7).degree == 8  # 12 fits too, but is no good
    assert choose(found, budget_ms=5).degree == 8
    assert choose(found, min_accuracy=0.85).degree == 4
    assert choose(found, min_accuracy=0.0).degree == 8
    assert choose(found, budget_ms=9, min_accuracy=0.8).degree == 4
    assert choose(found).degree == 0


def test_a_degree_that_does_not_pay_is_never_chosen():
    found = made([(10.0, 0.9), (9.9, 0.95), (5.0, 0.8)])
    assert choose(found, budget_ms=9.95).degree == 8
    assert choose(found, min_accuracy=0.9).degree == 0
    with pytest.raises(GateError):
        choose(found, min_accuracy=0.95)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"budget_ms": 4}, "no degree takes 4 ms or less: the nearest is degree 8 with 5 ms and an accuracy of 0.8"),
        ({"min_accuracy": 0.95}, "accuracy of 0.95: the nearest is degree 0 with 10 ms and an accuracy of 0.9"),
        ({"budget_ms": 4, "min_accuracy": 0.95}, "no degree reaches an accuracy of 0.95"),
        ({"budget_ms": 6, "min_accuracy": 0.85},
         "the fastest that is as accurate is degree 4 with 8 ms and an accuracy of 0.85, the most accurate that is as "
         "fast is degree 8"),
    ],
)  # fmt: skip
def test_nothing_fits(wanted, words):
    with pytest.raises(GateError) as caught:
        choose(made([(10.0, 0.9), (8.0, 0.85), (5.0, 0.8)]), **wanted)
    assert words in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"budget_ms": 0}, "more than 0 ms, got 0"),
        ({"budget_ms": math.nan}, "more than 0 ms, got nan"),
        ({"budget_ms": math.inf}, "got inf"),
        ({"min_accuracy": 1.5}, "a share in 0..1, got 1.5"),
        ({"min_accuracy": math.nan}, "a share in 0..1, got nan"),
    ],
)
def test_numbers_out_of_range_are_refused(wanted, words):
    with pytest.raises(InputError, match=words):
        choose(made([(10.0, 0.9)]), **wanted)


def test_an_accuracy_that_nobody_measured_cannot_be_asked_for():
    with pytest.raises(InputError, match="needs the accuracies"):
        choose(made([(10.0, None), (5.0, None)]), min_accuracy=0.5)


ROWS = st.lists(
    st.tuples(st.integers(1, 12).map(float), st.integers(0, 4).map(lambda share: share / 4) | st.none()),
    min_size=1, max_size=7,
)  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True)
@given(rows=ROWS, whole=st.booleans())
def test_the_frontier_is_what_no_other_point_dominates(rows, whole):
    if whole:
        rows = [(time, 0.5 if top1 is None else top1) for time, top1 in rows]
    found = made(rows)
    known = all(top1 is not None for _, top1 in rows)

    def dominates(other: Point, point: Point) -> bool:
        better = other.top1 - point.top1 if known else point.degree - other.degree
        if other == point or not other.pays or better < 0 or other.p50_ms > point.p50_ms:
            return False
        return better > 0 or other.p50_ms < point.p50_ms or other.degree < point.degree

    for point in found:
        assert point.pays == (point.degree == 0 or point.p50_ms <= 0.98 * rows[0][0])
        assert point.on_frontier == (point.pays and not any(dominates(other, point) for other in found)), found


@settings(max_examples=300, deadline=None, derandomize=True)
@given(rows=ROWS, budget=st.none() | st.integers(1, 12), least=st.none() | st.integers(0, 4))
def test_the_choice_is_the_best_of_all_that_fit(rows, budget, least):
    found = made([(time, 0.5 if top1 is None else top1) for time, top1 in rows])
    least = None if least is None else least / 4
    fitting = [
        point for point in found
        if point.pays and (budget is None or point.p50_ms <= budget) and (least is None or point.top1 >= least)
    ]  # fmt: skip
    if not fitting:
        with pytest.raises(GateError):
            choose(found, budget_ms=budget, min_accuracy=least)
        return
    chosen = choose(found, budget_ms=budget, min_accuracy=least)
    assert chosen in fitting
    if budget is None and least is not None:
        assert chosen.p50_ms == min(point.p50_ms for point in fitting)
        assert chosen.top1 == max(point.top1 for point in fitting if point.p50_ms == chosen.p50_ms)
    else:
        assert chosen.top1 == max(point.top1 for point in fitting)
        assert chosen.p50_ms == min(point.p50_ms for point in fitting if point.top1 == chosen.top1)


def test_the_order_of_points_does_not_matter():
    found = made([(10.0, 0.9), (8.0, 0.85), (5.0, 0.8)])
    assert choose(found[::-1], budget_ms=9) == choose(found, budget_ms=9)
    assert replace(found[0]) == found[0]
