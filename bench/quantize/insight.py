"""Stages that look inside: ranges, the sensitivity of products, and the decisions about tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.quantize.accuracy import Records, calibrated, narrow
from bench.quantize.comparison import compared
from bench.quantize.protocol import CALIBRATION_IMAGES, HARDEST, Effort
from bench.quantize.subjects import BATCH, Subject
from tocom.calib.quantize.calibrate import Method
from tocom.calib.quantize.network import observe, products_of
from tocom.calib.quantize.ranges import PERCENTILE
from tocom.calib.quantize.sensitivity import sensitivity
from tocom.export.proof.decisions import comparer_of
from tocom.export.proof.reference import replay
from tocom.vit import ReducedViT, schedule_for


def ranges(subject: Subject, effort: Effort, _folder: Path) -> Records:
    """How large inputs of products get at every degree, with the degree's own weights and with merging only."""
    pixels, records = subject.spread(CALIBRATION_IMAGES), []
    for weights in ("compensated", "merging only"):
        for degree in effort.degrees:
            model = subject.model(degree if weights == "compensated" else 0)
            seen = observe([ReducedViT(model, degree)], lambda network: products_of(network.model), pixels)
            kinds: dict[str, dict[str, list[float]]] = {}
            for name, each in seen.items():
                kind = kinds.setdefault(name.rpartition(".")[2], {"largest": [], "percentile": []})
                kind["largest"].append(float(each.largest.max()))
                kind["percentile"].append(float(np.percentile(each.rows.abs().numpy(), PERCENTILE)))
            records += [{"weights": weights, "degree": degree, "kind": kind, **each} for kind, each in kinds.items()]
    return records


def products(subject: Subject, effort: Effort, _folder: Path) -> Records:
    """Each product alone in INT8."""
    calibration = calibrated(subject, subject.spread(CALIBRATION_IMAGES), Method())
    pixels, records = subject.test(effort.sensitivity_sheets)[0], []
    for degree in effort.few:
        model = subject.model(degree)
        found = sensitivity(model, schedule_for(model, degree), calibration.quantization(model), pixels)
        records += [{"degree": degree, "product": name, "divergence": each} for name, each in sorted(found.items())]
    return records


def decisions(subject: Subject, effort: Effort, _folder: Path) -> Records:
    """Whether the quantized network merges the same tokens, and what comes of it where it does not."""
    calibration_sheets, records = subject.spread(CALIBRATION_IMAGES), []
    pixels, classes = subject.test(effort.sheets)
    for form in ("int8", HARDEST):
        calibration = calibrated(subject, calibration_sheets, Method(format=form))
        for degree in effort.degrees:
            if degree:
                candidate = narrow(subject, degree, calibration, calibration_sheets)
                found = replayed(subject.network(degree), candidate, pixels, classes)
                records.append({"format": form, "degree": degree, **found})
    return records


@torch.no_grad()
def replayed(reference: ReducedViT, candidate: ReducedViT, pixels: Tensor, classes: Tensor) -> dict[str, Any]:
    """A quantized network with its own decisions and with the float network's, and the reverse.

    Args:
        reference: The float network.
        candidate: The quantized network of the same degree.
        pixels: Normalized images, float32 [B, 3, H, W].
        classes: The right ones, [B].

    Returns:
        `blocks`, those whose decisions count; for each, in percent of the merged tokens that merge into the same one,
        `own`, as decisions come, and `local`, the float network's forced in all blocks before; `same_sheets`, percent
        of the sheets on which all decisions are the same; `same_logit`, the mean magnitude of a logit's change on
        those. And comparisons with the float network: `whole`, the quantized network as it is; `values`, with the
        float network's decisions; `forced`, the float network with the quantized network's decisions.
    """
    judge, blocks = comparer_of(reference.reduction), reference.deciding_blocks
    equal = {"own": dict.fromkeys(blocks, 0), "local": dict.fromkeys(blocks, 0)}
    total = dict.fromkeys(blocks, 0)
    logits: dict[str, list[Tensor]] = {"reference": [], "whole": [], "values": [], "forced": []}
    same: list[bool] = []
    for part in pixels.split(BATCH):
        exact, own = replay(reference, part, {}), replay(candidate, part, {})
        local = replay(candidate, part, exact.natural)
        forced = replay(reference, part, own.natural)
        for name, each in zip(logits, (exact, own, local, forced), strict=True):
            logits[name].append(each.logits)
        for image in range(len(part)):
            same.append(all(judge.is_equal(exact.natural[each], own.natural[each], image) for each in blocks))
            for block in blocks:
                total[block] += judge.count(exact.natural[block])
                for name, run in (("own", own), ("local", local)):
                    equal[name][block] += judge.count_equal(exact.natural[block], run.natural[block], image)
    whole = {name: torch.cat(each) for name, each in logits.items()}
    shares = {
        name: [100 * count[block] / total[block] if total[block] else 100.0 for block in blocks]
        for name, count in equal.items()
    }
    kept = torch.tensor(same)
    unchanged = (whole["whole"] - whole["reference"])[kept].abs()
    return {
        "blocks": list(blocks), **shares, "same_sheets": 100 * float(kept.double().mean()),
        "same_logit": float(unchanged.mean()) if len(unchanged) else None,
        **{name: compared(whole["reference"], whole[name], classes) for name in ("whole", "values", "forced")},
    }  # fmt: skip
