"""A family that is served: one generation of it answers, until a reload has the next one ready.

The files of the family are copied when it is opened, so that whatever happens to them on disk afterwards, replaced,
damaged or removed, the engines that serve can be started again. `reload` opens what lies there now beside what serves,
and only when all of its engines have run takes its place.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tocom.runtime.errors import InputError
from tocom.runtime.manifest import Family
from tocom.runtime.predictor import Prediction
from tocom.runtime.preprocess import decode_image, preprocess
from tocom.serving.service.errors import BusyError
from tocom.serving.service.generation import Generation
from tocom.serving.service.options import ServeOptions
from tocom.serving.service.request import ANY_DEGREE, Answer, DegreeRequest

_DEFAULTS = ServeOptions()
_TOGETHER = 4  # times the pixels of one image that all images of a request may have


class Service:
    """Answers requests with a family. Safe to use from several threads at once.

    Attributes:
        folder: Where the family lies; `reload` looks there again.
        options: How it is served.
    """

    def __init__(
        self,
        folder: Path | str,
        options: ServeOptions = _DEFAULTS,
        on_batch: Callable[[int, int, float], None] = lambda _degree, _images, _seconds: None,
        on_end: Callable[[Answer | BaseException], None] = lambda _result: None,
    ) -> None:
        """Opens the family and waits until every engine has run once.

        Args:
            folder: See above.
            options: See above.
            on_batch: Told of every finished batch: degree, images, seconds.
            on_end: Told of every valid request, what it was answered with, or why not.

        Raises:
            InputError: The family cannot be opened, or has not what the options name.
            OSError: It cannot be copied.
        """
        self.folder, self.options = Path(folder), options
        self._on_batch, self._on_end = on_batch, on_end
        self._reloading = threading.Lock()
        self._generation = Generation(self.folder, options, on_batch)

    @property
    def family(self) -> Family:
        """The manifest of what serves."""
        return self._generation.family

    @property
    def degree(self) -> int:
        """The degree in force for requests that leave it to the load."""
        return self._generation.scheduler.degree

    @property
    def queued(self) -> int:
        """Images that wait."""
        return self._generation.scheduler.queued

    @property
    def restarts(self) -> int:
        """How often an engine process was started again, of what serves now."""
        return sum(worker.restarts for worker in self._generation.workers)

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """Of the engine processes."""
        return tuple(worker.pid for worker in self._generation.workers)

    def prepare(self, contents: Sequence[bytes]) -> np.ndarray:
        """Decodes images and makes them the network's input.

        Args:
            contents: Encoded images.

        Returns:
            float32 [n, 3, H, W].

        Raises:
            InputError: One is no image, or too large, or all are together; there are too many, or none.
        """
        most = self.options.limits.max_queued
        if not 1 <= len(contents) <= most:
            raise InputError(f"a request must have 1 to {most} images, got {len(contents)}")
        spec, most_pixels = self.family.input, self.options.max_pixels
        prepared, left = [], _TOGETHER * most_pixels
        for content in contents:
            image = decode_image(content, most_pixels)
            left -= image.width * image.height
            if left < 0:
                raise InputError(f"the images of a request must have {_TOGETHER * most_pixels} pixels at most together")
            prepared.append(preprocess(image, spec))
        return np.stack(prepared)

    def submit(self, pixel_values: np.ndarray, degree_request: DegreeRequest = ANY_DEGREE) -> Future[Answer]:
        """Accepts a request.

        Args:
            pixel_values: float32 [n, 3, H, W].
            degree_request: What degree it asks for.

        Returns:
            Its answer to be; what goes wrong later is raised there.

        Raises:
            InputError: The request fits neither the network nor a degree.
            BusyError: The queue is full.
        """
        size = self.family.input.size
        shape = f"FP32 [n, {', '.join(map(str, size))}] with n of 1 or more"
        if pixel_values.dtype != np.float32 or pixel_values.ndim != 4 or pixel_values.shape[1:] != size:
            raise InputError(f"pixel_values must be {shape}, got {pixel_values.dtype} {list(pixel_values.shape)}")
        most = self.options.limits.max_queued
        if not 1 <= len(pixel_values) <= most:
            raise InputError(f"a request must have 1 to {most} images, got {len(pixel_values)}")
        if not np.isfinite(pixel_values).all():
            raise InputError("pixel_values must be finite numbers, got others")
        while True:
            generation = self._generation
            degree_request = generation.resolved(degree_request)
            try:
                accepted = generation.scheduler.submit(pixel_values, degree_request)
            except BusyError as busy:
                if generation is self._generation:
                    self._on_end(busy)
                    raise
                # else it was closed between the two lines above: the new one takes it
            else:
                accepted.add_done_callback(self._tell_end)
                return accepted

    def _tell_end(self, done: Future[Answer]) -> None:
        if not done.cancelled():
            error = done.exception()
            self._on_end(done.result() if error is None else error)

    def predict_image(
        self, content: bytes, degree_request: DegreeRequest = ANY_DEGREE, top_k: int = 5
    ) -> dict[str, Any]:
        """Classifies an encoded image, and waits for it.

        Args:
            content: PNG, JPEG, or whatever Pillow reads.
            degree_request: What degree it asks for.
            top_k: Classes to tell.

        Returns:
            JSON-ready: degree, queue_ms, engine_ms, predictions.

        Raises:
            InputError: It is no usable image, or there is no such degree.
            ServingError: The queue is full, or the engine failed.
        """
        answer = self.submit(self.prepare([content]), degree_request).result()
        best = Prediction.of(answer.logits[0], self.family.class_names, top_k, answer.degree)
        predictions = [
            {"class": index, "name": name, "probability": probability}
            for index, name, probability in zip(best.classes, best.names, best.probabilities, strict=True)
        ]
        return {
            "degree": answer.degree,
            "queue_ms": round(answer.queue_ms, 3),
            "engine_ms": round(answer.engine_ms, 3),
            "predictions": predictions,
        }

    def merges(self, content: bytes, degree: int) -> dict[str, Any]:
        """Which patches of an encoded image are one token behind each block, at a degree.

        Args:
            content: As for `predict_image`.
            degree: Degree r.

        Returns:
            JSON-ready; see `tocom.runtime.engines.merge_trace`.

        Raises:
            InputError: It is no usable image, or there is no such degree.
        """
        pixel_values = self.prepare([content])
        while True:
            generation = self._generation
            try:
                return generation.tracer.trace(pixel_values, degree).to_json()
            except InputError:
                if generation is self._generation:
                    raise  # else it was closed meanwhile

    def describe(self) -> dict[str, Any]:
        """The family and the state of its server, JSON-ready."""
        generation = self._generation
        family, scheduler = generation.family, generation.scheduler
        entries = {entry.degree: entry for entry in family.engines}
        return {
            "model": family.model,
            "reduction": family.reduction,
            "schedule": family.schedule,
            "source_degree": family.source_degree,
            "classes": family.classes,
            "class_names": None if family.class_names is None else list(family.class_names),
            "input": family.input.to_json(),
            "backend": family.engines[0].backend,
            "precision": family.engines[0].precision,
            "degrees": [asdict(point) | {"tokens": list(entries[point.degree].tokens)} for point in generation.points],
            "adaptive": {
                "enabled": self.options.objective_ms is not None,
                "objective_ms": self.options.objective_ms,
                "degree": scheduler.degree,
                "queued": scheduler.queued,
            },
        }

    def reload(self) -> bool:
        """Opens what lies in the folder now, and lets it take over once all of its engines have run.

        What was accepted before is answered by what it was accepted by.

        Returns:
            Whether there was anything new.

        Raises:
            InputError: What lies there cannot be served, or takes other images or tells other classes, which clients
                have to know; the old family goes on.
            OSError: It cannot be copied; likewise.
        """
        with self._reloading:
            old, family = self._generation, Family.read(self.folder)
            if family == old.family:
                return False
            for what, one, other in (
                ("input", family.input, old.family.input),
                ("classes", family.classes, old.family.classes),
            ):
                if one != other:
                    raise InputError(f"the {what} must stay as they are served, {other}, got {one}: start another "
                                     "server for it")  # fmt: skip
            self._generation = Generation(self.folder, self.options, self._on_batch)
            old.close()
            return True

    def close(self, *, drain: bool = True) -> None:
        """Answers what was accepted, then frees everything.

        Args:
            drain: Whether to run what waits; else it is refused.
        """
        with self._reloading:
            self._generation.close(drain=drain)
