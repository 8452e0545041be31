"""The tables that commands end with: a family's engines, and the scales that were tried."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from tocom.calib.scales_file import ScaleChoices, Trial
from tocom.runtime.errors import InputError, one_line, readable
from tocom.runtime.family_files import MANIFEST
from tocom.runtime.manifest import EngineEntry, Family

_MIB = 1 << 20
_ABOUT_TIMES = (
    "ms: batch 1 on this machine, all degrees measured in one interleaved run; tax: beyond the same network that drops "
    "tokens unseen; MiB: all files the degree reads."
)
_TIMES = {False: ("ms p50", "p99", "speed-up", "tax"), True: ("ms p50", "speed-up", "tax", "gain")}
_UNNOTED = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError)  # of notes that are of another kind
_ALONE = {"merge": "merging", "prune": "pruning"}


def family_table(family: Family, folder: Path, degrees: Collection[int] | None = None) -> Table:
    """One row per degree.

    Args:
        family: The family.
        folder: Where its files lie.
        degrees: Rows to show; None shows all.

    Raises:
        InputError: What is noted of an engine's validation, times or plan is not what a compile notes.
    """
    try:
        return _family_table(family, folder, degrees)
    except _UNNOTED as error:
        raise InputError(
            f"{one_line(folder / MANIFEST)} notes of an engine what no compile does ({type(error).__name__}: "
            f"{readable(error)}): compile the family again"
        ) from error


def _family_table(family: Family, folder: Path, degrees: Collection[int] | None) -> Table:
    entries = [entry for entry in family.engines if degrees is None or entry.degree in degrees]
    labelled = next((entry.accuracy["images"] for entry in entries if "images" in entry.accuracy), None)
    compensated = family.compensator_sha256 is not None
    table = Table(title=_title(family, entries))
    scaled = len({entry.scale for entry in entries}) > 1
    planned = any(entry.build for entry in entries)
    quantized = any("quantization" in entry.validation for entry in entries)
    timed = any(entry.latency_ms for entry in entries) or not planned
    names = (
        *(("tokens", "MiB") if quantized else ("tokens", "GMACs", "MiB")),
        *(("plan MiB", "build s", "layers") if planned else ()),
        *(_TIMES[quantized] if timed else ()),
        *("logit error", "agreement"),
        *(("in float", "loses") if quantized else ()),
    )
    for name in ("degree", "scale", *names) if scaled else ("degree", *names):
        table.add_column(name, justify="right")
    if labelled and compensated:
        alone = _ALONE.get(family.reduction, escape(one_line(family.reduction)))
        table.add_column(f"top-1 {alone} only", justify="right")
        table.add_column("with compensator", justify="right")
    elif labelled:
        table.add_column("top-1", justify="right")
    baseline = next((entry for entry in family.engines if entry.degree == 0), None)
    for entry in entries:
        cells = [
            *_size(entry, folder, brief=quantized),
            *(_plan(entry) if planned else ()),
            *(_times(entry, baseline, brief=quantized) if timed else ()),
            *(_gain(entry) if quantized and timed else ()),
            *_validation(entry),
            *(_loss(entry) if quantized else ()),
        ]
        degree = str(entry.degree)
        scale = [_scale(entry, family)] if scaled else []
        table.add_row(degree, *scale, *cells, *(_accuracy(entry, compensated) if labelled else ()))
    notes = [_ABOUT_TIMES if timed else "MiB: all files of the degree, also the graph that its plan was built from."]
    if planned:
        notes.append(escape(_about_plans(entries)))
    if idle := _idle(entries):
        notes.append(f"Not faster than degree 0 here: {idle}.")
    if quantized:
        notes.append(_about_quantized(entries))
    stored = {name for entry in family.engines for name in entry.sha256}
    notes.append(f"Weights that are equal are stored once: {_mib(folder, stored):.1f} MiB on disk in all.")
    if labelled:
        notes.append(
            f"top-1: {labelled:.0f} images" + (f", source degree {family.source_degree}." if compensated else ".")
        )
    table.caption = "\n".join(notes)
    table.caption_justify = "left"
    return table


def scale_table(choices: ScaleChoices, degrees: Collection[int]) -> Table:
    """One row per degree, one column per scale that was tried: top-1 and mean cross-entropy, the chosen one marked.

    Args:
        choices: The choices.
        degrees: Rows to show.
    """
    shown = {degree: choices.degrees[degree] for degree in degrees}
    scales = sorted({trial.scale for choice in shown.values() for trial in choice.tried})
    table = Table("degree", title="top-1 and mean cross-entropy per scale, * chosen")
    for scale in scales:
        table.add_column(f"{scale:g}" if scale else "merging only", justify="right")
    for degree, choice in shown.items():
        trials = {trial.scale: trial for trial in choice.tried}
        table.add_row(str(degree), *(_trial(trials.get(scale), choice.scale) for scale in scales))
    errors = [trial.standard_error(choice.images) for choice in shown.values() for trial in choice.tried]
    images = max((choice.images for choice in shown.values()), default=0)
    table.caption = (f"{images} images: a share has a standard error of up to {max(errors, default=0):.1%}; smaller "
                     "differences may be chance.\nOf equal shares the scale closest to the training scale is "
                     "chosen.")  # fmt: skip
    table.caption_justify = "left"
    return table


def _trial(trial: Trial | None, chosen: float) -> str:
    if trial is None:
        return "-"
    loss = "-" if trial.cross_entropy is None else f"{trial.cross_entropy:.3f}"
    text = f"{trial.top1:.1%} {loss}"
    return f"[bold]{text} *[/]" if trial.scale == chosen else f"{text}  "


def _title(family: Family, entries: Sequence[EngineEntry]) -> str:
    parts = [one_line(family.model)]
    if entries:
        parts.append(one_line(f"{entries[0].backend} {entries[0].precision}"))
    if family.schedule != Family.schedule:
        parts.append(f"schedule {one_line(family.schedule)}")
    if family.reduction != Family.reduction:
        parts.append(f"reduction {one_line(family.reduction)}")
    return escape(", ".join(parts))


def _size(entry: EngineEntry, folder: Path, *, brief: bool) -> list[str]:
    macs = [] if brief else [f"{entry.gmacs:.3g}"]
    return [f"{entry.tokens[0]} -> {entry.tokens[-1]}", *macs, f"{_mib(folder, entry.sha256):.1f}"]


def _plan(entry: EngineEntry) -> list[str]:
    build = entry.build
    return [f"{build['bytes'] / _MIB:.1f}", f"{build['seconds']:.1f}", str(sum(build["layers"].values()))]


def _about_plans(entries: Sequence[EngineEntry]) -> str:
    """For what and by what the plans were built, and how they were validated."""
    build = next(entry.build for entry in entries if entry.build)
    smallest, best, largest = build["options"]["batch"]
    made_for = ", ".join(build["options"]["targets"]) or build.get("gpu", "the library's default targets")
    by = f"{entries[0].backend} {build['library']}"
    text = f"Plans by {by} for {made_for}; batch {smallest} to {largest}, best at {best}."
    if any(entry.validation.get("run", entry.backend) is None for entry in entries):
        text += (
            "\nNot run here: validated are their graphs, which ONNX Runtime carried out with half precision emulated."
        )
    return text


def _times(entry: EngineEntry, baseline: EngineEntry | None, *, brief: bool) -> list[str]:
    time = entry.latency_ms.get("1", {})
    base = baseline.latency_ms.get("1", {}) if baseline else {}
    return [
        f"{time['p50']:.2f}" if "p50" in time else "-",
        *([] if brief else [f"{time['p99']:.2f}" if "p99" in time else "-"]),
        _speed_up(entry, time, base),
        f"{time['p50'] / time['slice_bound'] - 1:.0%}" if "slice_bound" in time else "-",
    ]


def _validation(entry: EngineEntry) -> list[str]:
    findings = entry.validation
    return [
        f"{findings['max_logit_error']:.1e}" if "max_logit_error" in findings else "-",
        f"{findings['agreement']:.2%}" if findings.get("decisions") else "-",
    ]


def _gain(entry: EngineEntry) -> list[str]:
    """How much faster than the same degree without quantization."""
    time = entry.latency_ms.get("1", {})
    return [f"{time['unquantized'] / time['p50']:.2f}x" if "unquantized" in time else "-"]


def _loss(entry: EngineEntry) -> list[str]:
    quantization = entry.validation.get("quantization")
    if quantization is None:
        return ["-", "-"]
    left = len(quantization["float_products"])
    return [f"{left} of {left + quantization['products']}", f"{quantization['drop']:+.2f}"]


def _about_quantized(entries: Sequence[EngineEntry]) -> str:
    """What the columns mean, and where quantizing does not pay."""
    quantization = next(entry.validation["quantization"] for entry in entries if "quantization" in entry.validation)
    loses = "points of top-1 against float32" if quantization["drop_of"] == "top1" else "percent of answers that differ"
    text = (f"gain: over the same degree in the fastest float format of the library; in float: products left so; "
            f"loses: {loses}, {quantization['drop_images']} images.")  # fmt: skip
    slower = [
        f"{entry.degree} at batch {batch}"
        for entry in entries
        for batch, time in entry.latency_ms.items()
        if "unquantized" in time and time["p50"] >= time["unquantized"]
    ]
    return f"{text}\nQuantizing does not pay here: degree {', '.join(slower)}." if slower else text


def _idle(entries: Sequence[EngineEntry]) -> str:
    batches = sorted({batch for entry in entries for batch in entry.pays}, key=int)
    idle = {batch: [str(entry.degree) for entry in entries if not entry.pays.get(batch, True)] for batch in batches}
    return ", ".join(f"{', '.join(degrees)} at batch {batch}" for batch, degrees in idle.items() if degrees)


def _speed_up(entry: EngineEntry, time: Mapping[str, float], base: Mapping[str, float]) -> str:
    if "p50" not in time or "p50" not in base:
        return "-"
    text = f"{base['p50'] / time['p50']:.2f}x"
    return text if entry.pays.get("1", True) else f"[red]{text}[/]"


def _scale(entry: EngineEntry, family: Family) -> str:
    return "-" if entry.scale is None or entry.degree == family.source_degree else f"{entry.scale:g}"


def _accuracy(entry: EngineEntry, compensated: bool) -> list[str]:
    names = ("top1_without_compensator", "top1") if compensated else ("top1",)
    values = [entry.accuracy.get(name) for name in names]
    return ["-" if value is None else f"{value:.1%}" for value in values]


def _mib(folder: Path, names: Collection[str]) -> float:
    return sum((folder / name).stat().st_size for name in names if (folder / name).is_file()) / _MIB
