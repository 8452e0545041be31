"""What validation found -> figures (matplotlib): what every block decides and how far its numbers are off, and merges.

Errors and margins are in unit roundoffs u of the number format, as the gates are.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tocom.export.proof.findings import BlockFindings, Findings, NetworkGate
from tocom.export.proof.gates import GATES
from tocom.export.proof.parts import PARTS
from tocom.export.proof.report.panels import panels
from tocom.export.proof.report.pictures import MergePicture, differing
from tocom.runtime.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = "#123457"  # of text and axes: what `as_svg` lets the page choose
_EQUAL, _EXPLAINED, _FAULT, _GATE, _OUTPUT = "#3a9d6e", "#4a8fd4", "#e11d2e", "#d9822b", "#8b6fc9"
_LOOKS = {  # part -> marker, colour
    "embedding": ("s", "#8a8f98"), "attention": ("o", "#4a8fd4"), "signal": ("v", "#8b6fc9"),
    "reduction": ("D", "#3a9d6e"), "mlp": ("^", "#d9a22b"), "head": ("P", "#8a8f98"),
}  # fmt: skip
_STYLE: dict[str, Any] = {
    "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.alpha": 0.25, "grid.linewidth": 0.6, "legend.frameon": False, "legend.fontsize": 8, "svg.fonttype": "none",
    "svg.hashsalt": "tocom", "savefig.transparent": True,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color",
                     "ytick.color", "grid.color"), _INK),
}  # fmt: skip
_LOGIT_GATES = (NetworkGate.MEDIAN_LOGITS, NetworkGate.WORST_LOGITS)
_FLOOR = 1e-3  # u; what is smaller stands there
_MANY = 16  # ticks of an axis of blocks


def require_matplotlib() -> None:
    """Checks that figures can be drawn.

    Raises:
        InputError: If matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("the page of a report is drawn with matplotlib, which is not installed: "
                         "pip install 'tocom[report]'") from None  # fmt: skip


@contextmanager
def _styled() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def block_figure(findings: Findings) -> Figure:
    """Agreement, errors of parts, margins and errors of outputs of every block of one degree.

    Where nothing is decided there are no plots of decisions.

    Args:
        findings: Of the degree.
    """
    with _styled():
        from matplotlib.figure import Figure

        draws = (_agreement, _parts, _margins, _outputs) if _deciding(findings) else (_parts, _outputs)
        figure = Figure(figsize=(10.4, 3.1 * len(draws) / 2))
        edge = 0.36 / figure.get_figheight()  # inches
        figure.subplots_adjust(left=0.072, right=0.99, top=1 - edge, bottom=1.4 * edge, wspace=0.16, hspace=0.42)
        for draw, axes in zip(draws, figure.subplots(len(draws) // 2, 2).flat, strict=True):
            _block_axis(axes, list(findings.blocks))
            draw(axes, findings)
        return figure


def _deciding(findings: Findings) -> dict[int, BlockFindings]:
    """The blocks in which something is decided."""
    return {index: block for index, block in findings.blocks.items() if block.decisions or block.unexplained}


def _agreement(axes: Axes, findings: Findings) -> None:
    """Bars that hang from 100%: how much is decided otherwise, and how many images do."""
    axes.set(title="Decisions equal to the reference's", ylabel="agreement, %")
    deciding = _deciding(findings)
    shares = {index: 100 * block.equal / max(1, block.decisions) for index, block in deciding.items()}
    deepest = max(1.0, 100 - min(shares.values()))
    axes.set_ylim(100 - 1.4 * deepest, 100 + 0.12 * deepest)
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= 100])
    axes.set_ylim(100 - 1.4 * deepest, 100 + 0.12 * deepest)
    for index, block in deciding.items():
        if shares[index] < 100:
            axes.bar(index, shares[index] - 100, 0.62, bottom=100, color=_verdict(block))
        else:
            axes.plot(index, 100, "o", markersize=6, color=_verdict(block), zorder=3)
        words = [f"{block.explained}"] if block.explained else []
        words += [f"{block.unexplained}!"] if block.unexplained else []
        axes.annotate(" + ".join(words), (index, shares[index]), (0, -5), textcoords="offset points", ha="center",
                      va="top", fontsize=8, color=_verdict(block), fontweight="bold")  # fmt: skip
    axes.axhline(100, color=_INK, linewidth=0.8)
    _legend(axes, {"all equal": ("o", _EQUAL), "n images differ, explained": ("s", _EXPLAINED),
                   "n! unexplained": ("s", _FAULT)}, loc="lower left", ncols=3)  # fmt: skip


