"""The pipeline: a checkpoint and a compensator -> a family of validated engines, one per degree, in one folder.

A degree is listed in family.json only once its engine has passed validation, and every file it needs is complete before
that; files are named after what they were made from and never rewritten. So whatever interrupts a compile, the listed
degrees run, and the same command finishes the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tocom.calib.labelled import LabelledImages
from tocom.export.artifacts import Notify, Report
from tocom.export.engine.measure_latency import BATCHES, measured
from tocom.export.family.choose_backend import choose_backend
from tocom.export.family.lock import locked
from tocom.export.family.quantized_steps import QuantizedGraphs
from tocom.export.family.scales import at_chosen_scales
from tocom.export.family.steps import Graphs, Steps
from tocom.export.graph.weight_store import WeightStore
from tocom.export.source.load import Source, load_source
from tocom.export.source.options import QUANTIZED, CompileOptions
from tocom.export.source.record import write_record
from tocom.runtime.engines.base import open_engine
from tocom.runtime.errors import InputError
from tocom.runtime.family_files import MANIFEST, may_be_deleted
from tocom.runtime.manifest import EngineEntry, Family
from tocom.vit import ReducedViT


def _silent(_degree: int | None, _stage: str) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class CompileResult:
    """What a compile left behind.

    Attributes:
        family: As listed in family.json now.
        reused: Degrees that were there already, unchanged.
        failed: Reports of the degrees that did not pass; an engine listed for one of them is an earlier one.
    """

    family: Family
    reused: tuple[int, ...]
    failed: Mapping[int, Report]


def compile_family(options: CompileOptions, notify: Notify = _silent) -> CompileResult:
    """Compiles every degree that is not there yet, measures the family, and lists it in family.json.

    Raises:
        InputError: If something given cannot be used; nothing is written then.
        OSError: If the folder cannot be written or is full; what is listed stays usable.
    """
    notify(None, "loading")
    inputs = at_chosen_scales(load_source(options))
    with locked(options.out):
        family = _listed(inputs)
        store = WeightStore(options.out, [options.out / entry.onnx for entry in family.engines])
        with (QuantizedGraphs if options.precision in QUANTIZED else Graphs)(inputs, store, notify) as graphs:
            backend = choose_backend(graphs, family)
            steps = graphs.steps(backend.name)
            reused = _finished(steps, family)
            family, failed = _compiled(steps, family, backend.report, notify)
            family = _measure(steps, family, notify)
        write_record(options, family)
        family.write(options.out)
        _sweep(options.out)
    return CompileResult(family=family, reused=tuple(reused), failed=failed)


def _compiled(
    steps: Steps, family: Family, report_of_highest: Report | None, notify: Notify
) -> tuple[Family, dict[int, Report]]:
    """Makes the degrees that are not finished, and lists those that pass.

    Args:
        steps: What is compiled.
        family: As listed so far.
        report_of_highest: On the engine of the highest degree, where it was made to choose the backend.
        notify: Told of every degree.

    Returns:
        The family as listed then, and the reports of the degrees that did not pass.
    """
    schedules, finished = steps.inputs.schedules, _finished(steps, family)
    reports = {} if report_of_highest is None else {max(schedules): report_of_highest}
    failed: dict[int, Report] = {}
    for degree in schedules:
        if degree in finished:
            notify(degree, "reused")
            continue
        report = reports.pop(degree) if degree in reports else steps.validated(degree)
        if not report:
            failed[degree] = report
            notify(degree, "FAILED")
            continue
        family = family.with_entry(_entry(steps, degree, report))
        write_record(steps.inputs.options, family)  # first, so that no listed engine lacks it
        family.write(steps.inputs.options.out)
        notify(degree, "done")
    return family, failed


def _listed(inputs: Source) -> Family:
    """The family in the folder to go on with: its engines whose files are whole.

    Raises:
        InputError: If the folder holds another family, or a broken one, that is not to be replaced.
    """
    out = inputs.options.out
    if not (out / MANIFEST).exists():
        return inputs.family
    try:
        listed = Family.read(out)
    except InputError:
        if not inputs.options.replace:
            raise
        return inputs.family
    if replace(listed, engines=()) != inputs.family:
        if not inputs.options.replace:
            raise InputError(f"{out} holds the family of another checkpoint, compensator, source degree, "
                             "schedule or reduction "
                             f"({listed.model}). Choose another --out, or --replace it.")  # fmt: skip
        return inputs.family
    kept = []
    for entry in listed.engines:
        try:
            listed.check_files(out, entry)
        except InputError:
            continue  # altered or lost: made again
        kept.append(entry)  # also one of another recipe: it stays listed until the new engine has passed
    return replace(listed, engines=tuple(kept))


def _finished(steps: Steps, family: Family) -> list[int]:
    """The degrees asked for that a family has, made from the same things."""
    inputs = steps.inputs
    return [
        entry.degree
        for entry in family.engines
        if entry.degree in inputs.schedules and entry.recipe == inputs.recipe(entry.degree, steps.backend)
    ]


def _entry(steps: Steps, degree: int, report: Report) -> EngineEntry:
    engine, graph = report.engine, report.engine.source
    return EngineEntry(
        degree=degree,
        scale=graph.source.delta_scale,
        schedule=steps.inputs.schedules[degree].removed,
        tokens=graph.tokens,
        gmacs=round(graph.gmacs, 6),
        backend=engine.backend,
        precision=engine.precision,
        onnx=graph.file.name,
        engine=engine.file.name,
        sha256=engine.files,
        recipe=steps.inputs.recipe(degree, steps.backend),
        validation=report.findings.to_json(),
        latency_ms={},
        accuracy={},
        native=engine.native,
        build=engine.build,
    )


def _measure(steps: Steps, family: Family, notify: Notify) -> Family:
    """Fills in latencies, all degrees side by side, and top-1 where there are labels; keeps what is known already."""
    inputs = steps.inputs
    compiled = [entry for entry in family.engines if entry.degree in inputs.schedules]
    if any(entry.validation.get("run", entry.backend) is None for entry in compiled):
        return family  # plans for other machines
    if any(str(batch) not in entry.pays for entry in compiled for batch in BATCHES):
        notify(None, "measuring latency")
        for entry in measured(compiled, inputs.options.out, steps.rival):
            family = family.with_entry(entry)
    images = inputs.images
    if images is not None and images.labels is not None:
        for entry in [entry for entry in family.engines if entry.degree in inputs.schedules]:
            if entry.validation.get("labelled_images") != images.fingerprint:
                notify(entry.degree, f"top-1 on {len(images)} images")
                validation = {**entry.validation, "labelled_images": images.fingerprint}
                accuracy = _accuracy(inputs, entry, images)
                family = family.with_entry(replace(entry, accuracy=accuracy, validation=validation))
    return family


def _accuracy(inputs: Source, entry: EngineEntry, images: LabelledImages) -> dict[str, float | None]:
    top1 = entry.validation.get("quantization", {}).get("top1")  # measured already, for what it may lose
    if top1 is None:
        with open_engine(inputs.options.out / entry.engine, entry.backend, precision=entry.precision) as runner:
            top1 = images.top1(runner.infer)
    plain = None
    if inputs.compensator is not None:
        reference = ReducedViT(inputs.loaded.model, inputs.schedules[entry.degree], reduction=inputs.reduction)
        with torch.inference_mode():
            plain = images.top1(lambda pixels: reference(torch.from_numpy(pixels)).numpy())
    return {"top1": top1, "top1_without_compensator": plain, "images": len(images)}


def _sweep(out: Path) -> None:
    """Removes what earlier compiles left and no engine listed on disk needs; nobody else's files."""
    listed = Family.read(out).engines if (out / MANIFEST).exists() else ()
    needed = {name for entry in listed for name in entry.sha256}
    for file in out.iterdir():
        if may_be_deleted(file.name, needed):
            file.unlink()
