"""Quantized networks beside float ones on the same sheets, by the quantized network in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional

from bench.quantize.subjects import Subject, logits_of
from tocom.calib.quantize.calibrate import OBSERVED, Method, calibrate, quantize
from tocom.calib.quantize.network import quantized_model
from tocom.vit import ReducedViT

CALIBRATION_IMAGES = 128


def accuracy(subject: Subject, formats: Mapping[str, tuple[Sequence[int], int]]) -> list[dict[str, Any]]:
    """Default settings, one calibration for all degrees: records as of `compared`, by format and degree.

    Args:
        subject: The network.
        formats: Number format -> the degrees that it is run at, and on how many test sheets.
    """
    pixels, records, exact = subject.spread(CALIBRATION_IMAGES), [], {}
    observed = [subject.network(degree) for degree in OBSERVED]
    for form, (degrees, sheets) in formats.items():
        calibration = calibrate(observed, pixels, Method(format=form))
        images, classes = subject.test(sheets)
        for degree in degrees:
            reference = subject.network(degree)
            if len(exact.get(degree, ())) < sheets:
                exact[degree] = logits_of(reference, images)
            quantization = quantize(reference.model, reference.schedule, calibration, pixels)
            narrow = ReducedViT(quantized_model(reference.model, quantization), degree)
            found = compared(exact[degree][:sheets], logits_of(narrow, images), classes)
            records.append({"network": subject.name, "format": form, "degree": degree, **found})
    return records


def compared(reference: Tensor, candidate: Tensor, classes: Tensor) -> dict[str, float]:
    """What a candidate does on sheets that the reference saw too.

    Args:
        reference: Logits [B, classes].
        candidate: Likewise.
        classes: The right ones, [B].

    Returns:
        `sheets`, their number; `reference` and `candidate`, top-1 in percent; `change`, the second minus the first;
        `error`, the standard error of that, sheet by sheet; `equal`, percent of sheets that are given the same class;
        `divergence`, KL(reference || candidate) in nats. All with five significant digits.
    """
    right = [(logits.argmax(1) == classes).double() for logits in (reference, candidate)]
    difference = right[1] - right[0]
    logs = [logits.double().log_softmax(1) for logits in (reference, candidate)]
    found = {
        "reference": 100 * float(right[0].mean()),
        "candidate": 100 * float(right[1].mean()),
        "change": 100 * float(difference.mean()),
        "error": 100 * float(difference.std() / len(difference) ** 0.5) if len(difference) > 1 else 0.0,
        "equal": 100 * float((reference.argmax(1) == candidate.argmax(1)).double().mean()),
        "divergence": float(functional.kl_div(logs[1], logs[0], reduction="batchmean", log_target=True)),
    }
    return {"sheets": len(classes), **{name: float(f"{value:.5g}") for name, value in found.items()}}
