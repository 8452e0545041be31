"""The degree under load, in simulated time: a queue and one worker, replayed with the numbers of a network."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tocom.serving.service.degree_policy import DegreePolicy, Speed, useful

# seconds per call and image, like a small network's on a CPU
SPEEDS = {0: Speed(0.002, 0.010), 8: Speed(0.002, 0.0068), 16: Speed(0.002, 0.005)}
OBJECTIVE_S, MAX_BATCH = 0.3, 16


@dataclass
class Simulated:
    """What came out: per request its latency and the degree that answered, and the degree over time."""

    latencies: list[float] = field(default_factory=list)
    degrees: list[int] = field(default_factory=list)
    history: list[tuple[float, int]] = field(default_factory=list)

    def p99(self) -> float:
        return float(np.percentile(self.latencies, 99))

    def switches(self) -> int:
        degrees = [degree for _, degree in self.history]
        return sum(a != b for a, b in itertools.pairwise(degrees))


def simulate(
    policy: DegreePolicy, arrivals: np.ndarray, speeds: dict[int, Speed] = SPEEDS, until: float = 0
) -> Simulated:
    """One worker that takes what waits, up to a batch, whenever it is free."""
    out, waiting, now, at = Simulated(), [], 0.0, 0
    while at < len(arrivals) or waiting or now < until:
        while at < len(arrivals) and arrivals[at] <= now:
            policy.arrived(1, arrivals[at])
            waiting.append(arrivals[at])
            at += 1
        if not waiting:
            policy.idle(now)
            out.history.append((now, policy.degree))
            now += 0.25 if at == len(arrivals) else min(0.25, max(arrivals[at] - now, 1e-9))
            continue
        degree = policy.choose(len(waiting), now - waiting[0], now)
        batch = min(len(waiting), policy.batch_limit(degree))
        seconds = speeds[degree].of(batch)
        now += seconds
        policy.finished(degree, batch, seconds)
        out.history.append((now, policy.degree))
        for came in waiting[:batch]:
            out.latencies.append(now - came)
            out.degrees.append(degree)
        del waiting[:batch]
    return out


def poisson(rate: float, seconds: float, seed: int = 0, start: float = 0.0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return start + np.cumsum(draw.exponential(1 / rate, int(rate * seconds)))


def capacity(degree: int) -> float:
    return MAX_BATCH / SPEEDS[degree].of(MAX_BATCH)


def policy(objective_s: float | None = OBJECTIVE_S, **changes: object) -> DegreePolicy:
    return DegreePolicy(SPEEDS, objective_s, **{"max_batch": MAX_BATCH, **changes})


def test_light_load_stays_at_the_first_degree() -> None:
    found = simulate(policy(), poisson(0.5 * capacity(0), 60))
    assert set(found.degrees) == {0}


def test_too_much_for_the_first_degree_keeps_the_objective() -> None:
    """Between what degree 0 and degree 16 can do."""
    arrivals = poisson(1.5 * capacity(0), 120)
    found = simulate(policy(), arrivals)
    assert found.p99() <= OBJECTIVE_S
    assert 16 in found.degrees
    fixed = simulate(policy(None), arrivals)
    assert fixed.p99() > 10 * OBJECTIVE_S  # the queue of degree 0 only grows


def test_it_does_not_swing() -> None:
    found = simulate(policy(), poisson(1.3 * capacity(0), 120))
    assert found.switches() <= 12  # in two minutes


def test_it_falls_back_when_the_load_does() -> None:
    busy = poisson(1.6 * capacity(0), 30)
    quiet = poisson(0.3 * capacity(0), 60, seed=1, start=busy[-1])
    found = simulate(policy(), np.concatenate([busy, quiet]))
    assert max(found.degrees[: len(busy)]) == 16
    assert set(found.degrees[-len(quiet) // 2 :]) == {0}


def test_it_falls_back_when_nothing_comes_any_more() -> None:
    each = policy()
    busy = poisson(1.6 * capacity(0), 30)
    simulate(each, busy)
    assert each.degree == 16
    for now in np.arange(busy[-1] + 1, busy[-1] + 30, 0.25):
        each.idle(now)
    assert each.degree == 0


def test_one_step_down_at_a_time_and_only_after_holding() -> None:
    each = policy(hold_s=2.0)
    assert each.choose(1000, 0.0, 0.0) == 16
    found = [each.idle(now) for now in (10.0, 11.9, 12.1, 13.9, 14.2)]
    assert found == [16, 16, 8, 8, 0]


def test_a_slower_machine_than_measured_is_learned() -> None:
    slow = {degree: Speed(3 * speed.call_s, 3 * speed.image_s) for degree, speed in SPEEDS.items()}
    found = simulate(policy(objective_s=0.6), poisson(0.45 * capacity(0), 120), speeds=slow)
    assert np.percentile(found.latencies[len(found.latencies) // 4 :], 99) <= 0.6
    assert 16 in found.degrees


def test_without_an_objective_nothing_changes() -> None:
    each = policy(None)
    assert each.choose(10**6, 100.0, 0.0) == 0
    assert each.batch_limit(0) == MAX_BATCH


@given(
    queued=st.integers(0, 10**6),
    waited=st.floats(0, 1e4),
    steps=st.lists(st.tuples(st.integers(1, 500), st.floats(0, 10), st.sampled_from([0, 8, 16])), max_size=20),
)
@settings(deadline=None, max_examples=60)
def test_any_history_gives_a_degree_and_a_batch(
    queued: int, waited: float, steps: list[tuple[int, float, int]]
) -> None:
    each, now = policy(), 0.0
    for images, seconds, degree in steps:
        now += seconds
        each.arrived(images, now)
        each.finished(degree, images, seconds)
    assert each.choose(queued, waited, now) in SPEEDS
    assert all(1 <= each.batch_limit(degree) <= MAX_BATCH for degree in SPEEDS)
    assert each.drain_s(queued) >= 0


def test_speed_goes_through_both_times() -> None:
    speed = Speed.through(0.012, 16, 0.162)
    assert speed.of(1) == pytest.approx(0.012)
    assert speed.of(16) == pytest.approx(0.162)
    assert Speed.through(0.05, 16, 0.05).image_s > 0  # a batch that costs what one image does


def test_degrees_that_do_not_pay_are_left_out() -> None:
    assert useful((0, 4, 8), {0: True, 4: False, 8: True}) == (0, 8)
