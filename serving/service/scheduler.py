"""Requests in, batches out: a bounded queue, and one degree for every batch.

A batch holds whole requests, in the order they came, that all run at the degree of the first of them: the one that the
load asks for, or the closest one that the request allows. There is no waiting for a batch to fill: while all workers
are busy requests gather by themselves, and an idle worker takes what there is.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

import numpy as np

from tocom.runtime.errors import InputError
from tocom.serving.service.degree_policy import DegreePolicy
from tocom.serving.service.errors import BusyError
from tocom.serving.service.options import Limits
from tocom.serving.service.request import ANY_DEGREE, Answer, DegreeRequest

Infer = Callable[[np.ndarray, int], np.ndarray]
"""(float32 [B, 3, H, W], degree) -> logits float32 [B, classes]; raises what the request is answered with."""

_TICK_S = 0.25  # how often an idle worker asks whether the degree may fall back


@dataclass
class _Request:
    pixel_values: np.ndarray
    degree_request: DegreeRequest
    accepted_at: float
    future: Future[Answer] = field(default_factory=Future)


class Scheduler:
    """Runs requests on workers; one thread for each."""

    def __init__(
        self,
        workers: Iterable[Infer],
        degrees: Sequence[int],
        policy: DegreePolicy,
        limits: Limits,
        on_batch: Callable[[int, int, float], None] = lambda _degree, _images, _seconds: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts the threads.

        Args:
            workers: Each runs one batch at a time.
            degrees: All there are, rising; a request may pin any of them.
            policy: Chooses for requests that leave it to the load.
            limits: Of the queue.
            on_batch: Told of every finished batch: degree, images, seconds.
            clock: Seconds.
        """
        self.degrees, self.limits = tuple(degrees), limits
        self._policy, self._on_batch, self._clock = policy, on_batch, clock
        self._changed = threading.Condition()
        self._waiting: deque[_Request] = deque()
        self._queued = 0
        self._closing = False
        self._threads = [
            threading.Thread(target=self._work, args=(infer,), name=f"tocom-batches-{number}", daemon=True)
            for number, infer in enumerate(workers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def degree(self) -> int:
        """The degree in force for requests that leave it to the load."""
        return self._policy.degree

    @property
    def queued(self) -> int:
        """Images that wait."""
        return self._queued

    def submit(self, pixel_values: np.ndarray, degree_request: DegreeRequest = ANY_DEGREE) -> Future[Answer]:
        """Accepts a request.

        Args:
            pixel_values: float32 [n, 3, H, W]; not changed by anybody until it is answered.
            degree_request: What degree it asks for.

        Returns:
            Its answer to be; cancelling it takes the request out of the queue.

        Raises:
            InputError: There is no degree that the request would run at.
            BusyError: The queue is full, or the scheduler is closing.
        """
        if not any(degree_request.allows(degree) for degree in self.degrees):
            degrees = ", ".join(map(str, self.degrees))
            raise InputError(f"a request must allow one of the degrees {degrees}, got {degree_request}")
        images = len(pixel_values)
        with self._changed:
            now = self._clock()
            self._policy.arrived(images, now)
            if self._closing:
                raise BusyError("the server is shutting down", retry_after_s=1)
            # a request that is larger than the whole queue is taken when nothing else waits
            if self._waiting and self._queued + images > self.limits.max_queued:
                raise BusyError(
                    f"{self._queued} images wait, of {self.limits.max_queued} that may",
                    retry_after_s=self._policy.drain_s(self._queued),
                )
            request = _Request(pixel_values, degree_request, now)
            self._waiting.append(request)
            self._queued += images
            self._changed.notify()
        return request.future

    def close(self, *, drain: bool = True) -> None:
        """Ends the threads, after what was accepted is answered.

        Args:
            drain: Whether to run what waits; else it is refused.
        """
        with self._changed:
            self._closing = True
            if not drain:
                for request in self._waiting:
                    _refuse(request, BusyError("the server is shutting down", retry_after_s=1))
                self._waiting.clear()
                self._queued = 0
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self, infer: Infer) -> None:
        while (taken := self._take()) is not None:
            batch, degree = taken
            if batch:
                self._run(infer, batch, degree)

    def _take(self) -> tuple[list[_Request], int] | None:
        """The next batch, which may be empty; None at the end."""
        with self._changed:
            while not self._waiting:
                if self._closing:
                    return None
                self._policy.idle(self._clock())
                self._changed.wait(_TICK_S)
            now = self._clock()
            self._drop_late(now)
            if not self._waiting:
                return [], 0
            first = self._waiting[0]
            chosen = self._policy.choose(self._queued, now - first.accepted_at, now)
            degree = nearest(self.degrees, chosen, first.degree_request)
            batch = self._gather(degree, chosen, min(self.limits.max_batch, self._policy.batch_limit(degree)))
        return batch, degree

    def _drop_late(self, now: float) -> None:
        while self._waiting and now - self._waiting[0].accepted_at > self.limits.max_wait_s:
            late = self._waiting.popleft()
            self._queued -= len(late.pixel_values)
            _refuse(late, BusyError(f"it waited more than {self.limits.max_wait_s:g} s",
                                    retry_after_s=self._policy.drain_s(self._queued)))  # fmt: skip

    def _gather(self, degree: int, chosen: int, most: int) -> list[_Request]:
        """Takes requests of a degree out of the queue, in order; the first one however large it is."""
        batch: list[_Request] = []
        images, passed = 0, []
        while self._waiting:
            request = self._waiting.popleft()
            size = len(request.pixel_values)
            if nearest(self.degrees, chosen, request.degree_request) != degree:
                passed.append(request)
            elif batch and images + size > most:
                passed.append(request)
                break  # what came later would overtake it
            else:
                self._queued -= size
                if request.future.set_running_or_notify_cancel():
                    batch.append(request)
                    images += size
        self._waiting.extendleft(reversed(passed))
        return batch

    def _run(self, infer: Infer, batch: list[_Request], degree: int) -> None:
        began = self._clock()
        images = sum(len(request.pixel_values) for request in batch)
        try:
            logits = np.concatenate([infer(part, degree) for part in self._parts(batch)])
        except Exception as error:  # noqa: BLE001  # whatever it is, it is the answer: a request must not get lost
            for request in batch:
                _refuse(request, error)
            return
        seconds = self._clock() - began
        with self._changed:
            self._policy.finished(degree, images, seconds)
        at = 0
        for request in batch:
            rows = logits[at : at + len(request.pixel_values)]
            at += len(request.pixel_values)
            _answer(request, Answer(rows, degree, 1e3 * (began - request.accepted_at), 1e3 * seconds))
        self._on_batch(degree, images, seconds)  # last: whatever it does, the requests have their answers

    def _parts(self, batch: list[_Request]) -> Iterable[np.ndarray]:
        """The batch's images, as many at a time as a batch may have: only a single large request has more parts."""
        whole = (
            batch[0].pixel_values if len(batch) == 1 else np.concatenate([request.pixel_values for request in batch])
        )
        for start in range(0, len(whole), self.limits.max_batch):
            yield whole[start : start + self.limits.max_batch]


def nearest(degrees: Sequence[int], chosen: int, request: DegreeRequest) -> int:
    """The allowed degree that is closest to the chosen one; of two, the less compressed.

    Args:
        degrees: All there are, at least one of which is allowed.
        chosen: By the load.
        request: What the request says of its degree.

    >>> nearest((0, 8, 16), 16, DegreeRequest(max_degree=8))
    8
    """
    return min(filter(request.allows, degrees), key=lambda degree: (abs(degree - chosen), degree))


def _refuse(request: _Request, error: Exception) -> None:
    try:
        request.future.set_exception(error)
    except InvalidStateError:  # the client has cancelled it
        return


def _answer(request: _Request, answer: Answer) -> None:
    try:
        request.future.set_result(answer)
    except InvalidStateError:
        return
