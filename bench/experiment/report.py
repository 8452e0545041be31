"""docs/experiment.md and its pictures, from the results alone: no number in it is typed by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.experiment.figures import draw_degrees, draw_frontier, draw_transfer
from bench.experiment.protocol import METHODS
from bench.experiment.statistics import Gain, at_equal_latency, chosen, gain_over_checkpoints
from bench.experiment.tasks import TASKS

Results = Mapping[str, Any]


def write_report(results: Results, page: Path, pictures: Path) -> None:
    """Writes the page, and the pictures beside it.

    Args:
        results: As `bench.experiment.__main__` gathers them.
        page: Markdown file.
        pictures: Folder for PNG files, below the page's folder.
    """
    pictures.mkdir(parents=True, exist_ok=True)
    link = pictures.relative_to(page.parent)
    parts = [
        _protocol(results),
        _verdicts(results),
        _pretraining(results),
        _downstream(results, pictures, link),
        _per_task(results),
        _methods(results),
        _frontier(results, pictures, link),
        _transfer(results, pictures, link),
        _cost(results),
    ]
    page.write_text("\n\n".join(part for part in parts if part) + "\n")


def gains(results: Results, tasks: Iterable[str], source: int, method: str = "constant") -> dict[int, Gain]:
    """Target degree -> gain over the checkpoints of some tasks at a source degree."""
    assessed = chosen(results["outcomes"], tasks, source, method)
    targets = results["protocol"]["targets"]
    return {target: gain_over_checkpoints(assessed, source, target) for target in targets} if assessed else {}


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---:"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _signed(gain: Gain) -> str:
    return f"{gain.gain:+.1f} [{gain.low:+.1f}, {gain.high:+.1f}]"


def _share(gain: Gain) -> str:
    return "-" if gain.recovered is None else f"{gain.recovered:.0%}"


def _protocol(results: Results) -> str:
    protocol, machine = results["protocol"], results["machine"]
    network = protocol["model"]
    tasks = "\n".join(f"  - `{name}`: {TASKS[name].asks}" for name in protocol["tasks"])
    small = "" if protocol["name"] == "small" else f" (preset `{protocol['name']}`)"
    return f"""# The paper's experiment, at a scale that fits a small machine{small}

Written by `make experiment`; every number below comes from its results file,
[bench/results/experiment-{protocol["name"]}.json](../bench/results/experiment-{protocol["name"]}.json).

## Protocol

Sheets of 4x4 glyphs, 32x32 pixels; with a patch size of 4 a glyph is four tokens, and every token matters. The digits
are scikit-learn's scans of real handwriting; scans, drawings of letters and parts of photographs are split into
training, validation and test before anything else.

- Backbone: ViT of width {network["embed_dim"]}, {network["depth"]} blocks, 65 tokens; {protocol["pretraining_steps"]}
  steps of 64 sheets of `ink`: {TASKS["ink"].asks}.
- Compensators: one for each of the methods ({", ".join(protocol["methods"])}), rank 2 in each of 16 groups, trained by
  the code of `tocom distill` for {protocol["distill_steps"]} steps of 64 of the backbone's own training sheets. They
  never see a downstream sheet.
- Downstream: the backbone with a new head, fine-tuned for {protocol["finetune_steps"]} steps at source degree
  {", ".join(map(str, protocol["sources"]))}; seeds {", ".join(map(str, protocol["seeds"]))}:
{tasks}
- Each checkpoint runs at degrees {", ".join(map(str, protocol["targets"]))}, as it is and with the compensator fused
  into its weights, so at the same inference cost. The scale is chosen from {", ".join(map(str, protocol["scales"]))}
  for each checkpoint and degree on {protocol["val_sheets"]} validation sheets; what is reported is measured on
  {protocol["test_sheets"]} test sheets.
