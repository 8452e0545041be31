"""A family's folder and the files it was made from -> a report per degree: `tocom validate`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tocom.calib.quantize.network import quantized_model
from tocom.export.artifacts import Engine, Notify, OnnxGraph, Report
from tocom.export.engine.build import why_unrunnable
from tocom.export.graph.lower import reference_model
from tocom.export.graph.read_qdq import read_quantization
from tocom.export.proof.debug_copy import runner_of
from tocom.export.proof.reference import in_format
from tocom.export.proof.side_by_side import compare_pair
from tocom.export.proof.sides import ENGINES, REFERENCE, Side, open_side
from tocom.export.proof.validate import validate_observer
from tocom.export.source.load import Source, load_source, validation_batches
from tocom.export.source.options import QUANTIZED, CompileOptions
from tocom.runtime.errors import InputError, one_line
from tocom.runtime.manifest import Family
from tocom.vit import ReducedViT


@dataclass(frozen=True)
class ValidateOptions:
    """What to prove.

    Attributes:
        files: The family's folder, and the files that it was made from, as they were compiled; `degrees` selects some,
            none takes all.
        candidate: What is to be proven, in the words of `tocom.export.proof.sides`.
        against: What it is compared with.
        batch: Images that engines are prepared for; None for any number.
    """

    files: CompileOptions
    candidate: str = ENGINES
    against: str = REFERENCE
    batch: int | None = None


@dataclass(frozen=True)
class ValidatedDegree:
    """One degree of a family, open_side for proving.

    Attributes:
        source: What the family was made from.
        engine: As listed.
        reference: In float32; quantized where the engine is.
        plain: Of a quantized engine, the reference that is not quantized.
    """

    source: Source
    engine: Engine
    reference: ReducedViT
    plain: ReducedViT | None


@dataclass
class FamilyValidation:
    """What was proven.

    Attributes:
        reports: Degree -> report.
        degrees: Degree -> what it was proven with.
    """

    reports: dict[int, Report] = field(default_factory=dict)
    degrees: dict[int, ValidatedDegree] = field(default_factory=dict)


def validate_family(options: ValidateOptions, notify: Notify = lambda _degree, _stage: None) -> FamilyValidation:
    """Proves the engines that a folder lists once more, against the reference made from the original files.

    Args:
        options: What to prove.
        notify: Told of every degree.

    Raises:
        InputError: If the folder holds no such family, an engine file was altered, or a side of the comparison cannot
            be open_side.
    """
    candidate, against = Side.read(options.candidate), Side.read(options.against)
    listed = Family.read(options.files.out)
    degrees = options.files.degrees or tuple(entry.degree for entry in listed.engines)
    source = source_of(options.files, listed, degrees)
    others = {
        who: source_of(_files_of(options.files, who.folder), Family.read(who.folder), degrees)
        for who in (candidate, against)
        if who.kind == "family"
    }
    for who, other in others.items():
        if (other.options.reduction, other.schedules) != (source.options.reduction, source.schedules):
            raise InputError(f"{one_line(who.folder)} removes tokens otherwise than {one_line(options.files.out)}: "
                             "families that are compared have the same reduction and schedule.")  # fmt: skip
    proof = FamilyValidation()
    for degree in degrees:
        notify(degree, "validating")
        own = opened_degree(source, listed, degree)
        sides = {who: opened_degree(other, Family.read(who.folder), degree) for who, other in others.items()}
        proof.degrees[degree] = sides.get(candidate, own)
        proof.reports[degree] = _proven(sides.get(candidate, own), candidate, sides.get(against, own), against, options)
        notify(degree, "done")
    return proof


def _proven(
    one: ValidatedDegree, candidate: Side, other: ValidatedDegree, against: Side, options: ValidateOptions
) -> Report:
    """Proves the candidate; what it is compared with too, unless that is the reference itself."""
    precision = against.precision if against.is_exact else "fp64"
    found = _findings(one, candidate, precision, options.batch)
    passed = found["passed"]
    if not against.is_exact:
        beside = _findings(other, against, precision, options.batch)
        with (
            open_side(candidate, one.engine, one.reference, options.batch) as ours,
            open_side(against, other.engine, other.reference, options.batch) as theirs,
        ):
            pair = compare_pair(ours, theirs, one.reference, validation_batches(one.source))
        passed = passed and beside["passed"]
        found |= {"passed": passed, "against": beside, "pair": pair.to_json()}
    accuracy = _accuracy(one, candidate)
    return Report(one.engine, passed, {**found, **({"accuracy": accuracy} if accuracy else {})})


def _findings(proven: ValidatedDegree, who: Side, precision: str, batch: int | None) -> dict[str, Any]:
    reference = in_format(proven.reference, precision)
    plain = None if proven.plain is None else in_format(proven.plain, precision)
    with open_side(who, proven.engine, proven.reference, batch) as observer:
        findings = validate_observer(observer, reference, validation_batches(proven.source), plain)
        name = observer.name
    run = None if who.kind != "torch" and proven.engine.unrunnable else name.partition(" ")[0]
    return {**findings.to_json(), "candidate": name, "reference": f"torch {precision}", "run": run}


def _accuracy(proven: ValidatedDegree, who: Side) -> dict[str, float | int]:
    """Top-1 of engine and reference on the labelled images, where there are any."""
    images = proven.source.images
    if images is None or images.labels is None or who.kind not in ("engines", "family"):
        return {}

    def answer(pixels: np.ndarray) -> np.ndarray:
        return proven.reference(torch.from_numpy(pixels)).numpy()

    with runner_of(proven.engine) as runner, torch.inference_mode():
        return {"top1": images.top1(runner.infer), "reference_top1": images.top1(answer), "images": len(images)}


def source_of(options: CompileOptions, listed: Family, degrees: tuple[int, ...]) -> Source:
    """The original files of a family, loaded and checked to be those it was made from.

    Raises:
        InputError: If they are not.
    """
    known = listed.source_degree if options.source_degree is None else options.source_degree
    as_listed = {"source_degree": known, "schedule": listed.schedule, "reduction": listed.reduction}
    source = load_source(replace(options, degrees=degrees, **as_listed))
    if replace(listed, engines=()) != source.family:
        raise InputError(f"{options.out} was compiled from another checkpoint, compensator or source degree than those "
                         "given: validate with the files it was made from.")  # fmt: skip
    return source


def _files_of(options: CompileOptions, folder: Path) -> CompileOptions:
    """The same files for another family of the checkpoint, which may go without the compensator."""
    compensated = Family.read(folder).compensator_sha256 is not None
    return replace(options, out=folder, compensator=options.compensator if compensated else None, source_degree=None)


def opened_degree(source: Source, listed: Family, degree: int) -> ValidatedDegree:
    """A listed engine, and the references that it is to be compared with.

    Raises:
        InputError: If there is none, or a file of it was altered.
    """
    entry, folder = listed.entry(degree), source.options.out
    listed.check_files(folder, entry)
    fused = source.fused(degree, entry.scale)
    graph = OnnxGraph(folder / entry.onnx, entry.sha256, entry.tokens, entry.gmacs, fused, entry.precision)
    engine = Engine(
        file=folder / entry.engine,
        backend=entry.backend,
        precision=entry.precision,
        files=entry.sha256,
        source=graph,
        native=entry.native,
        build=entry.build,
        unrunnable=why_unrunnable(entry, folder),
    )
    plain = reference_model(source.loaded.model, source.schedules[degree], fused, source.reduction)
    if graph.precision not in QUANTIZED:
        return ValidatedDegree(source, engine, plain, None)
    return ValidatedDegree(source, engine, _quantized_reference(plain, graph), plain)


def _quantized_reference(plain: ReducedViT, graph: OnnxGraph) -> ReducedViT:
    """What the graph of a listed engine says, in PyTorch."""
    found = read_quantization(graph.file, plain.model, graph.source.weights, graph.precision)
    return ReducedViT(quantized_model(plain.model, found), plain.schedule, reduction=plain.reduction).eval()
