"""The images of a training run, numbered in pairs: whoever asks for pair i, at any time and anywhere, gets the same.

Pair i is a pure function of the seed and of i: which two images, how they are augmented, and how they are mixed with
each other. A step's total batch is a range of pairs, and processes, accumulation and loader workers only divide it.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tocom.calib.distill.draws import drawn_for_pair, image_at, replacement_for
from tocom.runtime.errors import InputError, one_line

_ATTEMPTS = 100  # other images tried for one that cannot be read
_PROBED = 100
_GRACE = 20  # seconds that a loading process lives on after SIGTERM


class BatchSource(Protocol):
    """Images that are made, not read: every batch follows from its place in the run.

    An attribute `identity`, text, tells a resumed run whether the source is still the same.
    """

    def batch(self, first_pair: int, pairs: int) -> Tensor:
        """Pairs `first_pair` and on, normalized, float32 [2 * pairs, 3, H, W]."""


class LoadedPairs(NamedTuple):
    """Pairs one after the other.

    Attributes:
        images: Normalized, float32 [2 * pairs, 3, H, W].
        unreadable: Names of the images that had to be replaced.
        failure: What is told when no replacement was readable either.
    """

    images: Tensor
    unreadable: tuple[str, ...] = ()
    failure: str | None = None


class ImagePairs(Dataset[LoadedPairs]):
    """Pairs of a map-style collection of images.

    Args:
        images: `images[i]` is a PIL image, a normalized float32 tensor [3, H, W] that is taken as it is, or a tuple
            that begins with either. `images.name(i)` and `images.identity`, where there are such, tell an image's name
            and the collection's.
        prepare: PIL image -> normalized float32 [3, H, W]; it may draw at random from Python, numpy and torch.
        mix: Mixes a pair's two images, [2, 3, H, W] -> [2, 3, H, W]; likewise.
        seed: Of everything that is drawn.
    """

    def __init__(
        self,
        images: Sequence[object],
        prepare: Callable[[Image.Image], Tensor],
        mix: Callable[[Tensor], Tensor] | None,
        seed: int,
    ) -> None:
        self.images, self.prepare, self.mix, self.seed = images, prepare, mix, seed

    def __getitem__(self, number: int) -> LoadedPairs:
        """Pair `number` of the run; an image that cannot be read is replaced by another one."""
        unreadable: list[str] = []
        with drawn_for_pair(number, self.seed):
            both = []
            for position in (2 * number, 2 * number + 1):
                image = self._readable(position, unreadable)
                if image is None:
                    return LoadedPairs(torch.empty(0), failure=f"none of {_ATTEMPTS} images could be read, the last of "
                                                               f"them {unreadable[-1]}.")  # fmt: skip
                both.append(image)
            pair = torch.stack(both)
            return LoadedPairs(pair if self.mix is None else self.mix(pair), tuple(unreadable))

    def require_readable(self) -> None:
        """Reads the first images of the run.

        Raises:
            InputError: If more than half of them cannot be read.
        """
        probed = min(_PROBED, len(self.images))
        reasons = []
        for position in range(probed):
            try:
                self._read(image_at(position, len(self.images), self.seed))
            except Exception as error:  # noqa: BLE001 - as in `_readable`
                reasons.append(one_line(error) or type(error).__name__)
        if 2 * len(reasons) > probed:
            raise InputError(f"most images must be readable, but {len(reasons)} of the first {probed} are not: "
                             f"{reasons[0]}")  # fmt: skip

    def _readable(self, position: int, unreadable: list[str]) -> Tensor | None:
        for attempt in range(_ATTEMPTS):
            count = len(self.images)
            index = replacement_for(position, attempt, count, self.seed) if attempt else None
            index = image_at(position, count, self.seed) if index is None else index
            try:
                image = self._read(index)
            except Exception:  # noqa: BLE001 - a broken image makes decoders raise nearly anything
                name = getattr(self.images, "name", "image {}".format)
                unreadable.append(one_line(name(index)))
                continue
            return image if isinstance(image, Tensor) else self.prepare(image)
        return None

    def _read(self, index: int) -> Image.Image | Tensor:
        item = self.images[index]
        item = item[0] if isinstance(item, tuple) else item
        return item if isinstance(item, Tensor) else item.convert("RGB")


@dataclass(frozen=True)
class Division:
    """How a step's total batch is divided.

    Attributes:
        batch: Images that a process takes at once.
        accumulate: Times it does so in one step.
        processes: Processes that share the step.
        rank: Which of them this one is.
    """

    batch: int
    accumulate: int = 1
    processes: int = 1
    rank: int = 0

    @property
    def total(self) -> int:
        """Images of one step."""
        return self.batch * self.accumulate * self.processes

    def first_image(self, turn: int) -> int:
        """Number, within the total batch, of the first image of this process's given turn."""
        return (turn * self.processes + self.rank) * self.batch

    def pairs(self, first_step: int, steps: int) -> Iterator[range]:
        """The pairs of this process's turns, from one step to the last."""
        for step, turn in itertools.product(range(first_step, steps), range(self.accumulate)):
            first = (step * self.total + self.first_image(turn)) // 2
            yield range(first, first + self.batch // 2)


def load(
    source: BatchSource | ImagePairs, turns: Iterator[range], *, workers: int, pin_memory: bool
) -> Iterator[LoadedPairs]:
    """Loads pairs turn by turn.

    Args:
        source: Where they come from.
        turns: The pairs of every turn.
        workers: Processes that read ahead; 0 reads in this one. A `BatchSource` is always asked in this one.
        pin_memory: Whether tensors are put where a CUDA device can fetch them while it works.

    Raises:
        InputError: If images cannot be read, a batch is not what was asked for, or a worker dies.
        RuntimeError: What else goes wrong in a worker.
    """
    if not isinstance(source, ImagePairs):
        for turn in turns:
            images = source.batch(turn.start, len(turn))
            if images.ndim != 4 or len(images) != 2 * len(turn):
                raise InputError(f"a batch source must give [{2 * len(turn)}, 3, H, W] for {len(turn)} pairs, got "
                                 f"{list(images.shape)}.")  # fmt: skip
            yield LoadedPairs(images)
        return
    loader = DataLoader(
        source,
        batch_sampler=turns,
        num_workers=workers,
        collate_fn=_joined,
        pin_memory=pin_memory,
        worker_init_fn=_outlive_a_request_to_stop,
        generator=torch.Generator(),  # so that torch's own is left alone
    )
    try:
        for loaded in loader:
            if loaded.failure:
                raise InputError(loaded.failure)
            yield loaded
    except RuntimeError as error:
        if "DataLoader worker" in str(error) and "Traceback" not in str(error):
            raise InputError(f"a process that loads images ended ({one_line(error)[:200]}); there may be too little "
                             f"memory for {workers} workers.") from error  # fmt: skip
        raise


def _joined(pairs: list[LoadedPairs]) -> LoadedPairs:
    failure = next((pair.failure for pair in pairs if pair.failure), None)
    if failure:
        return LoadedPairs(torch.empty(0), failure=failure)
    return LoadedPairs(torch.cat([pair.images for pair in pairs]), sum((pair.unreadable for pair in pairs), ()))


def _outlive_a_request_to_stop(_worker: int) -> None:
    """Ctrl-C and SIGTERM often reach the whole process group, but the training process still ends its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE))
