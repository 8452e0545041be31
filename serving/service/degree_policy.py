"""Which degree the next batch runs at: the least compressed one that keeps the latency objective under this load.

Pure decisions on numbers that the scheduler hands in, the time included, so that a day of traffic can be replayed in a
test. Rising is at once: what waits is late already. Falling is slow (hysteresis): only after the queue would have
allowed the lower degree for a while, only one step at a time, and only if that degree keeps up with what arrives, since
else the queue would grow again and degrees would swing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

HEADROOM = 0.7  # share of the objective that the expected latency may take: what is expected is a mean, not a p99
KEEPS_UP = 0.85  # share of a degree's capacity that arrivals may take for the degree to be fallen back to
HOLD_S = 2.0  # how long the lower degree must have sufficed
_ARRIVALS_S = 2.0  # over which arrivals are averaged
_LEARNING = 0.1  # weight of the newest batch in what is learned of the machine's speed
_SLOWEST, _FASTEST = 20.0, 0.2  # of the speed that was measured at the start: beyond, a batch was held up by something


@dataclass(frozen=True)
class Speed:
    """How long batches take at a degree, in seconds: a line through two measured sizes.

    Attributes:
        call_s: Per call.
        image_s: Per image, more than 0.
    """

    call_s: float
    image_s: float

    @classmethod
    def through(cls, one_s: float, many: int, many_s: float) -> Speed:
        """Of the times of one image and of a batch of `many` (2 or more)."""
        image_s = max((many_s - one_s) / (many - 1), 0.05 * many_s / many)
        return cls(call_s=max(one_s - image_s, 0.0), image_s=image_s)

    def of(self, images: int) -> float:
        """Seconds for a batch."""
        return self.call_s + self.image_s * images


class DegreePolicy:
    """Chooses degrees. Not safe for threads: the scheduler asks under its lock.

    Attributes:
        degrees: What it chooses from, rising; the first is the best answer, the last the cheapest.
        objective_s: What 99 of 100 requests are to take at most, in seconds; None keeps the first degree.
    """

    def __init__(
        self,
        speeds: Mapping[int, Speed],
        objective_s: float | None,
        *,
        max_batch: int,
        workers: int = 1,
        hold_s: float = HOLD_S,
    ) -> None:
        """Begins at the first degree.

        Args:
            speeds: Degree -> how long it takes, for all degrees to choose from.
            objective_s: See above.
            max_batch: Images in a batch at most.
            workers: Batches that run at the same time.
            hold_s: Seconds that a lower degree must have sufficed before it is fallen back to.
        """
        self.degrees: tuple[int, ...] = tuple(sorted(speeds))
        self.objective_s = objective_s
        self._speeds, self._max_batch, self._workers, self._hold_s = dict(speeds), max_batch, workers, hold_s
        self._current = 0  # position among the degrees
        self._slowness = 1.0  # how much longer batches take here and now than was measured
        self._arrived, self._arrived_at = 0.0, 0.0
        self._suffices_since: float | None = None

    @property
    def degree(self) -> int:
        """The degree in force."""
        return self.degrees[self._current]

    def arrived(self, images: int, now: float) -> None:
        """Counts what is asked for, also what is refused: both are load.

        Args:
            images: Of the request.
            now: In seconds, of any clock that does not run backwards.
        """
        self._arrived = self._arrived * self._decay(now) + images
        self._arrived_at = now

    def finished(self, degree: int, images: int, seconds: float) -> None:
        """Learns from a batch how fast this machine is now.

        Args:
            degree: It ran at.
            images: In it.
            seconds: It took.
        """
        if degree in self._speeds:
            ratio = min(max(seconds / self._speeds[degree].of(images), _FASTEST), _SLOWEST)
            self._slowness += _LEARNING * (ratio - self._slowness)

    def choose(self, queued: int, waited_s: float, now: float) -> int:
        """Decides on the next batch.

        Args:
            queued: Images that wait, those of the batch included.
            waited_s: How long the oldest has waited, in seconds.
            now: As for `arrived`.

        Returns:
            A degree.
        """
        if self.objective_s is None:
            return self.degree
        needed = self._needed(queued, waited_s)
        if needed > self._current:
            self._current, self._suffices_since = needed, None
        elif needed == self._current or not self._keeps_up(self._current - 1, now):
            self._suffices_since = None
        elif self._suffices_since is None:
            self._suffices_since = now
        elif now - self._suffices_since >= self._hold_s:
            self._current -= 1
            self._suffices_since = now  # the next step down has to wait as long
        return self.degree

    def idle(self, now: float) -> int:
        """Decides while nothing waits, so that the degree also falls back when nothing comes any more.

        Args:
            now: As for `arrived`.

        Returns:
            The degree in force.
        """
        return self.choose(0, 0.0, now)

    def batch_limit(self, degree: int) -> int:
        """Images that a batch may have without taking more than a third of the objective: at least 1.

        Args:
            degree: The batch is to run at.
        """
        speed = self._speeds.get(degree)
        if self.objective_s is None or speed is None:
            return self._max_batch
        fits = (self.objective_s / 3 / self._slowness - speed.call_s) / speed.image_s
        return int(min(max(fits, 1), self._max_batch))

    def drain_s(self, queued: int) -> float:
        """How long the cheapest degree would need for a queue, in seconds.

        Args:
            queued: Images.
        """
        return queued / self._capacity(len(self.degrees) - 1)

    def _needed(self, queued: int, waited_s: float) -> int:
        """Position of the first degree that answers all that waits in time; the last if none does."""
        allowed, last = HEADROOM * self.objective_s, len(self.degrees) - 1
        return next((at for at in range(last) if self._latency(at, queued, waited_s) <= allowed), last)

    def _latency(self, at: int, queued: int, waited_s: float) -> float:
        """Seconds until the last of the queue is answered, or the oldest, whichever has been longer on its way then."""
        degree = self.degrees[at]
        batch = min(queued, self.batch_limit(degree)) or 1
        batch_s = self._slowness * self._speeds[degree].of(batch)
        turns = max(math.ceil(queued / (batch * self._workers)), 1)
        return max(turns * batch_s, waited_s + batch_s)

    def _capacity(self, at: int) -> float:
        """Images a second in full batches."""
        degree = self.degrees[at]
        batch = self.batch_limit(degree)
        return self._workers * batch / (self._slowness * self._speeds[degree].of(batch))

    def _keeps_up(self, at: int, now: float) -> bool:
        arrivals = self._arrived * self._decay(now) / _ARRIVALS_S
        return arrivals <= KEEPS_UP * self._capacity(at)

    def _decay(self, now: float) -> float:
        return math.exp(-max(now - self._arrived_at, 0.0) / _ARRIVALS_S)


def useful(degrees: Sequence[int], pays: Mapping[int, bool]) -> tuple[int, ...]:
    """Degrees that load may choose: the first one, and those that are faster.

    Args:
        degrees: Rising.
        pays: Degree -> whether it is faster than degree 0 here.
    """
    return tuple(degree for at, degree in enumerate(degrees) if at == 0 or pays.get(degree, False))
