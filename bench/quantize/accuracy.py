"""Stages that compare quantized networks with float ones: formats, methods, degrees, calibration images."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.quantize.comparison import against, compared
from bench.quantize.protocol import CALIBRATION_IMAGES, HARDEST, METHODS, RECONSTRUCTED, RULES, Effort
from bench.quantize.subjects import Subject, logits_of
from tocom.calib.quantize.calibrate import OBSERVED, Calibration, Method, calibrate, quantize
from tocom.calib.quantize.choose_images import choose, features_of
from tocom.calib.quantize.network import quantized_model
from tocom.calib.quantize.synthesize import synthesize
from tocom.export.family.quantizer import SYNTHESIZED
from tocom.vit import ReducedViT

Records = list[dict[str, Any]]


def calibrated(subject: Subject, pixels: Tensor, method: Method, degrees: Sequence[int] = OBSERVED) -> Calibration:
    """One calibration for all degrees, of what is seen at some."""
    with contextlib.redirect_stdout(io.StringIO()):  # the entropy calibrator reports every product
        return calibrate([subject.network(degree) for degree in degrees], pixels, method)


def narrow(subject: Subject, degree: int, calibration: Calibration, pixels: Tensor) -> ReducedViT:
    """The quantized network at a degree."""
    model = subject.model(degree)
    reference = ReducedViT(model, degree)
    return ReducedViT(quantized_model(model, quantize(model, reference.schedule, calibration, pixels)), degree)


class Measured:
    """A subject's float logits and test sheets, to compare with."""

    def __init__(self, subject: Subject, effort: Effort, folder: Path, sheets: int) -> None:
        self.subject, self.effort, self.folder, self.sheets = subject, effort, folder, sheets
        self.pixels, self.classes = subject.test(sheets)

    def logits(self, degree: int, calibration: Calibration, pixels: Tensor) -> Tensor:
        """Of the quantized network."""
        return logits_of(narrow(self.subject, degree, calibration, pixels), self.pixels)

    def float_logits(self, degree: int) -> Tensor:
        """Of the float network; those of the default table where it has the degree."""
        shared = self.effort.many_sheets if degree in self.effort.degrees else self.sheets
        return self.subject.float_logits(degree, max(shared, self.sheets), self.folder)[: self.sheets]


def default(subject: Subject, effort: Effort, folder: Path) -> Records:
    """INT8 with default settings at every degree; other formats at few, on fewer sheets."""
    pixels, records = subject.spread(CALIBRATION_IMAGES), []
    for form in ("int8", "fp8", "int8-weights", "w4a8", "w6a6", "w5a5", "w4a4"):
        own = form == "int8"
        measured = Measured(subject, effort, folder, effort.many_sheets if own else effort.sheets)
        calibration = calibrated(subject, pixels, Method(format=form))
        for degree in effort.degrees if own else effort.few:
            found = compared(
                measured.float_logits(degree), measured.logits(degree, calibration, pixels), measured.classes
            )
            records.append({"format": form, "degree": degree, **found})
    return records


def degrees(subject: Subject, effort: Effort, folder: Path) -> Records:
    """At which degrees ranges are looked at."""
    pixels, records = subject.spread(CALIBRATION_IMAGES), []
    measured = Measured(subject, effort, folder, effort.sheets)
    for form in ("int8", HARDEST):
        baseline: dict[int, Tensor] = {}
        for rule, looked_at in RULES.items():
            for degree in effort.few:
                calibration = calibrated(subject, pixels, Method(format=form), looked_at or (degree,))
                logits = measured.logits(degree, calibration, pixels)
                found = against(
                    measured.float_logits(degree), baseline.setdefault(degree, logits), logits, measured.classes
                )
                records.append({"rule": rule, "format": form, "degree": degree, **found})
    return records


def methods(subject: Subject, effort: Effort, folder: Path) -> Records:
    """Every method alone, and all together."""
    return _with_methods(subject, effort, folder, METHODS, ("int8", "w4a8", HARDEST), effort.few)


def reconstruction(subject: Subject, effort: Effort, folder: Path) -> Records:
    """Reconstruction alone, and on top of all others."""
    ends = (effort.few[0], effort.few[-1])
    return _with_methods(subject, effort, folder, RECONSTRUCTED, effort.reconstructed[subject.name], ends)


def _with_methods(
    subject: Subject, effort: Effort, folder: Path, listed: Any, formats: Sequence[str], at: Sequence[int]
) -> Records:
    measured = Measured(subject, effort, folder, effort.sheets)
    diverse = _diverse(subject, CALIBRATION_IMAGES)
    records = []
    for form in formats:
        baseline: dict[int, Tensor] = {}
        for name, options in listed.items():
            if form == "w4a8" and name.startswith("range"):
                continue  # the inputs are those of INT8
            pixels = diverse if options.get("choice") == "diverse" else subject.spread(CALIBRATION_IMAGES)
            calibration = calibrated(subject, pixels, Method(format=form, **options))
            for degree in at:
                logits = measured.logits(degree, calibration, pixels)
                found = against(
                    measured.float_logits(degree), baseline.setdefault(degree, logits), logits, measured.classes
                )
                records.append({"method": name, "format": form, "degree": degree, **found})
    return records


def data(subject: Subject, effort: Effort, folder: Path) -> Records:
    """How many calibration images, which ones, and none."""
    measured = Measured(subject, effort, folder, effort.sheets)
    ends = (effort.few[0], effort.few[-1])
    baseline: dict[tuple[str, int], Tensor] = {}
    records = []
    for source, pixels in _sources(subject, effort):
        for form in ("int8", HARDEST):
            calibration = calibrated(subject, pixels, Method(format=form))
            for degree in ends:
                logits = measured.logits(degree, calibration, pixels)
                first = baseline.setdefault((form, degree), logits)
                found = against(measured.float_logits(degree), first, logits, measured.classes)
                records.append({"source": source, "images": len(pixels), "format": form, "degree": degree, **found})
    return records


def _sources(subject: Subject, effort: Effort) -> Iterator[tuple[str, Tensor]]:
    """Calibration images by where they come from, the default ones first."""
    yield "spread", subject.spread(CALIBRATION_IMAGES)
    for count in effort.counts:
        if count != CALIBRATION_IMAGES:
            yield "spread", subject.spread(count)
    for count in effort.counts[1:-1]:
        yield "diverse", _diverse(subject, count)
    count, size = (SYNTHESIZED if len(effort.counts) > 2 else effort.counts[-1]), subject.pool().shape[1:]
    ends = [torch.full((3,), end) for end in (-1.0, 1.0)]  # what black and white are, normalized as sheets are
    yield "synthesized", synthesize(subject.plain, count, tuple(size), low=ends[0], high=ends[1])
    yield "Gaussian noise", torch.randn(count, *size, generator=torch.Generator().manual_seed(0))


def _diverse(subject: Subject, count: int) -> Tensor:
    pool = subject.pool()
    return pool[choose(features_of(subject.network(0), pool), count)]