def _verdict(block: BlockFindings) -> str:
    """The colour of a block's decisions."""
    return _FAULT if block.unexplained else _EXPLAINED if block.explained else _EQUAL


def _parts(axes: Axes, findings: Findings) -> None:
    """Every part of every block by itself, and the gate."""
    unit, gate = _unit(findings), findings.part_allowed / _unit(findings)
    axes.set(title="Error of each part, on the candidate's own input", ylabel="error, u", yscale="log")
    parts = [part for part in PARTS if any(part in block.parts for block in findings.blocks.values())]
    errors = [error / unit for block in findings.blocks.values() for error in block.parts.values()]
    top = _top([*errors, gate])
    for place, part in enumerate(parts):
        marker, colour = _LOOKS[part]
        shift = 0.62 * ((place + 0.5) / len(parts) - 0.5)
        for index, block in findings.blocks.items():
            if part in block.parts:
                at, shown = index + shift, _shown(axes, index + shift, block.parts[part] / unit, top)
                axes.plot(at, shown, marker, color=colour, markersize=5, alpha=0.9)
                if not block.parts[part] <= findings.part_allowed:
                    axes.plot(at, shown, "o", markersize=12, markerfacecolor="none", markeredgecolor=_FAULT,
                              markeredgewidth=1.8)  # fmt: skip
    _gate(axes, gate)
    _log_axis(axes, [*errors, gate], top)
    _legend(axes, {part: _LOOKS[part] for part in parts}, loc="lower left", ncols=6, columnspacing=0.9)


