"""Everything that the options of a compile name, loaded and checked before anything is written."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from tocom.calib.labelled import LabelledImages
from tocom.calib.quantize.calibration_file import read_calibration
from tocom.calib.quantize.network import products_of
from tocom.checkpoint import LoadedModel, hash_tensors, load_model
from tocom.compensator import Compensator
from tocom.export.artifacts import FusedCheckpoint
from tocom.export.engine.build import backends_for, graph_precision
from tocom.export.engine.tensorrt.plan import plan_recipe, require_buildable
from tocom.export.graph.fuse import fuse
from tocom.export.graph.half_precision import HALF
from tocom.export.source.images import default_images
from tocom.export.source.options import QUANTIZED, CompileOptions, QuantizeOptions
from tocom.reduction import Reduction, reduction_named
from tocom.runtime.backends import AUTO, BACKENDS, native_operators
from tocom.runtime.errors import InputError
from tocom.runtime.manifest import Family, InputSpec
from tocom.runtime.preprocess import find_images
from tocom.schedule import MergeSchedule, ScheduleFamily
from tocom.vit import schedule_for

PIPELINE = 7  # part of every recipe; raised when the same inputs begin to make other engines
BASELINE = 0  # always compiled: what every other degree is compared with
_LIBRARIES = ("torch", "timm", "onnx", "onnxscript")


@dataclass(frozen=True)
class Source:
    """Everything that was given, loaded and checked.

    Attributes:
        options: As given.
        loaded: The checkpoint in its model.
        compensator: None for plain token reduction.
        compensator_sha256: Hash of its tensors.
        schedules: Target degree -> tokens to remove.
        scales: Target degree -> delta scale; empty without a compensator.
        images: What was given to validate on.
        family: The manifest, before any engine is listed.
    """

    options: CompileOptions
    loaded: LoadedModel
    compensator: Compensator | None
    compensator_sha256: str | None
    schedules: Mapping[int, MergeSchedule]
    scales: Mapping[int, float]
    images: LabelledImages | None
    family: Family

    @property
    def reduction(self) -> Reduction:
        """How tokens are removed."""
        return reduction_named(self.options.reduction)

    def fused(self, degree: int, delta_scale: float | None = None) -> FusedCheckpoint:
        """The weights of one degree, at its own scale or another: the plain ones at 0 or without a compensator."""
        weights = self.loaded.model.state_dict()
        scale = compensation = None
        if self.compensator is not None:
            scale = self.scales[degree] if delta_scale is None else delta_scale
            if scale:
                compensation = self.compensator.between(self.options.source_degree, degree, scale)
                weights = fuse(weights, compensation)
        return FusedCheckpoint(
            weights=weights,
            model=self.loaded.architecture,
            degree=degree,
            source_degree=self.options.source_degree or 0,
            delta_scale=scale,
            checkpoint_sha256=self.loaded.checkpoint_sha256,
            compensator_sha256=self.compensator_sha256,
            compensation=compensation,
        )

    def recipe(self, degree: int, backend: str | None = None) -> str:
        """Hash of everything that decides what the engine of a degree is.

        Args:
            degree: Which.
            backend: The engine's; None takes the options', which must name one then.
        """
        backend = backend or self.options.backend
        planned = BACKENDS[backend].builds_plans
        parts = {
            "graph": self.graph_recipe(degree, backend),
            "library": None if planned else BACKENDS[backend].version(),
            "plan": plan_recipe(backend, self.options.plan) if planned else None,
            "precision": self.options.precision,
            "backend": backend,
            "native": sorted(native_operators(backend)),
            **self._quantization(),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def graph_recipe(self, degree: int, backend: str | None = None) -> str:
        """Hash of everything that decides what the graph of a degree is, which backends share if they can.

        Args:
            degree: Which.
            backend: The one that it is for; None takes the options'.
        """
        parts = {
            "pipeline": PIPELINE,
            "precision": graph_precision(backend or self.options.backend, self.options.precision),
            "libraries": {name: version(name) for name in _LIBRARIES},
            "model": self.loaded.architecture,
            "model_args": {name: repr(value) for name, value in self.options.model_args.items()},
            "image": self.family.input.size,
            "checkpoint": self.loaded.checkpoint_sha256,
            "compensator": self.compensator_sha256,
            "source_degree": self.options.source_degree if self.compensator else None,
            "scale": self.scales.get(degree),
            "removed": self.schedules[degree].removed,
            "reduction": self.options.reduction,
            "degree": degree,
            **({"float_blocks": sorted(self.options.float_blocks)} if self.options.float_blocks else {}),
            **self._quantization(),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _quantization(self) -> dict[str, Any]:
        if self.options.precision not in QUANTIZED:
            return {}
        images = None if self.images is None else self.images.fingerprint  # they decide what returns to float
        return {"quantization": self._fingerprinted, "images": images}

    @functools.cached_property
    def _fingerprinted(self) -> dict[str, Any]:
        return self.options.quantize.recipe()


def load_source(options: CompileOptions) -> Source:
    """Loads and checks everything that was given, before anything is written.

    Raises:
        InputError: If something given cannot be used.
    """
    backends_for(options.backend, options.precision)
    if options.backend != AUTO and BACKENDS[options.backend].builds_plans:
        require_buildable(options.backend, options.plan)
    if options.delta_scale is not None and not np.isfinite(options.delta_scale):
        raise InputError(f"the scale must be a finite number, got {options.delta_scale}.")
    if options.compensator is not None and options.source_degree is None:
        raise InputError("a compensator needs the degree that the checkpoint was fine-tuned at: give --source-degree "
                         "(0 if it was fine-tuned without merging).")  # fmt: skip
    compensator = None if options.compensator is None else Compensator.load(options.compensator)
    loaded = load_model(
        options.model, checkpoint=options.checkpoint, num_classes=options.num_classes, **options.model_args
    )
    _require_blocks(options, len(loaded.model.blocks))
    degrees = tuple(sorted({BASELINE, *options.degrees}))
    schedule_family, reduction = ScheduleFamily(options.schedule), reduction_named(options.reduction)
    reduction.require_supported(loaded.model)
    schedules = {degree: schedule_for(loaded.model, degree, schedule_family) for degree in degrees}
    for schedule in schedules.values():
        schedule.require_room()
    scales: dict[int, float] = {}
    if compensator is not None:
        model = loaded.model
        compensator.require_fits(
            backbone=loaded.architecture,
            width=model.embed_dim,
            depth=len(model.blocks),
            schedule=schedule_family.name,
            reduction=reduction.name,
        )
        for degree in degrees:
            scales[degree] = compensator.between(options.source_degree, degree, options.delta_scale).delta_scale
    sha256 = None if compensator is None else hash_tensors(compensator.state_dict())
    spec = input_spec(loaded)
    family = Family(
        model=loaded.architecture,
        classes=loaded.model.num_classes,
        input=spec,
        source_degree=options.source_degree,
        checkpoint_sha256=loaded.checkpoint_sha256,
        compensator_sha256=sha256,
        class_names=loaded.label_names,
        engines=(),
        schedule=schedule_family.name,
        reduction=reduction.name,
    )
    images = None
    if options.images is not None:
        images = LabelledImages.below(options.images, spec, loaded.label_names, loaded.model.num_classes, options.limit)
    source = Source(options, loaded, compensator, sha256, schedules, scales, images, family)
    _require_quantizable(source)
    return source


def _require_quantizable(source: Source) -> None:
    """Checks what quantized engines are to be made with, before anything is written.

    Raises:
        InputError: If it cannot be used, or is given for a precision that is not quantized.
    """
    options, precision = source.options.quantize, source.options.precision
    if precision not in QUANTIZED:
        if options != QuantizeOptions():
            raise InputError(f"calibration and max-drop are for {', '.join(QUANTIZED)}, the precision is {precision}.")
        return
    products = list(products_of(source.loaded.model))
    unknown = sorted(set(options.keep_float) - set(products))
    if unknown:
        raise InputError(f"keep-float must name products like {', '.join(products[:3])}, got {', '.join(unknown)}.")
    if options.is_file:
        made_with = read_calibration(options.calibration, made_for(source), source.loaded.model).method.format
        if made_with != precision:
            raise InputError(f"{options.calibration} is a calibration for {made_with}, the precision is {precision}.")
    elif options.calibration is not None:
        find_images([options.calibration])


def made_for(source: Source) -> dict[str, str]:
    """What identifies a network."""
    return {
        "model": source.loaded.architecture,
        "checkpoint": source.loaded.checkpoint_sha256,
        "compensator": str(source.compensator_sha256),
        "schedule": source.family.schedule,
        "reduction": source.family.reduction,
    }


def _require_blocks(options: CompileOptions, depth: int) -> None:
    """Checks that the blocks to be left in float32 are there, and that the format stands in the graph.

    Raises:
        InputError: If not.
    """
    if not options.float_blocks:
        return
    if not all(0 <= block < depth for block in options.float_blocks):
        raise InputError(f"float blocks must be among 0 to {depth - 1}, got {list(options.float_blocks)}.")
    typed = [row.name for row in BACKENDS.values() if row.typed]
    if options.precision not in HALF or options.backend not in typed:
        raise InputError(f"float blocks are for {' and '.join(HALF)} graphs of {', '.join(typed)}, got "
                         f"{options.precision} on {options.backend}; name one of these with --backend. Quantized "
                         "products are left in float by tocom quantize --keep-float.")  # fmt: skip


def validation_batches(source: Source) -> Iterator[np.ndarray]:
    """What engines are validated on: noise and patterns, and the first of the images where some were given."""
    yield from default_images(source.family.input.size)
    if source.images is not None:
        for count in (1, 5):
            yield source.images.pixels(range(min(count, len(source.images))))


def input_spec(loaded: LoadedModel) -> InputSpec:
    """How images are prepared for a model: timm's evaluation settings."""
    config = {**loaded.data_config, "size": loaded.data_config["input_size"]}
    # through JSON, because a model folder's config may hold anything, and the manifest's reader checks it
    return InputSpec.from_json(json.loads(json.dumps(config)))
