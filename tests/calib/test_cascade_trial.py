"""Tests calib/cascade_trial.py: fair halves, costs and gains against sums written out, times in turns."""

import contextlib
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tocom.calib import cascade_trial
from tocom.calib.cascade_trial import compare, halves, in_batches, measure_times
from tocom.runtime.degrees.cascade import Cascade, Stage

PLAN = Cascade((Stage(8, 1.0, 0.8), Stage(0, 1.0, 0.0)))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=60), seed=st.integers(0, 5))
def test_halves_share_every_class(labels, seed):
    one, other = halves(labels, seed)
    assert sorted([*one, *other]) == list(range(len(labels))) and 0 <= len(one) - len(other) <= 1
    counts = [Counter(np.array(labels)[half].tolist()) for half in (one, other)]
    assert all(abs(counts[0][label] - counts[1][label]) <= 1 for label in labels)
    assert [each.tolist() for each in halves(labels, seed)] == [one.tolist(), other.tolist()]


def test_another_seed_halves_otherwise():
    labels = [0, 1] * 20
    assert halves(labels, 0)[0].tolist() != halves(labels, 1)[0].tolist()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(count=st.integers(1, 50), batch=st.integers(1, 12))
def test_batches_are_whole_and_hold_no_image_twice(count, batch):
    found = in_batches(range(100, 100 + count), batch)
    images = np.concatenate(found).tolist()
    assert len(set(images)) == len(images) and set(images) <= set(range(100, 100 + count))
    assert {len(each) for each in found} == {batch if count >= batch else count}
    assert len(found) == max(1, count // batch)


def test_a_cascade_beside_single_degrees():
    # two classes; degree 8 is sure of images 0, 1, 4 and wrong on 4; degree 0 is wrong on 3 only
    labels = np.array([0, 1, 0, 1, 0])
    logits = {
        8: np.array([[9, 0], [0, 9], [0, 1], [0, 1], [0, 9]], np.float32),
        0: np.array([[9, 0], [0, 9], [9, 0], [9, 0], [9, 0]], np.float32),
    }
    times = {"cascade": np.array([2.0, 4.0]), "degree 0": np.array([5.0, 5.0]), "degree 8": np.array([1.0, 3.0])}
    trial = compare(PLAN, logits, labels, times, {0: 10.0, 8: 4.0}, batch=2)
    cascade, (zero, eight) = trial.cascade, trial.singles
    assert (cascade.accuracy, zero.accuracy, eight.accuracy) == (0.6, 0.8, 0.6)
    assert cascade.shares == (1.0, 0.4) and cascade.gmacs == pytest.approx(4 + 0.4 * 10)
    assert (cascade.ms, zero.ms, eight.ms) == (3.0, 5.0, 2.0)
    assert cascade.ms_error == pytest.approx(1 / 2**0.5) and zero.ms_error == 0
    assert zero.gain == pytest.approx(-0.2) and eight.gain == pytest.approx(0.0)
    gains = np.array([0, 0, 1, -1, 0])  # against degree 8
    assert eight.gain_error == pytest.approx(gains.std() / 5**0.5)
    assert (trial.images, trial.batch, zero.name, zero.degrees) == (5, 2, "degree 0", (0,))
    assert trial.best_single("ms") == eight and trial.best_single("gmacs") == eight


def test_the_best_single_degree_costs_no_more():
    labels = np.zeros(4, int)
    logits = {degree: np.array([[1, 0]] * (4 - degree // 8) + [[0, 1]] * (degree // 8), np.float32)
              for degree in (0, 8, 16)}  # fmt: skip
    plan = Cascade((Stage(16, 1.0, 0.99), Stage(0, 1.0, 0.0)))
    times = {"cascade": np.ones(1), "degree 0": 3 * np.ones(1), "degree 8": np.ones(1), "degree 16": 0.5 * np.ones(1)}
    trial = compare(plan, logits, labels, times, {0: 3.0, 8: 5.0, 16: 4.5}, 1)
    assert trial.best_single("ms").degrees == (8,) and trial.best_single("gmacs").degrees == (0,)
    cheapest = compare(plan, logits, labels, times | {"cascade": np.full(1, 0.1)}, {0: 3.0, 8: 5.0, 16: 4.5}, 1)
    assert cheapest.best_single("ms") is None


@pytest.mark.timing
def test_times_are_measured_in_turns_with_the_engines_they_are_meant_for(monkeypatch):
    opened, calls, clock = [], [], []
    now = SimpleNamespace(perf_counter_ns=lambda: sum(clock), perf_counter=lambda: sum(clock) / 1e9)
    monkeypatch.setattr(cascade_trial, "time", now)  # a clock that nothing but these engines moves on

    @contextlib.contextmanager
    def opening(degrees, batch):
        opened.append((list(degrees), batch))

        def infer(images, degree):
            assert degree in degrees
            calls.append((degree, len(images), batch))
            clock.append(4_000_000 if degree == 0 else 1_000_000)
            sure = np.zeros((len(images), 2), np.float32)
            sure[:, 0] = 10 * images[:, 0, 0, 0]  # images of ones are easy, of zeros hard
            return sure

        yield infer

    batches = [np.stack([np.full((3, 2, 2), each, np.float32) for each in easy]) for easy in ((1, 1), (1, 0), (0, 0))]
    times = measure_times(PLAN, [0, 4, 8, 12, 16, 20], opening, batches)
    assert set(times) == {"cascade", *(f"degree {degree}" for degree in (0, 4, 8, 12, 16, 20))}
    assert all(each.shape == (3,) for each in times.values())
    # the cascade's first stage and single degrees for whole batches, its second stage for any number
    assert opened == [([0, 4, 8, 12, 16], 2), ([0], None), ([0, 8, 20], 2), ([0], None)]
    assert {size for degree, size, batch in calls if batch == 2} == {2}
    assert {(degree, size) for degree, size, batch in calls if batch is None} == {(0, 1), (0, 2)}
    # ms an image: the first stage alone, with one hard image of two, and with both
    np.testing.assert_allclose(times["cascade"], [0.5, 2.5, 2.5])
    np.testing.assert_allclose(times["degree 0"], 2)