- Intervals are 95%, of the mean gain over checkpoints (tasks x seeds, Student's t); for the single backbone, over its
  test sheets.

Run on {machine["date"]}: {machine["processor"]}, {machine["cores"]} cores, {machine["device"]}; Python
{machine["python"]}, torch {machine["torch"]}, timm {machine["timm"]}, onnxruntime {machine["onnxruntime"]}."""


def _verdicts(results: Results) -> str:
    protocol = results["protocol"]
    top = max(protocol["targets"])
    ink, down = gains(results, ["ink"], 0)[top], gains(results, protocol["tasks"], 0)
    back = gains(results, protocol["tasks"], top)[0]

    rows = [
        (f"pre-training task, 0 -> {top}: loses at least 3 points", f"{ink.loss:.1f}", _verdict(ink.loss >= 3)),
        ("... and gets at least 30% of them back", _share(ink), _verdict((ink.recovered or 0) >= 0.3)),
        (f"downstream mean, 0 -> {top}: loses at least 3", f"{down[top].loss:.1f}", _verdict(down[top].loss >= 3)),
        ("... and gets at least 15% of them back", _share(down[top]), _verdict((down[top].recovered or 0) >= 0.15)),
        _above_zero(results, "source degree 0", (0,)),
        _above_zero(results, "the other source degrees", [each for each in protocol["sources"] if each]),
        (f"mismatched source {top} -> 0 is helped as well", _signed(back), _verdict(back.low > 0)),
    ]  # fmt: skip
    return "## What was expected, and what came out\n\n" + _table(("expected", "measured", "holds"), rows)


def _verdict(holds: bool) -> str:
    return "yes" if holds else "**no**"


def _above_zero(results: Results, named: str, sources: Iterable[int]) -> tuple[str, str, str]:
    """Whether the compensator helps at every mismatched degree from 8 up, as a row of the table."""
    gain_of = {
        f"{source} -> {target}": gain
        for source in sources
        for target, gain in gains(results, results["protocol"]["tasks"], source).items()
        if target >= 8 and target != source
    }
    weak = [degrees for degrees, gain in gain_of.items() if gain.low <= 0]
    told = f"{len(gain_of) - len(weak)} of {len(gain_of)}" + (f"; not {', '.join(weak)}" if weak else "")
    return f"{named}: gain above zero (95%) at every mismatched degree from 8 up", told, _verdict(not weak)


def _pretraining(results: Results) -> str:
    return f"## The pre-training task, source degree 0\n\n{_gain_table(gains(results, ['ink'], 0))}"


def _gain_table(found: Mapping[int, Gain], source: int = 0) -> str:
    rows = [
        (str(target), f"{gain.plain:.1f}", f"{gain.compensated:.1f}", _signed(gain), f"{gain.loss:.1f}", _share(gain))
        for target, gain in found.items()
        if target != source
    ]
    matched = next(iter(found.values())).matched
    header = ("target degree", "as it is, %", "with ToCom, %", "gain [95%]", "lost without", "given back")
    return f"At its own degree {source}: {matched:.1f}%.\n\n" + _table(header, rows)


def _downstream(results: Results, pictures: Path, link: Path) -> str:
    protocol = results["protocol"]
    found = {source: gains(results, protocol["tasks"], source) for source in protocol["sources"]}
    draw_degrees({f"fine-tuned at r = {source}": each for source, each in found.items()}, pictures / "degrees.png")
    count = next(iter(found[0].values())).count
    title = f"## Downstream, mean of {count} checkpoints for each source degree"
    parts = [f"{title}\n\n![top-1 against degree]({link}/degrees.png)"]
    parts += [f"### Source degree {source}\n\n{_gain_table(each, source)}" for source, each in found.items()]
    return "\n\n".join(parts)


def _per_task(results: Results) -> str:
    protocol = results["protocol"]
    rows = []
    for task in protocol["tasks"]:
        for source in protocol["sources"]:
            each = gains(results, [task], source)
            shown = [target for target in (0, 8, 12, 16) if target != source and target in each]
            cells = {target: f"{each[target].plain:.1f} -> {each[target].compensated:.1f}" for target in shown}
            own = f"{each[source].plain:.1f}"
            rows.append([task, str(source), own, *(cells.get(target, "own") for target in (0, 8, 12, 16))])
    header = ("task", "source", "at its own degree", "r = 0", "r = 8", "r = 12", "r = 16")
    return "## Each task: top-1 as it is -> with ToCom, mean over seeds\n\n" + _table(header, rows)


def _methods(results: Results) -> str:
    protocol = results["protocol"]
    if len(protocol["methods"]) == 1:
        return ""
    rows = []
    for method in protocol["methods"]:
        for label, tasks in (("ink", ["ink"]), ("downstream", protocol["tasks"])):
            each = gains(results, tasks, 0, method)
            cells = [f"{each[target].plain:.1f} -> {each[target].compensated:.1f}, {_share(each[target])}"
                     for target in (8, 12, 16) if target in each]  # fmt: skip
            rows.append([method, label, *cells])
    header = ("method", "task", "r = 8", "r = 12", "r = 16")
    return ("## Other ways of removing tokens, source degree 0\n\nEach with a compensator of its own, and the share of "
            "the loss that is given back.\n\n" + _table(header, rows))  # fmt: skip


def _frontier(results: Results, pictures: Path, link: Path) -> str:
    latency = results.get("latency")
    if not latency or "strided" not in results["protocol"]["methods"]:
        return ""
    protocol, parts = results["protocol"], ["## Constant against strided: accuracy at equal measured latency"]
    methods = [method for method in ("constant", "strided") if method in protocol["methods"]]
    accuracy = {method: gains(results, protocol["tasks"], 0, method) for method in methods}
    parts.append(f"The strided schedule, `{METHODS['strided'].schedule}`, removes as many tokens in larger steps. "
                 f"{results['machine']['engine']}, mean top-1 of the downstream tasks; all engines timed in one "
                 "interleaved run, medians.")  # fmt: skip
    for batch, times in latency.items():
        curves = {
            method: [(times[f"{method} {target}"]["p50"], gain.plain, gain.compensated)
                     for target, gain in accuracy[method].items()]
            for method in methods
        }  # fmt: skip
        picture = f"frontier-{batch}.png"
        draw_frontier(curves, f"batch {batch}", pictures / picture)
        parts.append(
            f"### Batch {batch}\n\n![accuracy against latency]({link}/{picture})\n\n" + _versus(curves, accuracy)
        )
    return "\n\n".join(parts)


def _versus(
    curves: Mapping[str, Sequence[tuple[float, float, float]]], accuracy: Mapping[str, Mapping[int, Gain]]
) -> str:
    """The strided engines against the constant family at the same time, and from which degree on they win."""
    times, plain, compensated = zip(*curves["constant"], strict=True)
    baseline = times[0]
    strided_times = [point[0] for point in curves["strided"]]
    against_plain = at_equal_latency(times, plain, strided_times)
    against = at_equal_latency(times, compensated, strided_times)
    rows, better, faster = [], [], []
    for index, target in enumerate(accuracy["strided"]):
        time, bare, with_tocom = curves["strided"][index]
        same = accuracy["constant"][target]

        def versus(value: float, other: float | None) -> str:
            return "faster than any constant" if other is None else f"{value - other:+.1f}"

        if target:
            rows.append((str(target), f"{times[index]:.2f}", f"{baseline / times[index]:.2f}x",
                         f"{same.plain:.1f} / {same.compensated:.1f}", f"{time:.2f}", f"{baseline / time:.2f}x",
                         f"{bare:.1f} / {with_tocom:.1f}", versus(bare, against_plain[index]),
                         versus(with_tocom, against[index])))  # fmt: skip
            if against[index] is None:
                faster.append(target)
            elif with_tocom > against[index]:
                better.append(target)
    header = ("r", "constant ms", "speed-up", "top-1 plain / ToCom", "strided ms", "speed-up", "top-1 plain / ToCom",
              "strided at equal ms, plain", "with ToCom")  # fmt: skip
    better_at, faster_at = (", ".join(map(str, found)) for found in (better, faster))
    told = (f"With compensators, strided is more accurate than constant in the same time at r = {better_at}." if better
            else "With compensators, strided is nowhere more accurate than constant in the same time.")  # fmt: skip
    if faster:
        told += f" At r = {faster_at} it is faster than constant gets at any degree."
    return _table(header, rows) + f"\n\n{told}"


def _transfer(results: Results, pictures: Path, link: Path) -> str:
    tables = results["transfer"]
    if not tables:
        return ""
    tasks, columns = list(tables[0]), list(tables[0][next(iter(tables[0]))])
    mean = {onto: {gap: sum(table[onto][gap] for table in tables) / len(tables) for gap in columns} for onto in tasks}
    draw_transfer(mean, pictures / "transfer.png")
    top = max(results["protocol"]["sources"])
    rows = [(onto, *(f"{mean[onto][gap]:.1f}" for gap in columns)) for onto in tasks]
    names = {"none": "nothing added", "own": f"fine-tuned at {top}"}
    header = ("added on", *(names.get(gap, f"gap of {gap}") for gap in columns))
    told = f"""## The gap between degrees, carried from task to task

The weights of the blocks fine-tuned at degree {top} minus those fine-tuned at 0 on one task, added to the checkpoint of
another task that was fine-tuned at 0 and runs at {top}; top-1, mean over seeds. Where that helps, one compensator can
serve many tasks (ToCom, section 3.2).

![gaps carried over]({link}/transfer.png)"""
    return f"{told}\n\n{_table(header, rows)}"


def _cost(results: Results) -> str:
    seconds = results["seconds"]
    groups: dict[str, list[float]] = {}
    for name, time in seconds.items():
        stem = name.rsplit(".", 1)
        kind = ("pre-training the backbone" if name.startswith("backbone")
                else f"distilling the {stem[0].partition('-')[2]} compensator" if name.startswith("compensator")
                else "fine-tuning a checkpoint" if stem[1] == "safetensors"
                else "carrying gaps over" if name.startswith("transfer")
                else "compiling and timing two families" if name.startswith("latency")
                else "assessing a checkpoint with one method")  # fmt: skip
        groups.setdefault(kind, []).append(time)
    rows = [(kind, str(len(times)), f"{sum(times) / len(times):.0f}", f"{sum(times) / 60:.1f}")
            for kind, times in groups.items()]  # fmt: skip
    return ("## What it cost\n\nStages run side by side, one per core with one thread each (the backbone with all), so "
            "that the sum exceeds the time that passed. Wall-clock seconds, whatever else the machine did meanwhile: a "
            "cost, not a benchmark. Stages that came from elsewhere are not listed.\n\n"
            + _table(("stage", "times", "seconds each", "minutes in all"), rows))  # fmt: skip
