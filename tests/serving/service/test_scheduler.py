"""Batches, the bounded queue and degrees, with workers that can be held up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import numpy as np
import pytest

from tests.waiting import SAFETY_S, eventually
from tocom.runtime.errors import InputError
from tocom.serving.service.degree_policy import DegreePolicy, Speed
from tocom.serving.service.errors import BusyError
from tocom.serving.service.options import Limits
from tocom.serving.service.request import Answer, DegreeRequest
from tocom.serving.service.scheduler import Scheduler

pytestmark = pytest.mark.timing

DEGREES = (0, 8, 16)


class Clock:
    """Tells the time that a test has set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Engine:
    """Its logits are the images' first pixels and the degree; it runs only while it is allowed to."""

    def __init__(self) -> None:
        self.allowed, self.batches = threading.Event(), []
        self.allowed.set()
        self.fails: Exception | None = None

    def __call__(self, pixel_values: np.ndarray, degree: int) -> np.ndarray:
        assert self.allowed.wait(SAFETY_S)
        self.batches.append((len(pixel_values), degree))
        if self.fails is not None:
            raise self.fails
        return np.stack([pixel_values[:, 0, 0, 0], np.full(len(pixel_values), degree, np.float32)], axis=1)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(engine: Engine, clock: Clock) -> Iterator[Callable[..., Scheduler]]:
    made: list[Scheduler] = []

    def build(objective_s: float | None = None, workers: int = 1, **limits: float) -> Scheduler:
        most = {"max_batch": 4, "max_queued": 8, **limits}
        policy = DegreePolicy(
            {degree: Speed(0.0, 0.01 / (1 + degree)) for degree in DEGREES}, objective_s, max_batch=most["max_batch"]
        )
        made.append(Scheduler([engine] * workers, DEGREES, policy, Limits(**most), clock=clock))
        return made[-1]

    yield build
    engine.allowed.set()
    for scheduler in made:
        scheduler.close(drain=False)


def images(*values: float) -> np.ndarray:
    return np.array(values, np.float32).reshape(-1, 1, 1, 1) * np.ones((1, 3, 2, 2), np.float32)


def held_up(engine: Engine, scheduler: Scheduler) -> Future[Answer]:
    """Sends a request that keeps the worker busy until `engine.allowed` is set."""
    engine.allowed.clear()
    first = scheduler.submit(images(-1))
    eventually(lambda: scheduler.queued == 0, "a worker that takes it")
    return first


def test_every_request_gets_its_own_rows(engine: Engine, make: Callable[..., Scheduler]) -> None:
    scheduler = make(workers=2, max_queued=10_000)
    draw = np.random.default_rng(0)
    sizes = draw.integers(1, 7, 300)
    sent = [images(*(1000 * number + at for at in range(size))) for number, size in enumerate(sizes)]
    futures = [scheduler.submit(each) for each in sent]
    for each, future in zip(sent, futures, strict=True):
        assert np.array_equal(future.result(SAFETY_S).logits[:, 0], each[:, 0, 0, 0])
    assert sum(count for count, _ in engine.batches) == sizes.sum()
    assert max(count for count, _ in engine.batches) <= 4


def test_what_waits_runs_together(engine: Engine, make: Callable[..., Scheduler]) -> None:
    scheduler = make()
    first = held_up(engine, scheduler)
    futures = [scheduler.submit(images(value)) for value in range(5)]
    engine.allowed.set()
    assert [future.result(SAFETY_S).logits[0, 0] for future in (first, *futures)] == [-1, 0, 1, 2, 3, 4]
    assert [count for count, _ in engine.batches] == [1, 4, 1]


def test_pins_and_limits_are_kept_and_do_not_share_batches(engine: Engine, make: Callable[..., Scheduler]) -> None:
    scheduler = make()
    held_up(engine, scheduler)
    wants = [
        DegreeRequest(degree=8),
        DegreeRequest(),
        DegreeRequest(min_degree=8),
        DegreeRequest(max_degree=8),
        DegreeRequest(degree=8),
        DegreeRequest(degree=16),
    ]
    futures = [scheduler.submit(images(value), want) for value, want in enumerate(wants)]
    engine.allowed.set()
    answers = [future.result(SAFETY_S) for future in futures]
    assert [answer.degree for answer in answers] == [8, 0, 8, 0, 8, 16]
    assert [answer.logits[0, 0] for answer in answers] == [0, 1, 2, 3, 4, 5]
    assert engine.batches[1:] == [(3, 8), (2, 0), (1, 16)]


def test_no_degree_that_a_request_allows(make: Callable[..., Scheduler]) -> None:
    scheduler = make()
    with pytest.raises(InputError, match="one of the degrees 0, 8, 16"):
        scheduler.submit(images(1), DegreeRequest(degree=7))
    with pytest.raises(InputError, match="one of the degrees"):
        scheduler.submit(images(1), DegreeRequest(min_degree=9, max_degree=15))


