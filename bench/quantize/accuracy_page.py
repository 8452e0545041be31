"""Sections about accuracy: formats, methods, degrees, calibration images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.markdown import table
from bench.quantize import figures
from bench.quantize.comparison import Mean, Ratio, Record, mean_of
from bench.quantize.protocol import ALL, CALIBRATION_IMAGES, RULES, TITLES
from bench.quantize.selection import (
    SHIPPED,
    Section,
    divergence_ratio,
    gain_of,
    listed,
    records_of,
    told,
    values,
    where,
)

_CLEARLY = 3  # standard errors
BAR = 0.3  # points of top-1 that INT8 may lose
_ONE_SIDED = 0.0228  # share of a normal distribution that lies more than two deviations below its mean


def default(results: Mapping[str, Any], out: Path) -> Section:
    """INT8 with default settings, and other formats."""
    everything = records_of(results, "default")
    records = [each for each in everything if each["network"] != SHIPPED]
    int8 = where(records, format="int8")
    degrees = values(int8, "degree")
    means = {degree: mean_of(where(int8, degree=degree)) for degree in degrees}
    groups = values([{"group": _group(each["network"])} for each in everything], "group")
    rows, per_task = [], []
    for degree, mean in means.items():
        these = where(int8, degree=degree)
        worst = min(these, key=lambda each: each["change"])
        rows.append((
            str(degree), f"{_average(these, 'reference'):.2f}", f"{_average(these, 'candidate'):.2f}", str(mean),
            f"{worst['change']:+.2f} ± {worst['error']:.2f} ({worst['network']})", f"{_average(these, 'equal'):.2f}",
            f"{_average(these, 'divergence'):.2g}", "yes" if mean.mean >= -BAR else "**no**",
        ))  # fmt: skip
        own = [where(everything, format="int8", degree=degree)]
        cells = [[each for each in own[0] if _group(each["network"]) == group] for group in groups]
        per_task.append((str(degree), *(f"{_average(c, 'reference'):.1f}, {mean_of(c)}" if c else "" for c in cells)))
    picture = out.with_name(f"{out.stem}-default.png")
    figures.draw_default(records, BAR, picture)
    header = ("r", "float32, %", "INT8, %", "change", "worst network", "same class, %", "divergence", f"within {BAR}")
    sheets = values(int8, "sheets")
    body = "\n\n".join([
        f"INT8 weights and inputs, default settings, one calibration for all degrees; {len(values(int8, 'network'))} "
        f"networks, {listed([str(each) for each in sheets])} freshly drawn test sheets each.",
        table(header, rows), f"![change and divergence against the degree]({picture.name})",
        "By task, mean over seeds: float32 in percent, change in points.", table(("r", *groups), per_task),
        _formats_table(records),
    ])  # fmt: skip
    return Section("INT8 with default settings, at every degree", body, _default_found(records, means, int8))


def _default_found(records: Sequence[Record], means: Mapping[int, Mean], int8: Sequence[Record]) -> list[str]:
    missed = [str(degree) for degree, mean in means.items() if mean.mean < -BAR]
    lowest = min(means, key=lambda degree: means[degree].mean)
    worst = min(int8, key=lambda each: each["change"])
    held = f"more than {BAR} points at r = {listed(missed)}" if missed else f"no more than {BAR} points at any degree"
    below = [each for each in int8 if each["change"] < -BAR]
    clear = [each for each in int8 if each["change"] < -2 * each["error"]]
    beyond = " (within its error)" if abs(worst["change"]) <= 2 * worst["error"] else ""
    found = [
        f"INT8 with default settings: the mean over networks loses {held}. The largest mean loss is "
        f"{told(means[lowest])}, at r = {lowest}; the worst of {len(int8)} single measurements is "
        f"{worst['change']:+.2f} ± {worst['error']:.2f} points{beyond}, {worst['network']} at r = {worst['degree']}; "
        f"{len(below)} of them lose more than {BAR} points, and {len(clear)} more than two standard "
        f"errors, as about {_ONE_SIDED * len(int8):.0f} would by chance.",
    ]
    first, last = (_average(where(int8, degree=degree), "divergence") for degree in (min(means), max(means)))
    found.append(
        f"INT8's divergence from float32 is {first:.2g} nats at r = {min(means)} and {last:.2g} at r = {max(means)}, "
        f"{last / first:.0f} times as much; top-1 there changes by {told(means[max(means)])}."
    )
    others = []
    for form in values(records, "format"):
        if form != "int8":
            changes = {degree: mean_of(where(records, format=form, degree=degree))
                       for degree in values(where(records, format=form), "degree")}  # fmt: skip
            low = min(changes, key=lambda degree: changes[degree].mean)
            others.append(f"{TITLES[form]} {told(changes[low])}, at r = {low}")
    return [*found, f"The largest mean loss of other formats: {'; '.join(others)}."] if others else found


def _formats_table(records: Sequence[Record]) -> str:
    forms, rows = values(records, "format"), []
    at = values([each for each in records if each["format"] != "int8"], "degree")
    for form in forms:
        these = where(records, format=form)
        cells = [where(these, degree=degree) for degree in at]
        rows.append((TITLES[form], str(these[0]["sheets"]), *(str(mean_of(cell)) for cell in cells),
                     *(f"{_average(cell, 'divergence'):.2g}" for cell in cells)))  # fmt: skip
    header = ("format", "sheets", *(f"change, r = {r}" for r in at), *(f"divergence, r = {r}" for r in at))
    return ("Other formats, same settings. Those below 8 bits are no engine's; they serve as stress in what follows."
            f"\n\n{table(header, rows, text=('format',))}")  # fmt: skip


def methods(results: Mapping[str, Any], out: Path) -> Section:
    """What each method buys, alone and all together."""
    records = records_of(results, "methods")
    found, parts = [], [_methods_note(records)]
    ratios: dict[str, dict[str, Ratio]] = {}
    for form in values(records, "format"):
        these = where(records, format=form)
        text, verdicts = _methods_table(these)
        ratios[form] = {
            name: divergence_ratio(where(these, method=name), where(these, method="default"))
            for name in values(these, "method")
        }
        parts.append(f"### {TITLES[form]}\n\n{text}")
        found.append(f"Methods at {TITLES[form]}: {_verdicts(verdicts)}")
    picture = out.with_name(f"{out.stem}-methods.png")
    figures.draw_methods(ratios, picture)
    parts.insert(1, f"![divergence of each method over the default's]({picture.name})")
    learnt = records_of(results, "reconstruction")
    if learnt:
        parts.append("### Reconstruction\n\nIt takes minutes for each degree, so it was tried on fewer networks: "
                     f"{listed(values(learnt, 'network'))}. Gains are over the default.")  # fmt: skip
        for form in values(learnt, "format"):
            these = where(learnt, format=form)
            text, verdicts = _methods_table(these)
            parts.append(f"{TITLES[form]}, networks: {len(values(these, 'network'))}.\n\n{text}")
            before, after = (where(these, method=name) for name in ("all of these", "all of these, reconstruct"))
            told_ratio = divergence_ratio(where(these, method="reconstruct"), where(these, method="default"))
            on_top = f"; on top of all other methods {divergence_ratio(after, before)}" if after else ""
            gain = gain_of(where(these, method="reconstruct"))
            found.append(f"Reconstruction at {TITLES[form]}, networks: {len(values(these, 'network'))}. Divergence "
                         f"{told_ratio}{on_top}; top-1 {told(gain)}.")  # fmt: skip
    return Section("Methods, each alone and all together", "\n\n".join(parts), found)


def _methods_note(records: Sequence[Record]) -> str:
    together = ", ".join(f"{name} {value}".removesuffix(" True") for name, value in ALL.items())
    return (f"{len(values(records, 'network'))} networks, {records[0]['sheets']} sheets each. Gain: change in top-1 "
            "from the default's, mean over networks and degrees. Divergence: from float32, as a multiple of the "
            "default's; geometric mean, in brackets its 95% interval with each network as one observation. \"All of "
            f"these\" is {together}. Verdict: a method gains or harms where its gain is more than {_CLEARLY} standard "
            "errors, because with so many rows 2 are reached by chance; nearer or further where the interval leaves "
            "out 1.")  # fmt: skip


def _methods_table(these: Sequence[Record]) -> tuple[str, dict[str, tuple[Mean, Ratio]]]:
    base, rows, verdicts = where(these, method="default"), [], {}
    degrees = values(these, "degree")
    for name in values(these, "method"):
        own = where(these, method=name)
        if name == "default":
            cells = [f"{_average(where(own, degree=degree), 'divergence'):.2g} nats" for degree in degrees]
            rows.append((name, str(mean_of(own)), "", "", *cells, ""))
            continue
        gain, ratio = gain_of(own), divergence_ratio(own, base)
        verdicts[name] = (gain, ratio)
        cells = [f"{divergence_ratio(where(own, degree=r), where(base, degree=r)).mean:.2f}x" for r in degrees]
        rows.append((name, str(mean_of(own)), str(gain), str(ratio), *cells, _verdict(gain, ratio)))
    header = ("method", "change from float32", "gain", "divergence", *(f"r = {r}" for r in degrees), "verdict")
    return table(header, rows, text=("method", "verdict")), verdicts


def _verdict(gain: Mean, ratio: Ratio) -> str:
    """In words, what a method did to top-1 and, where that does not tell, to the divergence."""
    if abs(gain.mean) > _CLEARLY * gain.error:
        return "gains" if gain.mean > 0 else "**harms**"
    if not ratio.tells:
        return "buys nothing"
    return "nearer to float32, not in top-1" if ratio.mean < 1 else "further from float32, not in top-1"


def _verdicts(verdicts: Mapping[str, tuple[Mean, Ratio]]) -> str:
    groups: dict[str, list[str]] = {}
    for name, (gain, ratio) in verdicts.items():
        verdict = _verdict(gain, ratio).strip("*")
        shown = f"{gain.mean:+.2f} points" if verdict in ("gains", "harms") else f"{ratio.mean:.2f}x"
        groups.setdefault(verdict, []).append(f"`{name}`" + ("" if verdict == "buys nothing" else f" ({shown})"))
    order = ("gains", "harms", "nearer to float32, not in top-1", "further from float32, not in top-1", "buys nothing")
    return "; ".join(f"{verdict}: {listed(groups[verdict])}" for verdict in order if verdict in groups) + "."


def degrees(results: Mapping[str, Any], _out: Path) -> Section:
    """At which degrees ranges are looked at."""
    records = records_of(results, "degrees")
    shared, parts, found = next(iter(RULES)), [], []
    for form in values(records, "format"):
        these, rows = where(records, format=form), []
        base = where(these, rule=shared)
        for rule in values(these, "rule"):
            own = where(these, rule=rule)
            at = [where(own, degree=degree) for degree in values(these, "degree")]
            gains = [str(gain_of(cell)) if rule != shared else f"{mean_of(cell)} from float32" for cell in at]
            ratios = [f"{divergence_ratio(cell, base).mean:.2f}x" for cell in at]
            rows.append((rule, *(f"{gain}; {ratio}" for gain, ratio in zip(gains, ratios, strict=True))))
            if rule != shared:
                found.append(f"{TITLES[form]}, calibrated {rule} instead of {shared}: top-1 {told(gain_of(own))}, "
                             f"divergence {divergence_ratio(own, base)}.")  # fmt: skip
        header = ("calibrated", *(f"r = {degree}" for degree in values(these, "degree")))
        parts.append(f"{TITLES[form]}:\n\n{table(header, rows, text=('calibrated',))}")
    note = (f"{len(values(records, 'network'))} networks, {records[0]['sheets']} sheets each. Gain in top-1 over the "
            "default rule, and the divergence as a multiple of the default rule's.")  # fmt: skip
    return Section("Degrees: at which ones ranges are looked at", "\n\n".join([note, *parts]), found)


def data(results: Mapping[str, Any], out: Path) -> Section:
    """How many calibration images, which, or none."""
    records = records_of(results, "data")
    base = where(records, source="spread", images=CALIBRATION_IMAGES)
    rows, found = [], []
    kinds = [(source, count) for source in values(records, "source")
             for count in sorted(values(where(records, source=source), "images"))]  # fmt: skip
    for source, count in kinds:
        cells: list[str] = []
        for form in values(records, "format"):
            own = where(records, source=source, images=count, format=form)
            before = where(base, format=form)
            gain, ratio = gain_of(own), divergence_ratio(own, before)
            cells += ["", "1x"] if own == before else [str(gain), str(ratio)]
            if source not in ("spread", "diverse"):
                found.append(f"Calibrated on {source} ({count} images) instead of {CALIBRATION_IMAGES} training "
                             f"sheets, {TITLES[form]}: top-1 {told(gain)}, divergence {ratio}.")  # fmt: skip
        rows.append((source, str(count), *cells))
    for form in values(records, "format"):
        found.insert(0, _enough(records, base, form))
        diverse = where(records, source="diverse", format=form)
        for count in values(diverse, "images")[:1]:
            own = where(diverse, images=count)
            spread = where(records, source="spread", images=count, format=form)
            found.insert(1, f"{count} diverse calibration images instead of {count} spread ones, {TITLES[form]}: "
                            f"divergence {divergence_ratio(own, spread)}.")  # fmt: skip
    picture = out.with_name(f"{out.stem}-images.png")
    figures.draw_images(records, picture)
    header = ["calibrated on", "images"]
    for form in values(records, "format"):
        header += [f"{TITLES[form]}: gain", "divergence"]
    note = (f"{len(values(records, 'network'))} networks, {records[0]['sheets']} sheets each, r = "
            f"{listed([str(r) for r in values(records, 'degree')])} together. Against {CALIBRATION_IMAGES} spread "
            "images, the default. Diverse ones are chosen from the training sheets that spread ones are spread over; "
            "synthesized ones are made without data; Gaussian noise has mean 0 and deviation 1 in normalized pixels."
            )  # fmt: skip
    body = f"{note}\n\n![divergence against calibration images]({picture.name})\n\n"
    return Section("Calibration images", body + table(header, rows, text=("calibrated on",)), found)


def _enough(records: Sequence[Record], base: Sequence[Record], form: str) -> str:
    """The smallest number of spread images from which on none is worse than the default."""
    spread, before = where(records, source="spread", format=form), where(base, format=form)
    counts = sorted(values(spread, "images"))
    ratios = {count: divergence_ratio(where(spread, images=count), before) for count in counts}
    worse = [count for count in counts if ratios[count].low > 1]
    enough = next((count for count in counts if count > max(worse)), counts[-1]) if worse else counts[0]
    return (f"Number of calibration images, {TITLES[form]}: with {enough} or more the divergence is that of "
            f"{CALIBRATION_IMAGES} within the error; with {counts[0]} it is {ratios[counts[0]]}.")  # fmt: skip


def _group(network: str) -> str:
    return {SHIPPED: "example, shipped sheets", "example": "example"}.get(network, network.rpartition("-")[0])


def _average(records: Sequence[Record], key: str) -> float:
    return sum(each[key] for each in records) / len(records)
