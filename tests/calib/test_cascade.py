"""Tests calib/cascade.py: temperatures against a dense grid and scipy, the choice against a loop over all cascades."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

import tocom.calib.cascade
from tocom.calib.cascade import CAUTION, Costs, Goal, calibrate, fit_temperature, most_accurate
from tocom.runtime.degrees.cascade import Cascade, Stage, confidence, run, shares
from tocom.runtime.degrees.local_latency import Times
from tocom.runtime.errors import InputError

ALONE = {0: 1.1, 4: 0.8, 8: 0.6, 16: 0.35}


def drawn(images: int, seed: int, strengths: dict[int, float], classes: int = 5) -> tuple[dict, np.ndarray]:
    """Logits that know the label the better the stronger the degree, with noise that degrees share."""
    draws = np.random.default_rng(seed)
    labels = draws.integers(0, classes, images)
    noise = draws.normal(0, 1, (images, classes))
    logits = {
        degree: (3 * (strength * np.eye(classes)[labels] + noise + draws.normal(0, 0.5, (images, classes)))).astype("f")
        for degree, strength in strengths.items()
    }
    return logits, labels


def mean_loss(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    scaled = torch.from_numpy(logits).double() / temperature
    return torch.nn.functional.cross_entropy(scaled, torch.from_numpy(labels)).item()


@pytest.mark.parametrize(("factor", "seed"), [(0.1, 0), (1.0, 1), (3.0, 2), (10.0, 3)])
def test_the_temperature_has_the_least_loss(factor, seed):
    logits, labels = drawn(300, seed, {0: 1.5})
    logits = (logits[0] * factor).astype(np.float32)
    found = fit_temperature(logits, labels)
    grid = np.exp(np.linspace(math.log(0.01), math.log(100), 6001))
    best = min(grid, key=lambda temperature: mean_loss(logits, labels, temperature))
    assert found == pytest.approx(best, rel=2e-3)
    exact = minimize_scalar(lambda log: mean_loss(logits, labels, math.exp(log)), bounds=(-4.6, 4.6), method="bounded",
                            options={"xatol": 1e-9})  # fmt: skip
    assert found == pytest.approx(math.exp(exact.x), rel=1e-5)


def test_a_temperature_stays_within_reason():
    sure = np.eye(3, dtype=np.float32)[[0, 1, 2]] * 5
    assert fit_temperature(sure, np.array([0, 1, 2])) == pytest.approx(0.01, rel=1e-3)  # all right: as sure as can be
    assert fit_temperature(sure, np.array([1, 2, 0])) == pytest.approx(100, rel=1e-3)  # all wrong
    assert 0.01 <= fit_temperature(np.zeros((4, 3), np.float32), np.array([0, 1, 2, 0])) <= 100
    assert 0.01 <= fit_temperature(np.full((2, 2), [3e38, -3e38], np.float32), np.array([0, 1])) <= 100


def test_a_temperature_undoes_a_scaling():
    logits, labels = drawn(500, 4, {0: 1.5})
    once, thrice = fit_temperature(logits[0], labels), fit_temperature(3 * logits[0], labels)
    assert thrice == pytest.approx(3 * once, rel=1e-5)


def test_costs_are_linear_between_one_image_and_a_batch():
    costs = Costs.of_times({0: Times(8.0, 9)}, {0: Times(3.0, 9)}, {0: Times(10.0, 99)}, 8)
    assert costs.alone == {0: 1.0}
    assert costs.later(0, 1.0) == pytest.approx(10 / 8)
    assert costs.start[0] == pytest.approx(2.0) and costs.per_image[0] == pytest.approx(1.0)
    assert costs.later(0, 0.0) == 0
    # against drawing batches
    draws = np.random.default_rng(0).random((20_000, 8)) < 0.3
    calls = draws.any(axis=1) * 2.0 + draws.sum(axis=1) * 1.0
    assert costs.later(0, 0.3) == pytest.approx(calls.mean() / 8, rel=0.02)
    ten, nine, three = {0: Times(10.0, 10)}, {0: Times(9.0, 9)}, {0: Times(3.0, 9)}
    noisy = Costs.of_times(nine, ten, nine, 8)  # a batch no slower than one image
    assert noisy.later(0, 1.0) == pytest.approx(9 / 8) and noisy.per_image[0] == 0
    assert Costs.of_times(three, three, three, 1).later(0, 0.5) == pytest.approx(1.5)
    assert Costs.of_gmacs({0: 4.0}).later(0, 0.25) == 1.0


def one_by_one(logits, labels, plan):
    """A cascade carried out through the runtime: which images are right, and the share that reaches each stage."""
    pixels = np.broadcast_to(np.arange(len(labels), dtype=np.float32)[:, None, None, None], (len(labels), 3, 1, 1))
    answer = run(plan, lambda images, degree: logits[degree][images[:, 0, 0, 0].astype(int)], pixels)
    return answer.logits.argmax(axis=1) == labels, shares(plan, answer.degrees)


def brute_force(logits, labels, goal, costs):
    """Every cascade by itself: thresholds of a chain in falling order, until one breaks the goal."""
    count, base = len(labels), logits[min(logits)].argmax(axis=1) == labels
    temperatures = {degree: round(fit_temperature(each, labels), 6) for degree, each in logits.items()}
    found = []
    for length in (2, 3):
        for chain in itertools.combinations(sorted(logits, reverse=True), length):
            sureness = [confidence(logits[degree], temperatures[degree]) for degree in chain[:-1]]
            for threshold in tocom.calib.cascade.thresholds(np.concatenate(sureness)):
                plan = Cascade([Stage(degree, temperatures[degree], 0.0 if degree == chain[-1] else threshold)
                                    for degree in chain])  # fmt: skip
                right, reached = one_by_one(logits, labels, plan)
                if goal.accuracy is None:
                    gains = right.astype(float) - base
                    spread = ((right != base).sum() + 1) / count - gains.mean() ** 2
                    kept = gains.mean() - CAUTION * (spread / count) ** 0.5 >= -goal.max_drop / 100
                else:
                    spread = right.mean() * (1 - right.mean()) + 1 / count
                    kept = right.mean() - CAUTION * (spread / count) ** 0.5 >= goal.accuracy
                if not kept:
                    break
                cost = costs.alone[chain[0]]
                cost += sum(float(costs.later(*each)) for each in zip(chain[1:], reached[1:], strict=True))
                found.append((cost, plan, right.mean(), reached))
    return min(found, key=lambda each: each[0], default=None)


@pytest.mark.parametrize("goal", [Goal(max_drop=8.0), Goal(accuracy=0.4), Goal(max_drop=0.0)])
@pytest.mark.parametrize("seed", range(3))
def test_the_cheapest_of_all_cascades_is_found(monkeypatch, goal, seed):
    monkeypatch.setattr(tocom.calib.cascade, "_GRID", 12)
    logits, labels = drawn(60, seed, {0: 1.6, 4: 1.4, 8: 1.0, 16: 0.8})
    costs = Costs(ALONE, {0: 1.0, 4: 0.9, 8: 0.5, 16: 0.4}, {0: 1.0, 4: 0.7, 8: 0.5, 16: 0.3}, 4)
    expected = brute_force(logits, labels, goal, costs)
    found = calibrate(logits, labels, goal, costs).cascade
    if goal.max_drop == 0.0:
        assert expected is None and found is None
        return
    cost, plan, accuracy, reached = expected
    assert found.cost == pytest.approx(cost, rel=1e-12)
    assert (found.cascade, found.accuracy) == (plan, pytest.approx(accuracy))
    assert found.shares == pytest.approx(reached)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(values=st.lists(st.sampled_from([0.2, 0.5, 0.500001, 0.9, 1.0]) | st.floats(0.1, 1), min_size=1, max_size=200))
def test_thresholds_lie_between_confidences_and_fall(values):
    sureness = np.array(values)
    placed = tocom.calib.cascade.thresholds(sureness)
    assert 1 <= len(placed) <= 64 and (np.diff(placed) < 0).all()
    if len(np.unique(np.round(sureness, 6))) > 1:
        assert ((sureness.min() <= placed) & (placed <= sureness.max())).all()


def test_a_goal_is_broken_less_often_than_the_margin_allows():
    """Calibrated on 400 images, measured on 20,000: of 60 draws few lose more than they may."""
    strengths = {0: 2.0, 8: 1.7, 16: 1.4}
    logits, labels = drawn(20_000, 1000, strengths)
    costs = Costs.of_gmacs({0: 1.0, 8: 0.6, 16: 0.35})
    base = (logits[0].argmax(axis=1) == labels).mean()
    broken = tried = 0
    for seed in range(60):
        found = calibrate(*drawn(400, seed, strengths), Goal(max_drop=2.0), costs).cascade
        if found is not None:
            tried += 1
            broken += one_by_one(logits, labels, found.cascade)[0].mean() < base - 0.02
    assert tried >= 50 and broken / tried <= 0.1  # 2% per chain; the best of several chains is a little worse


def test_the_single_degree_is_the_cheapest_that_keeps_the_goal():
    logits, labels = drawn(400, 7, {0: 2.0, 8: 1.9, 16: 0.5})
    costs = Costs.of_gmacs({0: 1.0, 8: 0.6, 16: 0.3})
    found = calibrate(logits, labels, Goal(max_drop=10), costs)
    assert found.single.cascade.degrees == (8,) and found.single.shares == (1.0,)
    assert found.single.accuracy == (logits[8].argmax(axis=1) == labels).mean()
    only = calibrate(logits, labels, Goal(max_drop=0), costs)
    assert only.single.cascade.degrees == (0,)  # nothing is lost against itself


def test_nothing_reaches_too_high_a_goal():
    logits, labels = drawn(200, 8, {0: 1.0, 16: 0.5})
    found = calibrate(logits, labels, Goal(accuracy=0.999), Costs.of_gmacs({0: 1, 16: 1}))
    assert found.cascade is None and found.single is None
    right = {degree: (each.argmax(axis=1) == labels).mean() for degree, each in logits.items()}
    assert found.nearest.accuracy >= max(right.values())


def test_only_the_degrees_that_may_take_part_do():
    logits, labels = drawn(300, 9, {0: 2.0, 4: 1.9, 8: 1.5, 16: 1.0})
    costs = Costs.of_gmacs({0: 1.0, 4: 0.99, 8: 0.6, 16: 0.3})
    found = calibrate(logits, labels, Goal(max_drop=5), costs, degrees=(0, 8))
    assert set(found.cascade.cascade.degrees) <= {0, 8} and set(found.single.cascade.degrees) <= {0, 8}


def test_engines_that_are_equally_sure_of_all_images_make_no_cascade():
    labels = np.array([0, 1] * 50)
    logits = {degree: np.eye(2, dtype=np.float32)[labels] for degree in (0, 8)}
    found = calibrate(logits, labels, Goal(max_drop=2), Costs.of_gmacs({0: 1, 8: 0.5}))
    assert found.single.cascade.degrees == (8,) and found.single.cost <= found.cascade.cost


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), images=st.integers(2, 80), drop=st.sampled_from([0.0, 0.5, 5.0, 50.0]))
def test_whatever_is_found_keeps_the_goal_when_it_runs(seed, images, drop):
    logits, labels = drawn(images, seed, {0: 1.6, 8: 1.0, 16: 0.8}, classes=3)
    costs = Costs(ALONE, dict.fromkeys(logits, 0.1), {0: 1.0, 8: 0.6, 16: 0.3}, 4)
    found = calibrate(logits, labels, Goal(max_drop=drop), costs).cascade
    if found is None:
        return
    right, reached = one_by_one(logits, labels, found.cascade)
    assert right.mean() == pytest.approx(found.accuracy)
    assert right.mean() >= (logits[0].argmax(axis=1) == labels).mean() - drop / 100
    assert reached == pytest.approx(found.shares)


@pytest.mark.parametrize("at", [0.2, 0.35, 0.6, 0.85, 2.0])
def test_the_most_accurate_at_a_cost(at):
    logits, labels = drawn(150, 11, {0: 1.6, 4: 1.5, 8: 1.2, 16: 0.9})
    costs = Costs.of_gmacs({0: 1.0, 4: 0.8, 8: 0.6, 16: 0.35})
    expected = []
    for length in (1, 2, 3):
        for chain in itertools.combinations((16, 8, 4, 0), length):
            temperatures = {degree: round(fit_temperature(logits[degree], labels), 6) for degree in chain}
            sureness = [confidence(logits[degree], temperatures[degree]) for degree in chain[:-1]]
            for threshold in tocom.calib.cascade.thresholds(np.concatenate(sureness)) if sureness else [0.0]:
                plan = Cascade([Stage(degree, temperatures[degree], 0.0 if degree == chain[-1] else threshold)
                                    for degree in chain])  # fmt: skip
                right, reached = one_by_one(logits, labels, plan)
                cost = sum(costs.per_image[degree] * share for degree, share in zip(chain, reached, strict=True))
                if cost <= at:
                    expected.append((right.mean(), -cost, plan.degrees))
                    break
    found = most_accurate(logits, labels, costs, at)
    if not expected:
        assert found is None
        return
    accuracy, cost, degrees = max(expected, key=lambda each: each[0])
    assert (found.accuracy, -found.cost, found.cascade.degrees) == (
        pytest.approx(accuracy),
        pytest.approx(cost),
        degrees,
    )


def test_how_many_images_a_goal_needs():
    for goal in (Goal(max_drop=0.5), Goal(max_drop=2), Goal(accuracy=0.99)):
        needed = goal.images
        assert goal.kept(np.array(needed), np.array(0), needed, needed)
        fewer = needed - 1
        assert not goal.kept(np.array(fewer), np.array(0), fewer, fewer)


@pytest.mark.parametrize(
    "values", [{"accuracy": 0}, {"accuracy": 1.1}, {"accuracy": math.nan}, {"max_drop": -1}, {"max_drop": math.nan}]
)
def test_goals_out_of_range_are_refused(values):
    with pytest.raises(InputError, match=f"got {next(iter(values.values()))}"):
        Goal(**values)
