"""The result page: what machine, what was compared, how fast everybody is, and what was not run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from bench.gpu.checks import NOT_RUN, Check
from bench.gpu.speed import Group, Missing
from bench.markdown import spread, table

_CHECKS = """Randomly initialized weights. Decisions (who merges into whom) and logits on noise and patterns, against \
the reference in float32 on the CPU with the same decisions forced on it. The Triton step is compared with the plain \
step on the same GPU, block by block; its error is that of its tokens, as a share of the largest number in them. \
Explained: images in whose blocks another choice was made that is as good to within rounding."""

_SPEED = """Randomly initialized weights, real sizes, noise. At each batch size all contenders took turns in one \
process, at all degrees: ratios within a table are comparable. ms: median of one call, and its quartiles; events: by \
CUDA events, calls queued one right behind the other, images on the device; wall: until the logits are there, images \
and logits bound on the device. All ratios are medians of ratios round by round; in parentheses: quartiles. Speed-up: \
over the same contender at r = 0. Ideal: by multiplications of the whole network. Tax: beyond the same engine that \
drops the last r tokens unseen. Over torch.compile: its time (mode reduce-overhead, which is by CUDA graphs; timm's \
model at r = 0, plain token merging at the others) over this one's. Of the GPU: the multiplications that it does, \
against those of one large matrix product. `ours` leaves out what no logit depends on."""


def page(
    machine: Mapping[str, str],
    command: str,
    date: str,
    checks: Iterable[Check],
    matmul: Mapping[str, float],
    groups: Iterable[Group],
    to_do: Sequence[str],
) -> str:
    """The page in Markdown.

    Args:
        machine: From `machine.describe`.
        command: Without folders.
        date: Of writing.
        checks: All that were made.
        matmul: Precision -> TFLOP/s of a large product.
        groups: All that were measured.
        to_do: What was asked for and has not been measured, one line each.
    """
    checks, groups = list(checks), list(groups)
    facts = ", ".join(f"{name} {value}" for name, value in machine.items() if name != "GPU")
    parts = [f"# Engines on {machine['GPU']}",
             f"Written by `make gpu-check` (`{command}`), {date}: {machine['GPU']}; {facts}.",
             f"## Right?\n\n{_CHECKS}", _check_table(checks)]  # fmt: skip
    rates = ", ".join(f"{rate:.0f} TFLOP/s in {precision}" for precision, rate in matmul.items())
    parts.append(f"## Fast?\n\n{_SPEED}" + (f"\n\nA product of 8192 x 8192 x 8192 reaches {rates}." if rates else ""))
    for group in groups:
        rate = matmul.get(group.precision)
        parts.append(f"### {_title(group)}\n\n{group.date}. The products of its first block reach "
                     f"{group.block_tflops:.0f} TFLOP/s.\n\n{_speed_table(group, rate)}")  # fmt: skip
    lines = [*(f"- {line}" for line in to_do), *_not_run(checks, groups)]
    parts.append("## Not run\n\n" + ("\n".join(lines) or "Everything was."))
    return "\n\n".join(parts) + "\n"


def _title(group: Group) -> str:
    return f"{group.model}, batch {group.batch}, {group.precision}"


def _check_table(checks: Iterable[Check]) -> str:
    columns = ("model", "r", "what", "verdict", "decisions equal", "explained", "unexplained", "error", "allowed", "")
    rows = [
        (each.model, str(each.degree), each.what, each.verdict,
         "" if each.agreement is None else f"{each.agreement:.2%}", str(each.explained), str(each.unexplained),
         "" if each.error is None else f"{each.error:.1e}", "" if each.allowed is None else f"{each.allowed:.1e}",
         each.why)
        for each in checks if each.verdict != NOT_RUN
    ]  # fmt: skip
    return table(columns, rows, text=("model", "what", "verdict", "")) if rows else "Nothing was compared."


def _speed_table(group: Group, rate: float | None) -> str:
    columns = ("r", "contender", "clock", "rounds", "ms", "quartiles", "images/s", "speed-up", "of ideal", "tax",
               "over torch.compile", "TFLOP/s", "of the GPU")  # fmt: skip
    rows = [
        (str(row.degree), row.contender, row.clock, str(row.rounds), f"{row.ms:.3f}", f"{row.low:.3f} - {row.high:.3f}",
         f"{1000 * group.batch / row.ms:.0f}", *_speed_up(row.degree, row.speed_up, row.ideal),
         spread(row.tax, "{:+.1%}"), spread(row.over_compile, "{:.2f}x"), f"{row.tflops:.1f}",
         "" if rate is None else f"{row.tflops / rate:.0%}")
        for row in sorted(group.rows, key=lambda row: (row.degree, row.ms))
    ]  # fmt: skip
    return table(columns, rows, text=("contender", "clock")) if rows else "Nobody ran."


def _speed_up(degree: int, speed_up: float | None, ideal: float) -> tuple[str, str]:
    if not degree or speed_up is None:
        return "", ""
    return f"{speed_up:.2f}x", f"{speed_up / ideal:.0%}"


def _not_run(checks: Iterable[Check], groups: Iterable[Group]) -> list[str]:
    """Who did not run, and why; those with the same reason together."""
    lines = [f"- compared, {line}" for line in _gathered(
        (f"{each.what}, {each.model}", each.degree, each.why) for each in checks if each.verdict == NOT_RUN
    )]  # fmt: skip
    for group in groups:
        lines += [f"- {_title(group)}: {line}" for line in _gathered(map(_parts, group.missing))]
    return lines


def _parts(missing: Missing) -> tuple[str, int, str]:
    return missing.contender, missing.degree, missing.why


def _gathered(found: Iterable[tuple[str, int, str]]) -> list[str]:
    """(who, degree, why), gathered over the degrees."""
    degrees: dict[tuple[str, str], list[str]] = {}
    for who, degree, why in found:
        degrees.setdefault((who, why), []).append(str(degree))
    return [f"{who}, r = {', '.join(some)}: {why}" for (who, why), some in degrees.items()]