def _margins(axes: Axes, findings: Findings) -> None:
    """How much worse than the best the worst decision is, and the gate."""
    unit, gate = _unit(findings), findings.margin_allowed / _unit(findings)
    axes.set(title="Margin of the decisions that differ", ylabel="worse than the best by, u")
    margins = {index: block.margin / unit for index, block in _deciding(findings).items()}
    top = _top([*margins.values(), gate])
    if top > 2 * gate:
        axes.set_yscale("symlog", linthresh=gate, linscale=0.6)
        first, last = math.ceil(math.log10(gate) + 0.3), math.floor(math.log10(top))
        axes.set_yticks([0, *(10.0**power for power in range(first, last + 1, 1 + (last - first) // 5))])
        axes.minorticks_off()
    axes.set_ylim(-0.05 * gate, 4 * top if top > 2 * gate else 1.25 * gate)
    axes.yaxis.set_major_formatter(_plain)
    for index, block in _deciding(findings).items():
        value = _shown(axes, index, margins[index], top) if block.margin else 0.0
        axes.vlines(index, 0, value, color=_verdict(block), linewidth=2.4)
        axes.plot(index, value, "o", color=_verdict(block), markersize=6)
    _gate(axes, gate)


def _outputs(axes: Axes, findings: Findings) -> None:
    """The tokens that leave every block, and the logits with their gates, decisions replayed."""
    unit = _unit(findings)
    axes.set(title="Error of what leaves each block, decisions replayed", ylabel="error, u", yscale="log")
    errors = {index: block.output_error / unit for index, block in findings.blocks.items()
              if block.output_error is not None}  # fmt: skip
    measured = [findings.gates[name] for name in _LOGIT_GATES if name in findings.gates]
    logits = [(gate.found / unit, gate.allowed / unit) for gate in measured]
    values = [*errors.values(), *(value for pair in logits for value in pair)]
    top = _top(values)
    shown = [_shown(axes, index, error, top) for index, error in errors.items()]
    if shown:
        axes.plot(list(errors), shown, "-o", color=_OUTPUT, markersize=5, linewidth=1.4, label="tokens")
    behind = max((index for index in findings.blocks), default=0) + 1
    for place, (error, allowed) in enumerate(logits):  # of the image in the middle, then of the worst
        at, hidden = behind + 0.7 * place, "_" * place  # an underscore keeps out of the legend
        axes.plot(at, _shown(axes, at, error, top), "D", color=_EQUAL if error <= allowed else _FAULT, markersize=6,
                  label=f"{hidden}logits: middle, worst image")  # fmt: skip
        axes.hlines(allowed, at - 0.3, at + 0.3, color=_GATE, linewidth=2, linestyle=(0, (3, 1)),
                    label=f"{hidden}their gates")  # fmt: skip
    axes.set_xlim(right=behind + 1.2)
    axes.set_xticks([*axes.get_xticks(), behind + 0.35], [*axes.get_xticks(), "logits"])
    _log_axis(axes, values, top)
    if values:
        axes.legend(loc="lower left", ncols=3)


def _unit(findings: Findings) -> float:
    return GATES[findings.precision].unit_roundoff


def _top(values: Sequence[float]) -> float:
    """The largest number to be shown: above the finite ones where some are not."""
    finite = [value for value in values if math.isfinite(value)]
    return max([_FLOOR, *finite]) * (1 if len(finite) == len(values) else 30)


def _shown(axes: Axes, at: float, value: float, top: float) -> float:
    """Where a number stands in a plot: one that is none, at the top, and says so."""
    if math.isfinite(value):
        return max(value, _FLOOR)
    axes.annotate("not finite", (at, top), (0, 7), textcoords="offset points", ha="center", va="bottom", fontsize=7,
                  color=_FAULT)  # fmt: skip
    return top


def _log_axis(axes: Axes, values: Sequence[float], top: float) -> None:
    """Room below for the legend, above for the gate."""
    from matplotlib.ticker import LogLocator

    low = min([max(value, _FLOOR) for value in values if math.isfinite(value)], default=_FLOOR)
    axes.set_ylim(low / (top / low) ** 0.3 / 1.5, top * (top / low) ** 0.12 * 1.5)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if top / low < 100 else (1,), numticks=7))
    axes.yaxis.set_major_formatter(_plain)
    axes.minorticks_off()


def _plain(value: float, _place: float) -> str:
    return f"{value:g}" if value == 0 or 1e-3 <= value < 1e5 else f"{value:.0e}".replace("e+0", "e").replace("e+", "e")


def _gate(axes: Axes, value: float) -> None:
    axes.axhline(value, color=_GATE, linewidth=1.4, linestyle="--")
    axes.annotate(f"gate {value:g} u", (1, value), (-2, 3), xycoords=("axes fraction", "data"),
                  textcoords="offset points", ha="right", va="bottom", color=_GATE, fontsize=8)  # fmt: skip


def _legend(axes: Axes, looks: Mapping[str, tuple[str, str]], **how: Any) -> None:
    handles = [
        axes.plot([], [], marker, color=colour, markersize=5, label=name)[0] for name, (marker, colour) in looks.items()
    ]
    axes.legend(handles=handles, handletextpad=0.2, borderaxespad=0.2, **how)


def _block_axis(axes: Axes, blocks: Sequence[int]) -> None:
    axes.set_xticks(blocks[:: math.ceil(len(blocks) / _MANY) or 1])
    axes.set_xlim(min(blocks, default=0) - 0.6, max(blocks, default=0) + 0.6)
    axes.set_xlabel("block")
    axes.grid(visible=False, axis="x")


def merge_figure(one: MergePicture, other: MergePicture, blocks: Sequence[int] = ()) -> Figure:
    """Which patches became one, a row for every block, one decider beside the other.

    Args:
        one: Left, the reference.
        other: Right, the candidate.
        blocks: Which; empty for the first twelve that both decided.
    """
    shown = list(blocks) or [block for block in one.groups if block in other.groups][:12]
    with _styled():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.2, 3.15 * len(shown) + 0.3), layout="constrained")
        rows = figure.subplots(len(shown), 2, squeeze=False)
        for row, block in zip(rows, shown, strict=True):
            marked = differing(one, other, block)
            count = 0 if marked is None else int(marked.sum())
            words = "alike" if not count else f"{count} of {one.groups[block].size} patches differ"
            for axes, pixels, name in zip(row, panels(one, other, block), (one.name, other.name), strict=True):
                axes.imshow(pixels, interpolation="nearest")
                axes.set_axis_off()
                axes.set_title(name, fontsize=9)
            row[0].set_title(f"block {block}: {one.name}", fontsize=9)
            row[1].set_title(words, fontsize=8, loc="right", color=_FAULT if count else _EQUAL)
        return figure


def as_svg(figure: Figure, prefix: str) -> str:
    """A figure as an element of a page, whose text is the page's.

    Args:
        figure: Which.
        prefix: Of every id in it, so that no two figures of a page share one.
    """
    file = io.StringIO()
    with _styled():
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    head, behind, rest = svg.partition(">")
    head = re.sub(r'\s(?:xmlns(?::\w+)?|width|height|version)="[^"]*"', "", head)
    rest = re.sub(r'\bid="', f'id="{prefix}-', rest)
    rest = rest.replace("url(#", f"url(#{prefix}-").replace('xlink:href="#', f'href="#{prefix}-')
    return (head + behind + rest).replace(_INK, "currentColor")


def as_png(figure: Figure, dpi: int = 110) -> bytes:
    """A figure as a PNG file on white."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi, facecolor="white", transparent=False, metadata={"Software": None})
    return file.getvalue()
