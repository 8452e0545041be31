"""A family's folder and the files it was made from -> a report per degree: `tocom validate`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from tocom.calib.quantize.network import quantized_model
from tocom.export.artifacts import Engine, Notify, OnnxGraph, Report
from tocom.export.engine.build import why_unrunnable
from tocom.export.graph.lower import reference_model
from tocom.export.graph.read_qdq import read_quantization
from tocom.export.proof.debug_copy import runner_of
from tocom.export.proof.findings import Accuracy, Findings
from tocom.export.proof.reference import EXACT, in_format
from tocom.export.proof.side import ENGINES, REFERENCE, Side
from tocom.export.proof.side_by_side import compare_pair
from tocom.export.proof.sides import open_side
from tocom.export.proof.validate import validate_observer
from tocom.export.source.load import CompileInputs, load_inputs, validation_batches
from tocom.export.source.options import QUANTIZED, CompileOptions
from tocom.runtime.errors import InputError, one_line
from tocom.runtime.manifest import Family
from tocom.vit import ReducedViT


@dataclass(frozen=True)
class ValidateOptions:
    """What to validate.

    Attributes:
        files: The family's folder, and the files that it was made from, as they were compiled; `degrees` selects some,
            none takes all.
        candidate: What is validated, as `tocom.export.proof.sides` reads it.
        against: What it is compared with, likewise.
        batch: Images that engines are prepared for; None for any number.
    """

    files: CompileOptions
    candidate: str = ENGINES
    against: str = REFERENCE
    batch: int | None = None


@dataclass(frozen=True)
class ValidatedDegree:
    """One degree of a family, and what it is compared with.

    Attributes:
        inputs: What the family was made from.
        engine: As listed.
        reference: In float32; quantized where the engine is.
        plain: Of a quantized engine, the reference that is not quantized.
    """

    inputs: CompileInputs
    engine: Engine
    reference: ReducedViT
    plain: ReducedViT | None


@dataclass
class FamilyValidation:
    """What was validated.

    Attributes:
        reports: Degree -> report.
        degrees: Degree -> the candidate's engine and references.
    """

    reports: dict[int, Report] = field(default_factory=dict)
    degrees: dict[int, ValidatedDegree] = field(default_factory=dict)


def validate_family(options: ValidateOptions, notify: Notify = lambda _degree, _stage: None) -> FamilyValidation:
    """Validates the engines that a folder lists once more, against the reference made from the original files.

    Args:
        options: What to validate.
        notify: Told of every degree.

    Raises:
        InputError: If the folder holds no such family, an engine file was altered, or a side of the comparison cannot
            be opened.
    """
    candidate, against = Side.read(options.candidate), Side.read(options.against)
    listed = Family.read(options.files.out)
    degrees = options.files.degrees or tuple(entry.degree for entry in listed.engines)
    inputs = inputs_of(options.files, listed, degrees)
    others = _other_families(options, inputs, (candidate, against), degrees)
    validation = FamilyValidation()
    for degree in degrees:
        notify(degree, "validating")
        listed_degree = open_degree(inputs, listed, degree)
        by_side = {side: open_degree(other, Family.read(side.folder), degree) for side, other in others.items()}
        one, other = by_side.get(candidate, listed_degree), by_side.get(against, listed_degree)
        validation.degrees[degree] = one
        validation.reports[degree] = _validated(one, candidate, other, against, options.batch)
        notify(degree, "done")
    return validation


def _other_families(
    options: ValidateOptions, inputs: CompileInputs, sides: tuple[Side, ...], degrees: tuple[int, ...]
) -> dict[Side, CompileInputs]:
    """What the families were made from that are compared with the one in question.

    Raises:
        InputError: If one removes tokens in another way.
    """
    others = {
        side: inputs_of(_files_of(options.files, side.folder), Family.read(side.folder), degrees)
        for side in sides
        if side.kind == "family"
    }
    for side, other in others.items():
        if (other.options.reduction, other.schedules) != (inputs.options.reduction, inputs.schedules):
            raise InputError(f"{one_line(side.folder)} removes tokens otherwise than {one_line(options.files.out)}: "
                             "families that are compared have the same reduction and schedule.")  # fmt: skip
    return others


def _validated(
    one: ValidatedDegree, candidate: Side, other: ValidatedDegree, against: Side, batch: int | None
) -> Report:
    """Validates the candidate; what it is compared with too, unless that is the reference itself."""
    precision = against.precision if against.is_exact else EXACT
    findings = _findings(one, candidate, precision, batch)
    if not against.is_exact:
        others_findings = _findings(other, against, precision, batch)
        with (
            open_side(candidate, one.engine, one.reference, batch) as observer,
            open_side(against, other.engine, other.reference, batch) as other_observer,
        ):
            pair = compare_pair(observer, other_observer, one.reference, validation_batches(one.inputs))
        passed = findings.passed and others_findings.passed
        findings = replace(findings, passed=passed, against=others_findings, pair=pair)
    findings = replace(findings, accuracy=_accuracy(one, candidate))
    return Report(one.engine, findings.passed, findings)


def _findings(degree: ValidatedDegree, side: Side, precision: str, batch: int | None) -> Findings:
    """What comparing one side with the reference shows."""
    reference = in_format(degree.reference, precision)
    plain = None if degree.plain is None else in_format(degree.plain, precision)
    with open_side(side, degree.engine, degree.reference, batch) as observer:
        findings = validate_observer(observer, reference, validation_batches(degree.inputs), plain)
        name = observer.name
    run = None if side.kind != "torch" and degree.engine.unrunnable else name.partition(" ")[0]
    return replace(findings, candidate=name, reference=f"torch {precision}", run=run)


def _accuracy(degree: ValidatedDegree, side: Side) -> Accuracy | None:
    """Top-1 of engine and reference on the labelled images, where there are any."""
    images = degree.inputs.images
    if images is None or images.labels is None or side.kind not in ("engines", "family"):
        return None

    def answer(pixels: np.ndarray) -> np.ndarray:
        return degree.reference(torch.from_numpy(pixels)).numpy()

    with runner_of(degree.engine) as runner, torch.inference_mode():
        return Accuracy(images.top1(runner.infer), images.top1(answer), len(images))


def inputs_of(options: CompileOptions, listed: Family, degrees: tuple[int, ...]) -> CompileInputs:
    """The original files of a family, loaded and checked to be those it was made from.

    Raises:
        InputError: If they are not.
    """
    known = listed.source_degree if options.source_degree is None else options.source_degree
    as_listed = {"source_degree": known, "schedule": listed.schedule, "reduction": listed.reduction}
    inputs = load_inputs(replace(options, degrees=degrees, **as_listed))
    if replace(listed, engines=()) != inputs.family:
        raise InputError(f"{options.out} was compiled from another checkpoint, compensator or source degree than those "
                         "given: validate with the files it was made from.")  # fmt: skip
    return inputs


def _files_of(options: CompileOptions, folder: Path) -> CompileOptions:
    """The same files for another family of the checkpoint, which may go without the compensator."""
    compensated = Family.read(folder).compensator_sha256 is not None
    return replace(options, out=folder, compensator=options.compensator if compensated else None, source_degree=None)


def open_degree(inputs: CompileInputs, listed: Family, degree: int) -> ValidatedDegree:
    """A listed engine, and the references that it is compared with.

    Raises:
        InputError: If there is none, or a file of it was altered.
    """
    entry, folder = listed.entry(degree), inputs.options.out
    listed.check_files(folder, entry)
    fused = inputs.fused(degree, entry.scale)
    graph = OnnxGraph(folder / entry.onnx, entry.sha256, entry.tokens, entry.gmacs, fused, entry.precision)
    engine = Engine(
        file=folder / entry.engine,
        backend=entry.backend,
        precision=entry.precision,
        files=entry.sha256,
        graph=graph,
        native=entry.native,
        build=entry.build,
        unrunnable=why_unrunnable(entry, folder),
    )
    plain = reference_model(inputs.loaded.model, inputs.schedules[degree], fused, inputs.reduction)
    if graph.precision not in QUANTIZED:
        return ValidatedDegree(inputs, engine, plain, None)
    return ValidatedDegree(inputs, engine, _quantized_reference(plain, graph), plain)


def _quantized_reference(plain: ReducedViT, graph: OnnxGraph) -> ReducedViT:
    """The network that the graph of a listed engine describes, in PyTorch."""
    quantization = read_quantization(graph.file, plain.model, graph.fused.weights, graph.precision)
    return ReducedViT(quantized_model(plain.model, quantization), plain.schedule, reduction=plain.reduction).eval()
