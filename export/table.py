"""The table that a compile ends with, and that `tocom inspect` shows."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from rich.table import Table

from runtime.manifest import EngineEntry, Family

_MIB = 1 << 20


def family_table(family: Family, folder: Path, degrees: Collection[int] | None = None) -> Table:
    """One row per degree.

    Args:
        family: The family.
        folder: Where its files lie.
        degrees: Rows to show; None shows all.
    """
    entries = [entry for entry in family.engines if degrees is None or entry.degree in degrees]
    labelled = next((entry.accuracy["images"] for entry in entries if "images" in entry.accuracy), None)
    compensated = family.compensator_sha256 is not None
    table = Table(title=f"{family.model}, {entries[0].backend} {entries[0].precision}" if entries else family.model)
    for name in ("degree", "tokens", "GMACs", "MiB", "ms p50", "p99", "speed-up", "logit error", "agreement"):
        table.add_column(name, justify="right")
    if labelled and compensated:
        table.add_column("top-1 merging only", justify="right")
        table.add_column("with compensator", justify="right")
    elif labelled:
        table.add_column("top-1", justify="right")
    baseline = next((entry for entry in family.engines if entry.degree == 0), None)
    for entry in entries:
        table.add_row(*_row(entry, baseline, folder), *(_accuracy(entry, compensated) if labelled else ()))
    notes = [
        "ms: batch 1 on this machine, all degrees measured in one interleaved run; MiB: all files the degree reads."
    ]
    stored = {name for entry in family.engines for name in entry.sha256}
    notes.append(f"Weights that are equal are stored once: {_mib(folder, stored):.1f} MiB on disk in all.")
    if labelled:
        notes.append(
            f"top-1: {labelled:.0f} images" + (f", source degree {family.source_degree}." if compensated else ".")
        )
    table.caption = "\n".join(notes)
    table.caption_justify = "left"
    return table


def _row(entry: EngineEntry, baseline: EngineEntry | None, folder: Path) -> list[str]:
    time = entry.latency_ms.get("1", {})
    base = baseline.latency_ms.get("1", {}) if baseline else {}
    found = entry.validation
    return [
        str(entry.degree),
        f"{entry.tokens[0]} -> {entry.tokens[-1]}",
        f"{entry.gmacs:.3g}",
        f"{_mib(folder, entry.sha256):.1f}",
        f"{time['p50']:.2f}" if "p50" in time else "-",
        f"{time['p99']:.2f}" if "p99" in time else "-",
        f"{base['p50'] / time['p50']:.2f}x" if "p50" in time and "p50" in base else "-",
        f"{found['max_logit_error']:.1e}" if "max_logit_error" in found else "-",
        f"{found['agreement']:.2%}" if found.get("decisions") else "-",
    ]


def _accuracy(entry: EngineEntry, compensated: bool) -> list[str]:
    names = ("top1_without_compensator", "top1") if compensated else ("top1",)
    values = [entry.accuracy.get(name) for name in names]
    return ["-" if value is None else f"{value:.1%}" for value in values]


def _mib(folder: Path, names: Collection[str]) -> float:
    return sum((folder / name).stat().st_size for name in names if (folder / name).is_file()) / _MIB