def test_a_full_queue_refuses_and_says_when_to_come_back(engine: Engine, make: Callable[..., Scheduler]) -> None:
    scheduler = make()
    held_up(engine, scheduler)
    accepted = [scheduler.submit(images(value)) for value in range(8)]
    with pytest.raises(BusyError, match="8 images wait, of 8 that may") as refused:
        scheduler.submit(images(9))
    assert refused.value.retry_after_s > 0
    engine.allowed.set()
    assert [future.result(SAFETY_S).logits[0, 0] for future in accepted] == list(range(8))
    assert scheduler.submit(images(9)).result(SAFETY_S).logits[0, 0] == 9


def test_a_cancelled_request_is_not_run(engine: Engine, make: Callable[..., Scheduler]) -> None:
    scheduler = make()
    held_up(engine, scheduler)
    gone, stays = scheduler.submit(images(1)), scheduler.submit(images(2))
    assert gone.cancel()
    engine.allowed.set()
    assert stays.result(SAFETY_S).logits[0, 0] == 2
    assert engine.batches == [(1, 0), (1, 0)]


def test_what_waited_too_long_is_refused(engine: Engine, clock: Clock, make: Callable[..., Scheduler]) -> None:
    scheduler = make(max_wait_s=5)
    first = held_up(engine, scheduler)
    late = scheduler.submit(images(1))
    clock.now = 0.5
    in_time = scheduler.submit(images(2))
    clock.now = 5.1
    engine.allowed.set()
    with pytest.raises(BusyError, match="waited more than 5 s"):
        late.result(SAFETY_S)
    assert [future.result(SAFETY_S).logits[0, 0] for future in (first, in_time)] == [-1, 2]


def test_what_fails_is_told_to_all_of_the_batch_and_to_nobody_else(
    engine: Engine, make: Callable[..., Scheduler]
) -> None:
    scheduler = make()
    first = held_up(engine, scheduler)
    engine.fails = RuntimeError("broken")
    both = [scheduler.submit(images(1)), scheduler.submit(images(2))]
    engine.allowed.set()
    for future in (first, *both):
        with pytest.raises(RuntimeError, match="broken"):
            future.result(SAFETY_S)
    engine.fails = None
    assert scheduler.submit(images(3)).result(SAFETY_S).logits[0, 0] == 3


def test_closing_answers_what_was_accepted(engine: Engine, make: Callable[..., Scheduler]) -> None:
    scheduler = make()
    first = held_up(engine, scheduler)
    accepted = [scheduler.submit(images(value)) for value in range(6)]
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    eventually(lambda: scheduler._closing, "the beginning of the end")
    with pytest.raises(BusyError, match="shutting down"):
        scheduler.submit(images(7))
    engine.allowed.set()
    closing.join(SAFETY_S)
    assert all(future.done() for future in (first, *accepted))
    assert [future.result().logits[0, 0] for future in accepted] == list(range(6))


def test_closing_without_draining_refuses(engine: Engine, make: Callable[..., Scheduler]) -> None:
    scheduler = make()
    first = held_up(engine, scheduler)
    waiting = scheduler.submit(images(1))
    closing = threading.Thread(target=scheduler.close, kwargs={"drain": False})
    closing.start()
    with pytest.raises(BusyError, match="shutting down"):
        waiting.result(SAFETY_S)
    engine.allowed.set()
    closing.join(SAFETY_S)
    assert first.result(SAFETY_S).degree == 0


def test_a_queue_raises_the_degree_and_an_idle_one_lets_it_fall(
    engine: Engine, clock: Clock, make: Callable[..., Scheduler]
) -> None:
    scheduler = make(objective_s=0.05, max_queued=1000)
    held_up(engine, scheduler)
    futures = [scheduler.submit(images(value)) for value in range(200)]
    pinned = scheduler.submit(images(500), DegreeRequest(max_degree=0))
    engine.allowed.set()
    answered = [future.result(SAFETY_S).degree for future in futures]
    assert answered[0] == 16
    assert pinned.result(SAFETY_S).degree == 0
    assert scheduler.degree == 16  # nothing is as late as it was, but it has not been so for long
    fell = set()

    def passed() -> bool:
        clock.now += 1  # seconds, in which nothing comes
        fell.add(scheduler.degree)
        return scheduler.degree == 0

    eventually(passed, "the fall of the degree", every=0.3)
    assert fell == {16, 8, 0}  # step by step


@pytest.mark.parametrize(
    "limits", [{"max_batch": 0}, {"max_queued": 0}, {"max_wait_s": 0}, {"max_wait_s": float("nan")}]
)
def test_limits_that_make_no_sense(limits: dict[str, float]) -> None:
    with pytest.raises(InputError, match="must be"):
        Limits(**limits)
