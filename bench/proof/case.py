"""One random model: compiled, proven as an engine would be, and what was measured in units of its gates."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from bench.proof.models import Drawn, compensator_of, model_of
from tocom.calib.quantize.calibrate import Method, calibrate
from tocom.calib.quantize.grids import FORMATS
from tocom.calib.quantize.network import quantized_model
from tocom.export.artifacts import FusedCheckpoint, OnnxGraph
from tocom.export.engine.build import build, graph_precision
from tocom.export.graph.fuse import fuse
from tocom.export.graph.insert_qdq import quantized_graph
from tocom.export.graph.lower import Lowering, reference_model
from tocom.export.graph.weight_store import WeightStore
from tocom.export.proof.gates import GATES
from tocom.export.proof.validate import validate
from tocom.export.source.images import default_images
from tocom.reduction import reduction_named
from tocom.runtime.backends import BACKENDS
from tocom.vit import ReducedViT

_SHA256 = "0" * 64


@dataclass(frozen=True)
class Subject:
    """A model as the gates take it."""

    graph: OnnxGraph  # one degree, in the form that the engine takes
    reference: ReducedViT  # what it is compared with
    plain: ReducedViT | None = None  # of a quantized one, the reference that is not quantized


def check(drawn: Drawn) -> dict[str, Any]:
    """Compiles a model and proves it.

    Returns:
        JSON-ready: the model, whether it passed, its faults, and what was measured.
    """
    began = time.perf_counter()
    model = model_of(drawn)
    with TemporaryDirectory(prefix="tocom-proof-") as folder:
        subject = subject_of(drawn, model, Path(folder))
        engine = build(subject.graph, backend=drawn.backend, precision=drawn.precision)
        images = default_images((3, *model.patch_embed.img_size), seed=drawn.seed)
        found = validate(engine, subject.reference, images, subject.plain).findings.to_json()
    return {
        "drawn": asdict(drawn),
        "passed": found["passed"],
        "faults": found["faults"],
        "seconds": round(time.perf_counter() - began, 2),
        **measured(found, len(model.blocks), drawn.reduction),
    }


def subject_of(drawn: Drawn, model: nn.Module, folder: Path) -> Subject:
    """Lowers a model, quantized where the precision is a quantized one."""
    weights = model.state_dict()
    compensation = None
    if drawn.delta_scale is not None:
        compensation = compensator_of(drawn, model).between(0, drawn.degree, drawn.delta_scale)
        weights = fuse(weights, compensation)
    sha256 = None if compensation is None else _SHA256
    fused = FusedCheckpoint(weights, drawn.kind, drawn.degree, 0, drawn.delta_scale, _SHA256, sha256, compensation)
    schedule, reduction = drawn.schedule_of(model), reduction_named(drawn.reduction)
    reference, store = reference_model(model, schedule, fused, reduction), WeightStore(folder)
    if drawn.precision not in FORMATS:
        precision = graph_precision(drawn.backend, drawn.precision)
        lowering = Lowering(model, store, reduction)
        return Subject(lowering.lower(schedule, fused, "model.onnx", precision), reference)
    (folder / "float").mkdir()
    plain = Lowering(model, WeightStore(folder / "float"), reduction).lower(schedule, fused, "model.onnx")
    pixels = torch.cat([torch.from_numpy(batch) for batch in default_images((3, *model.patch_embed.img_size), 4)])
    own = copy.deepcopy(reference.model)
    quantization = calibrate([reference], pixels, Method(format=drawn.precision)).quantization(own)
    graph = quantized_graph(plain, model, quantization, store, "model.onnx", BACKENDS[drawn.backend].qdq)
    quantized = ReducedViT(quantized_model(own, quantization), schedule, reduction=reduction)
    return Subject(graph, quantized, reference)


def measured(found: Mapping[str, Any], depth: int, reduction: str) -> dict[str, Any]:
    """What was found, in units of the number format's unit roundoff."""
    unit = GATES[found["precision"]].unit_roundoff
    parts: dict[str, float] = {}
    for block in found["blocks"].values():
        for part, error in block["parts"].items():
            parts[part] = max(parts.get(part, 0.0), error / unit)
    middles = [error / unit for block in found["blocks"].values() for error in block["middles"].values()]
    grown = unit * math.sqrt(depth)
    return {
        "precision": found["precision"],
        "depth": depth,
        "images": found["images"],
        "decisions": found["decisions"],
        "different": round((1 - found["agreement"]) * found["decisions"]),
        "explained": found["explained"],
        "unexplained": found["unexplained"],
        "units": {
            **parts,
            "token in the middle": max(middles, default=0.0),
            f"margin, {reduction}": found["largest_margin"] / unit,
            **{name: gate["found"] / grown for name, gate in found["gates"].items()},
        },
        "shares": {name: gate["found"] / gate["allowed"] for name, gate in found["gates"].items()},
        "allowed": {
            "part": found["part_allowed"] / unit,
            "token in the middle": found["middle_allowed"] / unit,
            f"margin, {reduction}": found["margin_allowed"] / unit,
        },
        "logits per block": found["typical_logit_error"] / (unit * depth),
    }
