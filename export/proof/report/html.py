"""Reports of a family -> report.html: one page that stands alone, with the plots and what was merged."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

from tocom.export.artifacts import Report
from tocom.export.proof.report.about import About, Pictures
from tocom.export.proof.report.panels import panels, png
from tocom.export.proof.report.pictures import MergePicture, differing
from tocom.export.proof.report.plots import as_svg, block_figure, require_matplotlib
from tocom.export.proof.report.style import STYLE
from tocom.export.proof.report.tables import (
    WORDS,
    Table,
    beside_table,
    block_table,
    degree_table,
    faults_of,
    gate_table,
    in_units,
    meaning_of,
    unit_of,
    verdict,
)

_SIDES = ((24, 280), (48, 224), (0, 168))  # up to so many panels on the page: pixels of each
_MOST_BLOCKS = 12  # that are pictured of one degree; of more, an even selection


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
    sections = [_section(degree, report, pictures.get(degree, ()), side) for degree, report in reports.items()]
    passed, _ = verdict(reports)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{'PASS' if passed else 'FAIL'}: {escape(about.title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{_head(reports, about)}\n{''.join(sections)}{_foot(about)}</main>\n</body>\n</html>\n"
    )


def _head(reports: Mapping[int, Report], about: About) -> str:
    passed, sentence = verdict(reports)
    items = []
    for degree, report in reports.items():
        for place, fault in enumerate(faults_of(report)):
            note = "" if place else f'<span class="note">{escape(_sentence(meaning_of(fault)))}</span>'
            items.append(f'<li><a href="#r{degree}">r={degree}</a> FAILS: {escape(fault)}{note}</li>')
    faults = f"<ul>{''.join(items)}</ul>" if items else ""
    compared = " &middot; ".join(
        escape(each) for each in (about.model, f"{about.candidate} against {about.against}", about.date) if each
    )
    return (
        f'<header><h1>{escape(about.title)}</h1><p class="sub">{compared}</p></header>\n'
        f'<div class="banner {_class(passed)}" role="status"><strong>{"PASS" if passed else "FAIL"}</strong>'
        f"{escape(sentence)}{faults}</div>\n"
        f'<section class="card" aria-label="all degrees"><h2>Degrees</h2>{_table(degree_table(reports), links=True)}'
        '<p class="note">u: unit roundoff of the number format. Worst part: each part of each block by itself, on the '
        "candidate's own input. Logit error: of the image in the middle, the candidate's decisions replayed in the "
        'reference. <a href="#words">All the words</a>.</p></section>'
    )  # fmt: skip


def _section(degree: int, report: Report, pictures: Sequence[MergePicture], side: int) -> str:
    found, faults = report.findings, faults_of(report)
    unit = unit_of(found)
    listed = "".join(f"<li>{escape(fault)}</li>" for fault in faults)
    summary = (
        f"{found['images']} images, {found['decisions']} decisions, {found['precision']} "
        f"(u = {unit:.1e}). Parts may be {in_units(found['part_allowed'], unit)} u off, "
        f"decisions {in_units(found['margin_allowed'], unit)} u worse than the best."
    )
    words = (
        f"Plots of degree {degree}, block by block: {found['explained']} images decided otherwise and explained, "
        f"{found['unexplained']} unexplained; " + (f"faults: {'; '.join(faults)}." if faults else "no faults.")
    )
    plot = as_svg(block_figure(found), f"r{degree}").replace("<svg", f'<svg role="img" aria-label="{escape(words)}"', 1)
    beside = beside_table(found)
    return (
        f'<section class="card" id="r{degree}"><h2>r = {degree} <span class="badge {_class(report.passed)}">'
        f"{'PASS' if report.passed else 'FAIL'}</span></h2>\n"
        + (f'<ul class="faults">{listed}</ul>' if faults else "")
        + f'<p class="note">{escape(summary)}</p>\n<figure>{plot}</figure>\n'
        + (_merges(pictures, side) if len(pictures) == 2 else "")
        + f"<details{'' if report.passed else ' open'}><summary>Numbers of every block, in u</summary>"
        + _table(block_table(found)) + _table(gate_table(found)) + "</details>\n"
        + ("" if beside is None else f"<details><summary>Beside the other engine</summary>{_table(beside)}</details>")
        + "</section>\n"
    )  # fmt: skip


def _merges(pictures: Sequence[MergePicture], side: int) -> str:
    """The reference's picture beside the candidate's, for every block."""
    candidate, reference = pictures
    if not reference.groups:
        return ""
    shown = _selected(list(reference.groups))
    figures = [_pair(reference, candidate, block, side) for block in shown]
    pruning = reference.reduction == "prune"
    what = "What was fused" if pruning else "What was merged"
    how = (
        "Patches that are still tokens of their own show the image; what was fused is grey."
        if pruning
        else "Patches that are still tokens of their own show the image; a group of patches that is one token has its "
        "mean colour, and an outline of one colour wherever it lies."
    )
    marks = (
        "are kept in one and fused in the other"
        if pruning
        else "belong to different groups in the two; each such group has a fill of its own"
    )
    return (
        f"<details open><summary>{what}, block by block, in one image</summary>\n"
        f'<div class="given">{_image(png(candidate.image), "the image, as the network sees it")}<div>'
        f'<p class="note">{how} <span class="swatch">Red outlines</span>: patches that {marks}. Both decide by '
        "themselves here: behind a first difference, more may follow from it.</p></div></div>\n"
        f'<div class="blocks">{"".join(figures)}</div></details>\n'
    )


def _pair(reference: MergePicture, candidate: MergePicture, block: int, side: int) -> str:
    marked = differing(reference, candidate, block)
    if marked is None:
        return f"<figure><figcaption>block {block}: no decision that could be carried out</figcaption></figure>"
    count = int(marked.sum())
    words = "alike" if not count else f'<span class="swatch">{count} of {marked.size} patches differ</span>'
    tokens = len(set(reference.groups[block].ravel().tolist()))
    shown = "".join(
        f"<div>{_image(png(pixels), f'block {block}, {each.name}: {tokens} groups of patches, {count} patches differ')}"
        f"<span>{escape(each.name)}</span></div>"
        for each, pixels in zip((reference, candidate), panels(reference, candidate, block, side), strict=True)
    )
    return (
        f'<figure><figcaption><b>block {block}</b>: {marked.size} patches in {tokens} tokens, {words}</figcaption>'
        f'<div class="pair">{shown}</div></figure>\n'
    )  # fmt: skip


def _selected(blocks: list[int]) -> list[int]:
    """Not more blocks than `_MOST_BLOCKS`, evenly spread, the first and the last among them."""
    if len(blocks) <= _MOST_BLOCKS:
        return blocks
    return [blocks[round(place * (len(blocks) - 1) / (_MOST_BLOCKS - 1))] for place in range(_MOST_BLOCKS)]


def _side(pictures: Pictures) -> int:
    """Pixels of a panel, so that the page stays small."""
    count = sum(len(_selected(list(each.groups))) for both in pictures.values() for each in both)
    return next(side for most, side in _SIDES if count <= most or not most)


def _foot(about: About) -> str:
    made_of = {
        "candidate": escape(about.candidate),
        "against": escape(about.against),
        "checkpoint": _code(about.checkpoint_sha256),
        "compensator": _code(about.compensator_sha256),
        "versions": escape(", ".join(f"{name} {version}" for name, version in about.versions.items())),
        "command": _code(about.command),
    }
    return (
        f'<section class="card" id="words"><h2>Words</h2>{_list({word: escape(each) for word, each in WORDS.items()})}'
        f'</section>\n<section class="card" id="made-of"><h2>What was compared</h2>{_list(made_of)}</section>\n'
    )


def _list(terms: Mapping[str, str]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{value}</dd>' for name, value in terms.items() if value)}</dl>"


def _code(text: str | None) -> str:
    return f"<code>{escape(text)}</code>" if text else ""


def _table(table: Table, *, links: bool = False) -> str:
    rows = []
    for row in table.rows:
        cells = []
        for place, cell in enumerate(row):
            kind = ' class="fail"' if cell.failing else ' class="ok"' if cell.text == "pass" else ""
            text = f'<a href="#r{cell.text}">{escape(cell.text)}</a>' if links and not place else escape(cell.text)
            cells.append(f"<td{kind}>{text}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    if table.gate is not None:
        rows.append(f'<tr class="gate">{"".join(f"<td>{escape(each)}</td>" for each in table.gate)}</tr>')
    header = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.header)
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _image(content: bytes, words: str) -> str:
    return f'<img src="data:image/png;base64,{base64.b64encode(content).decode()}" alt="{escape(words)}">'


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:] + "." if words else ""


def _class(passed: bool) -> str:
    return "pass" if passed else "fail"
