"""Reports of a family -> report.html: one page that stands alone, with the plots and what was merged.

`report.html.j2` is the page, `report.css` its looks; this file prepares what they show.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import escape

from tocom.export.artifacts import Report
from tocom.export.proof.report.about import About, Pictures
from tocom.export.proof.report.panels import panels, png
from tocom.export.proof.report.pictures import MergePicture, differing
from tocom.export.proof.report.plots import as_svg, block_figure, require_matplotlib
from tocom.export.proof.report.tables import (
    WORDS,
    Table,
    beside_table,
    block_table,
    degree_table,
    faults_of,
    gate_table,
    in_units,
    unit_of,
    verdict,
)

_HERE = Path(__file__).resolve().parent
_SIDES = ((24, 280), (48, 224), (0, 168))  # up to so many panels on the page: pixels of each
_MOST_BLOCKS = 12  # that are pictured of one degree; of more, an even selection


@dataclass(frozen=True)
class _Section:
    """One degree on the page."""

    degree: int
    passed: bool
    faults: list[str]
    summary: str
    plot: str
    merged: _Merged | None
    blocks: Table
    gates: Table
    beside: Table | None


@dataclass(frozen=True)
class _Merged:
    """What became of the patches of one image; pictures are data addresses."""

    pruning: bool
    image: str
    blocks: list[_Block]


@dataclass(frozen=True)
class _Block:
    """One block of it; `differing` is None where a decision could not be carried out."""

    index: int
    patches: int = 0
    tokens: int = 0
    differing: int | None = None
    panels: tuple[tuple[str, str], ...] = ()


def to_html(reports: Mapping[int, Report], about: About, pictures: Pictures) -> str:
    """The page: no scripts, and nothing that is fetched from elsewhere.

    Args:
        reports: Degree -> report.
        about: What they are about.
        pictures: See `tocom.export.proof.report.write.write_report`.

    Raises:
        InputError: If matplotlib is not installed.
    """
    require_matplotlib()
    side = _side(pictures)
    passed, sentence = verdict(reports)
    loader = jinja2.FileSystemLoader(_HERE)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, loader=loader)
    return environment.get_template("report.html.j2").render(
        style=(_HERE / "report.css").read_text(),
        about=about,
        passed=passed,
        sentence=sentence,
        faulty=_faulty(reports),
        degrees=degree_table(reports),
        sections=[_section(degree, report, pictures.get(degree, ()), side) for degree, report in reports.items()],
        words=WORDS,
        made_of={
            "candidate": about.candidate,
            "against": about.against,
            "checkpoint": about.checkpoint_sha256,
            "compensator": about.compensator_sha256,
            "versions": ", ".join(f"{name} {version}" for name, version in about.versions.items()),
            "command": about.command,
        },
    )


def _faulty(reports: Mapping[int, Report]) -> list[tuple[int, str, str]]:
    """Degree, fault, and what the first fault of each degree means."""
    return [
        (degree, fault.text, "" if place else _sentence(fault.meaning))
        for degree, report in reports.items()
        for place, fault in enumerate(faults_of(report))
    ]


def _section(degree: int, report: Report, pictures: Sequence[MergePicture], side: int) -> _Section:
    findings, faults = report.findings, [fault.text for fault in faults_of(report)]
    unit = unit_of(findings)
    summary = (
        f"{findings.images} images, {findings.decisions} decisions, {findings.precision} "
        f"(u = {unit:.1e}). Parts may be {in_units(findings.part_allowed, unit)} u off, "
        f"decisions {in_units(findings.margin_allowed, unit)} u worse than the best."
    )
    words = (
        f"Plots of degree {degree}, block by block: {findings.explained} images decided otherwise and explained, "
        f"{findings.unexplained} unexplained; " + (f"faults: {'; '.join(faults)}." if faults else "no faults.")
    )
    plot = as_svg(block_figure(findings), f"r{degree}")
    return _Section(
        degree=degree,
        passed=report.passed,
        faults=faults,
        summary=summary,
        plot=plot.replace("<svg", f'<svg role="img" aria-label="{escape(words)}"', 1),
        merged=_merged(pictures, side) if len(pictures) == 2 else None,
        blocks=block_table(findings),
        gates=gate_table(findings),
        beside=beside_table(findings),
    )


def _merged(pictures: Sequence[MergePicture], side: int) -> _Merged | None:
    """The reference's picture beside the candidate's, for every block."""
    candidate, reference = pictures
    if not reference.groups:
        return None
    return _Merged(
        pruning=reference.reduction == "prune",
        image=_address(png(candidate.image)),
        blocks=[_block(reference, candidate, block, side) for block in _selected(list(reference.groups))],
    )


def _block(reference: MergePicture, candidate: MergePicture, block: int, side: int) -> _Block:
    marked = differing(reference, candidate, block)
    if marked is None:
        return _Block(block)
    shown = zip((reference, candidate), panels(reference, candidate, block, side), strict=True)
    return _Block(
        index=block,
        patches=marked.size,
        tokens=len(set(reference.groups[block].ravel().tolist())),
        differing=int(marked.sum()),
        panels=tuple((picture.name, _address(png(pixels))) for picture, pixels in shown),
    )


def _selected(blocks: list[int]) -> list[int]:
    """Not more blocks than `_MOST_BLOCKS`, evenly spread, the first and the last among them."""
    if len(blocks) <= _MOST_BLOCKS:
        return blocks
    return [blocks[round(place * (len(blocks) - 1) / (_MOST_BLOCKS - 1))] for place in range(_MOST_BLOCKS)]


def _side(pictures: Pictures) -> int:
    """Pixels of a panel, so that the page stays small."""
    count = sum(len(_selected(list(picture.groups))) for both in pictures.values() for picture in both)
    return next(side for most, side in _SIDES if count <= most or not most)


def _address(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:] + "." if words else ""
