"""Quantized engines of a family: calibration, and products that return to float until a degree is accurate enough."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tocom.calib.labelled import LabelledImages
from tocom.calib.quantize.calibrate import OBSERVED, Calibration, calibrate, quantize
from tocom.calib.quantize.calibration_file import read_calibration, write_calibration
from tocom.calib.quantize.network import Quantization, products_of, quantized_model
from tocom.calib.quantize.sensitivity import sensitivity
from tocom.export.graph.lower import count_gmacs
from tocom.export.source.load import made_for
from tocom.runtime.errors import InputError
from tocom.runtime.family_files import calibration_name
from tocom.schedule import MergeSchedule, ScheduleFamily
from tocom.vit import ReducedViT, schedule_for

if TYPE_CHECKING:
    from tocom.export.source.load import Source

DEFAULT_MAX_DROP = 1.0  # points of top-1, where there are labelled images
SYNTHESIZED = 32  # images that are made where none are given

_STEPS, _FEWEST_STEPS = 100, 20  # of making them
_GMACS = 150  # for an image: networks that would need more make do with fewer steps
_SHOWN = 10  # times that a long step says how far it is
_CANDIDATES = 8  # times as many images as are chosen, to choose from
_FOR_SENSITIVITY = 32  # images
_BATCH = 32


@dataclass(frozen=True)
class Drop:
    """How much worse a quantized engine is than the float network.

    Attributes:
        points: Of top-1; without labels, percent of images that are classified otherwise.
        float_top1: Of the float network; None without labels.
        top1: Of the engine; None without labels.
        images: How many were looked at.
    """

    points: float
    float_top1: float | None
    top1: float | None
    images: int


class Quantizer:
    """Calibrates the degrees of one network: once for all of them, or one by one.

    Args:
        inputs: What is compiled, in a quantized precision.
        folder: Where a calibration that can be used again is kept.
        tell: Told, in one line, what goes on.
    """

    def __init__(self, inputs: Source, folder: Path, tell: Callable[[str], None]) -> None:
        self._inputs, self._folder, self._tell = inputs, folder, tell
        self._options = inputs.options.quantize
        self._method = replace(self._options.method, format=inputs.options.precision)
        self._calibrations: dict[int | None, Calibration] = {}
        self._quantizations: dict[int, Quantization] = {}
        self._pixels: Tensor | None = None
        self._warned: set[str] = set()
        self._float_top1: dict[int, float] = {}

    @property
    def products(self) -> list[str]:
        """Names of what can be quantized."""
        return list(products_of(self._inputs.loaded.model))

    def network(self, degree: int, quantization: Quantization | None = None) -> ReducedViT:
        """The reference of a degree, float or quantized."""
        inputs = self._inputs
        model = self._model(degree) if quantization is None else quantized_model(inputs.loaded.model, quantization)
        return ReducedViT(model, self._schedule(degree), reduction=inputs.reduction).eval()

    def quantization(self, degree: int) -> Quantization:
        """How a degree is quantized, with every product that is not to be kept in float."""
        if degree not in self._quantizations:
            calibration = self.calibration(degree)
            pixels = self.pixels() if calibration.method.reconstruct else torch.empty(0)
            quantization = quantize(
                self._model(degree), self._schedule(degree), calibration, pixels, self._inputs.reduction
            )
            self._quantizations = {
                degree: quantization.without(self._options.keep_float)
            }  # one at a time: they are large
        return self._quantizations[degree]

    def calibration(self, degree: int) -> Calibration:
        """What was learned for a degree."""
        key = None if self._method.shared else degree
        if key not in self._calibrations:
            self._calibrations[key] = self._calibrated(key)
        return self._calibrations[key]

    def pixels(self) -> Tensor:
        """The calibration images, float32 [B, 3, H, W]."""
        if self._pixels is None:
            self._pixels = self._synthesized() if self._options.calibration is None else self._read()
        return self._pixels

    def drop(self, degree: int, infer: Callable[[np.ndarray], np.ndarray]) -> Drop:
        """How much worse an engine is than the float network of its degree.

        Args:
            degree: Which.
            infer: float32 [B, 3, H, W] -> logits [B, classes].
        """
        images = self._inputs.images
        if images is not None and images.labels is not None:
            if degree not in self._float_top1:
                self._float_top1[degree] = images.top1(self._float(degree))
            float_top1, top1 = self._float_top1[degree], images.top1(infer)
            return Drop(100 * (float_top1 - top1), float_top1, top1, len(images))
        pixels = self.pixels().numpy() if images is None else images.pixels(range(len(images)))
        parts = [pixels[start : start + _BATCH] for start in range(0, len(pixels), _BATCH)]
        plain = self._float(degree)
        equal = sum(int((plain(part).argmax(1) == infer(part).argmax(1)).sum()) for part in parts)
        return Drop(100 * (1 - equal / len(pixels)), None, None, len(pixels))

    @property
    def allowed_drop(self) -> float | None:
        """The drop that a degree may have; None for any."""
        images = self._inputs.images
        labelled = images is not None and images.labels is not None
        if self._options.max_drop is not None and not labelled:
            self._warn("--max-drop without labelled images (--images with one folder per class): it limits the share "
                       "of images that are classified otherwise than in float32")  # fmt: skip
        return DEFAULT_MAX_DROP if self._options.max_drop is None and labelled else self._options.max_drop

    def sensitivity(self, degree: int) -> dict[str, float]:
        """What each product's quantization alone does at a degree, the worst first."""
        inputs, pixels = self._inputs, self.pixels()
        some = pixels[:: -(-len(pixels) // _FOR_SENSITIVITY)]
        quantization = self.quantization(degree)
        return sensitivity(inputs.loaded.model, self._schedule(degree), quantization, some, inputs.reduction,
                           self._progress("measuring products"))  # fmt: skip

    def _calibrated(self, degree: int | None) -> Calibration:
        network = made_for(self._inputs)
        if self._options.is_file:
            return read_calibration(self._options.calibration, network, self._inputs.loaded.model)
        recipe = json.dumps([self._options.recipe(), network, degree, self._method.format], sort_keys=True)
        file = self._folder / calibration_name(hashlib.sha256(recipe.encode()).hexdigest())
        if file.exists():
            return read_calibration(file, network, self._inputs.loaded.model)
        degrees = self._observed() if degree is None else (degree,)
        calibration = calibrate([self.network(observed) for observed in degrees], self.pixels(), self._method)
        if not calibration.rows and not self._method.reconstruct:
            write_calibration(file, calibration, network)
        return calibration

    def _observed(self) -> tuple[int, ...]:
        """Degrees that a shared calibration looks at; the same whatever degrees are compiled."""
        room = []
        for degree in OBSERVED:
            try:
                self._schedule(degree).require_room()
            except InputError:
                continue
            room.append(degree)
        return tuple(room)

    def _model(self, degree: int) -> torch.nn.Module:
        inputs = self._inputs
        model = copy.deepcopy(inputs.loaded.model)
        scale = inputs.scales.get(degree)
        if inputs.compensator is not None and scale is None:
            options = inputs.options
            scale = inputs.compensator.between(options.source_degree, degree, options.delta_scale).delta_scale
        model.load_state_dict(dict(inputs.fused(degree, scale).weights))
        return model.eval().requires_grad_(False)

    def _schedule(self, degree: int) -> MergeSchedule:
        inputs = self._inputs
        return schedule_for(inputs.loaded.model, degree, ScheduleFamily(inputs.family.schedule))

    def _float(self, degree: int) -> Callable[[np.ndarray], np.ndarray]:
        network = self.network(degree)

        def infer(pixels: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return network(torch.from_numpy(pixels)).numpy()

        return infer

    def _read(self) -> Tensor:
        method = self._method
        folder, spec = self._options.calibration, self._inputs.family.input
        limit = method.images * (_CANDIDATES if method.choice == "diverse" else 1)
        images = LabelledImages.below(folder, spec, None, self._inputs.family.classes, limit)
        pixels = torch.from_numpy(images.pixels(range(len(images))))
        if method.choice == "diverse" and len(pixels) > method.images:
            from tocom.calib.quantize.choose_images import choose, features_of

            pixels = pixels[choose(features_of(self.network(0), pixels), method.images)]
        if len(pixels) == 1:
            self._warn("calibrating on one image: ranges will be too narrow for others; give some dozens")
        elif (pixels == pixels[:1]).all():
            self._warn(f"calibrating on {len(pixels)} images that are all equal: they say no more than one")
        return pixels

    def _synthesized(self) -> Tensor:
        from tocom.calib.quantize.synthesize import synthesize

        self._warn(f"calibrating on {SYNTHESIZED} images made from the network itself: give --calibration FOLDER, "
                   "some dozens of real ones are better")  # fmt: skip
        spec = self._inputs.family.input
        mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
        network = self.network(0)
        steps = max(_FEWEST_STEPS, min(_STEPS, int(_GMACS / count_gmacs(network))))
        return synthesize(
            network.model, SYNTHESIZED, spec.size, steps=steps, low=-mean / std, high=(1 - mean) / std,
            tell=self._progress("synthesizing images"),
        )  # fmt: skip

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            self._tell(f"note: {text}")

    def _progress(self, what: str) -> Callable[[int, int], None]:
        """Says what is going on, and how far it is, a few times."""

        def tell(done: int, total: int) -> None:
            if done * _SHOWN // total != (done - 1) * _SHOWN // total:
                self._tell(f"{what}: {100 * done // total}%")

        return tell
