"""A family in one object: images in, classes out, at the degree that a budget or an accuracy asks for."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from PIL import Image

from .degrees.cascade import Cascade, run
from .degrees.choose import Point, choose, points
from .degrees.local_latency import Tell, local_latencies
from .engines.base import EngineRunner, open_engine
from .errors import InputError, one_line
from .manifest import Family
from .preprocess import load_image, preprocess

Images = np.ndarray | Image.Image | str | Path | Sequence[np.ndarray | Image.Image | str | Path]


@dataclass(frozen=True)
class Prediction:
    """The best classes of one image, most probable first.

    Attributes:
        classes: Positions among the logits.
        names: Of the classes; None where the family has no names.
        probabilities: Of the classes, softmax of the logits.
        degree: Degree r of the engine that answered.
    """

    classes: tuple[int, ...]
    names: tuple[str | None, ...]
    probabilities: tuple[float, ...]
    degree: int

    @classmethod
    def of(cls, logits: np.ndarray, names: Sequence[str] | None, top_k: int, degree: int) -> Prediction:
        """Reads the logits of one image.

        Args:
            logits: float32 [classes], finite.
            names: Of all classes.
            top_k: How many classes to tell.
            degree: Of the engine.
        """
        shifted = logits.astype(np.float64) - float(logits.max())
        probabilities = np.exp(shifted) / np.exp(shifted).sum()
        best = np.argsort(-shifted, kind="stable")[:top_k].tolist()
        return cls(
            classes=tuple(best),
            names=tuple(None if names is None else names[index] for index in best),
            probabilities=tuple(probabilities[best].tolist()),
            degree=degree,
        )


def load(
    folder: Path | str, *, threads: int | None = None, throughput: bool = False, share_weights: bool = False
) -> LoadedFamily:
    """Opens a compiled family, after checking that its files are the ones that were compiled.

    Args:
        folder: Of the family.
        threads: CPU threads for one call; the engine's choice by default.
        throughput: Whether many images a second matter more than the time of one call.
        share_weights: Whether memory matters more than speed (see `tocom.runtime.engines.base.EngineSettings`).

    Raises:
        InputError: There is no family, it has no engine, or a file has changed.
    """
    loaded = LoadedFamily(folder, threads=threads, throughput=throughput, share_weights=share_weights)
    for degree in loaded.degrees:
        loaded.check(degree)
    return loaded


class LoadedFamily:
    """A family that predicts; what `load` returns. Safe to use from several threads at once; a context manager.

    Engines are opened when a degree is first used, and stay open. Their files are checked before, once.

    Attributes:
        folder: Where its files lie.
        family: The manifest.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        threads: int | None = None,
        throughput: bool = False,
        share_weights: bool = False,
    ) -> None:
        """Reads the manifest; see `load`, which also checks all files now.

        Raises:
            InputError: There is no family, or it has no engine.
        """
        self.folder, self.family = Path(folder), Family.read(folder)
        if not self.family.engines:
            raise InputError(f"{one_line(folder)} has no finished engine: compile one with `tocom compile`")
        self._settings = {"threads": threads, "throughput": throughput, "share_weights": share_weights}
        self._lock = threading.Lock()
        self._opening = {degree: threading.Lock() for degree in self.degrees}
        self._checked: set[int] = set()
        self._runners: dict[int, EngineRunner] = {}
        self._points: dict[int, tuple[Point, ...]] = {}
        self._cascade: Cascade | None = None
        self._closed = False

    @property
    def degrees(self) -> tuple[int, ...]:
        """Degrees there are engines for, rising."""
        return tuple(entry.degree for entry in self.family.engines)

    def predict(
        self,
        images: Images,
        *,
        degree: int | None = None,
        budget_ms: float | None = None,
        min_accuracy: float | None = None,
        cascade: bool = False,
        top_k: int = 1,
    ) -> list[Prediction]:
        """Classifies images, all in one batch.

        Args:
            images: See `prepare`.
            degree: Degree r to run; not together with the following.
            budget_ms: What a call with these images may take, in ms, by its median on this machine.
            min_accuracy: Least top-1 that the degree was measured at, a share in 0..1.
            cascade: Whether to run the family's cascade: the most compressed engine first, and only images that it is
                unsure of again at a lower degree.
            top_k: Classes to tell of each image.

        Returns:
            One prediction per image, in order.

        Raises:
            InputError: An image cannot be used, or what is asked for contradicts itself or does not exist.
            GateError: No degree keeps to the budget, or none is as accurate.
        """
        if top_k < 1:
            raise InputError(f"top_k must be 1 or more, got {top_k}")
        pixel_values = self.prepare(images)
        if not len(pixel_values):
            return []
        names = self.family.class_names
        if cascade:
            if (degree, budget_ms, min_accuracy) != (None, None, None):
                raise InputError("a cascade chooses degrees itself: give no degree, budget or accuracy with it")
            answer = run(self.cascade, self.infer, pixel_values)
            pairs = zip(answer.logits, answer.degrees.tolist(), strict=True)
            return [Prediction.of(row, names, top_k, answered) for row, answered in pairs]
        chosen = self.choose(degree=degree, budget_ms=budget_ms, min_accuracy=min_accuracy, batch=len(pixel_values))
        return [Prediction.of(row, names, top_k, chosen) for row in self.infer(pixel_values, chosen)]

    def choose(
        self,
        *,
        degree: int | None = None,
        budget_ms: float | None = None,
        min_accuracy: float | None = None,
        batch: int = 1,
    ) -> int:
        """The degree that `predict` would run: the most accurate within a budget, the fastest that is as accurate.

        Args:
            degree: As for `predict`, as for the two that follow.
            budget_ms: Likewise.
            min_accuracy: Likewise.
            batch: Images per call that the budget is for.

        Raises:
            InputError: The family has no such degree, or the arguments exclude each other.
            GateError: No degree keeps to the budget, or none is as accurate.
        """
        if degree is not None:
            if budget_ms is not None or min_accuracy is not None:
                raise InputError("give a degree, or a budget or accuracy to choose one by, not both")
            return self.family.entry(degree).degree
        if budget_ms is None and min_accuracy is None:
            return self.degrees[0]
        return choose(self.points(batch), budget_ms=budget_ms, min_accuracy=min_accuracy).degree

    def points(self, batch: int = 1, tell: Tell | None = None) -> tuple[Point, ...]:
        """Latency and accuracy of every degree; times that are not known yet are measured now, and kept.

        Args:
            batch: Images per call.
            tell: Given a line when times are measured.

        Raises:
            InputError: The batch is below 1, or an engine cannot run here.
        """
        with self._lock:
            known = self._points.get(batch)
        if known is None:
            known = points(self.family, local_latencies(self.folder, self.family, batch, tell=tell))
            with self._lock:
                self._points[batch] = known
        return known

    def prepare(self, images: Images) -> np.ndarray:
        """Turns images into the network's input.

        Args:
            images: One image or several: pictures of Pillow, files, arrays uint8 [H, W, 3] or [B, H, W, 3] of RGB; or
                what is prepared already, an array float32 [3, H, W] or [B, 3, H, W] of the network's size.

        Returns:
            float32 [B, 3, H, W].

        Raises:
            InputError: Something is none of these.
        """
        if isinstance(images, np.ndarray) and images.ndim == 4:
            images = images if images.dtype == np.float32 else list(images)
        if isinstance(images, np.ndarray) and images.ndim == 4:
            return images
        several = images if isinstance(images, Sequence) and not isinstance(images, str) else [images]
        prepared = [self._prepared(image) for image in several]
        return np.stack(prepared) if prepared else np.empty((0, *self.family.input.size), np.float32)

    def _prepared(self, image: np.ndarray | Image.Image | str | Path) -> np.ndarray:
        spec = self.family.input
        if isinstance(image, (str, Path)):
            return preprocess(load_image(image), spec)
        if isinstance(image, Image.Image):
            return preprocess(image, spec)
        if isinstance(image, np.ndarray) and image.dtype == np.float32 and image.shape == spec.size:
            return image
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
            return preprocess(Image.fromarray(image), spec)
        got = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise InputError(
            f"an image must be a file, a Pillow image, uint8 [H, W, 3], or float32 {list(spec.size)} that is prepared, "
            f"got {got}"
        )

    def logits(self, pixel_values: np.ndarray, degree: int) -> np.ndarray:
        """What the engine of a degree answers, whatever it is; `infer` makes sure that it can be used.

        Args:
            pixel_values: As for `infer`, as all else.
            degree: Likewise.
        """
        return self.open(degree).infer(pixel_values)

    def infer(self, pixel_values: np.ndarray, degree: int) -> np.ndarray:
        """Runs the engine of a degree.

        Args:
            pixel_values: float32 [B, 3, H, W], prepared.
            degree: Degree r.

        Returns:
            Logits, float32 [B, classes], all finite.

        Raises:
            InputError: There is no such degree, the batch does not fit, the family is closed, or the engine fails.
        """
        logits = self.logits(pixel_values, degree)
        if not np.isfinite(logits).all():
            raise InputError(f"logits must be finite, got others: compile degree {degree} again")
        return logits

    def warm(self, degrees: Sequence[int] | None = None) -> None:
        """Opens engines now and runs each once, so that no later call waits for it.

        Args:
            degrees: All by default.

        Raises:
            InputError: One cannot be opened, or fails.
        """
        zeros = np.zeros((1, *self.family.input.size), np.float32)
        for degree in self.degrees if degrees is None else degrees:
            self.infer(zeros, degree)

    @property
    def cascade(self) -> Cascade:
        """The family's cascade.

        Raises:
            InputError: It has none, or one of other engines.
        """
        with self._lock:
            if self._cascade is None:
                self._cascade = Cascade.read(self.folder, self.family)
            return self._cascade

    def check(self, degree: int) -> None:
        """Makes sure that the files of a degree's engine are the ones that were compiled, unless that is known.

        Args:
            degree: Degree r.

        Raises:
            InputError: There is no such degree, or a file is missing or has changed.
        """
        if degree not in self._checked:
            self.family.check_files(self.folder, self.family.entry(degree))
            self._checked.add(degree)

    def open(self, degree: int, *, batch: int | None = None) -> EngineRunner:
        """The engine of a degree, which this opens unless it is open; `close` closes it.

        Args:
            degree: Degree r.
            batch: Images of most calls, where that is known: an engine that is opened now may prepare for it.

        Raises:
            InputError: There is no such degree, the engine cannot be opened, or the family is closed.
        """
        entry = self.family.entry(degree)
        with self._opening[degree]:
            if self._closed:
                raise InputError("the family must be open, got a closed one: load it again")
            if degree not in self._runners:
                self.check(degree)
                settings = {"precision": entry.precision, "batch": batch, **self._settings}
                opened = open_engine(self.folder / entry.engine, entry.backend, **settings)
                promised, actual = (self.family.input.size, self.family.classes), (opened.input_size, opened.classes)
                if promised != actual:
                    opened.close()
                    raise InputError(f"the engine of degree {degree} must take {promised[0]} and give {promised[1]} "
                                     f"classes as family.json says, got {actual[0]} and {actual[1]}: compile the "
                                     "family again")  # fmt: skip
                self._runners[degree] = opened
            return self._runners[degree]

    def close(self) -> None:
        """Frees the engines; a second call does nothing. Calls that run are finished by their own engine."""
        self._closed = True
        for degree, lock in self._opening.items():
            with lock:
                if (runner := self._runners.pop(degree, None)) is not None:
                    runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
