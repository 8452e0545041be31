"""Sections about what happens inside: ranges, the sensitivity of products, decisions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.markdown import table
from bench.quantize import figures
from bench.quantize.comparison import Mean, Record, mean_of, split_of
from bench.quantize.protocol import TITLES
from bench.quantize.selection import Section, listed, records_of, told, values, where


def ranges(results: Mapping[str, Any], out: Path) -> Section:
    """How large inputs get at every degree."""
    records = records_of(results, "ranges")
    kinds, degrees, rows, found = values(records, "kind"), values(records, "degree"), [], []
    for weights in values(records, "weights"):
        for kind in kinds:
            for key, title in (("largest", "largest"), ("percentile", "99.99%")):
                these = where(records, weights=weights, kind=kind)
                absolute = np.mean([max(each[key]) for each in where(these, degree=degrees[0])])
                cells = [f"{relative_range(these, degree, key):.3f}x" for degree in degrees[1:]]
                rows.append((weights, kind, title, f"{absolute:.2f}", *cells))
        last = {kind: relative_range(where(records, weights=weights, kind=kind), degrees[-1], "largest")
                for kind in kinds}  # fmt: skip
        told = listed([f"{kind} {ratio:.2f}x" for kind, ratio in last.items()])
        found.append(f"Ranges at r = {degrees[-1]} against r = 0, {weights}: {told} the largest magnitude, mean over "
                     "blocks and networks.")  # fmt: skip
    picture = out.with_name(f"{out.stem}-ranges.png")
    figures.draw_ranges(records, relative_range, picture)
    header = ("weights", "input of", "magnitude", f"at r = {degrees[0]}", *(f"r = {degree}" for degree in degrees[1:]))
    note = (f"{len(values(records, 'network'))} networks. The magnitudes of what goes into each kind of product: the "
            "largest of all, and the one that 99.99% do not exceed. At r = 0 that of the widest block, mean over "
            "networks; at other degrees relative to r = 0, geometric mean over blocks and networks. \"Compensated\" "
            "weights are those of the degree, \"merging only\" those of r = 0 at every degree.")  # fmt: skip
    body = f"{note}\n\n![ranges against the degree]({picture.name})\n\n"
    return Section("Ranges against r", body + table(header, rows, text=("weights", "input of", "magnitude")), found)


def relative_range(records: Sequence[Record], degree: int, key: str) -> float:
    """A magnitude at a degree over that at the first one: geometric mean over blocks and networks."""
    first = {each["network"]: each[key] for each in where(records, degree=records[0]["degree"])}
    logs = [np.log(np.array(each[key]) / first[each["network"]]) for each in where(records, degree=degree)]
    return float(np.exp(np.mean(logs)))


def products(results: Mapping[str, Any], out: Path) -> Section:
    """What each product's quantization alone does."""
    records = records_of(results, "products")
    degrees, found, rows = values(records, "degree"), [], []
    shares: dict[int, dict[str, float]] = {}
    for degree in degrees:
        these = where(records, degree=degree)
        total = sum(each["divergence"] for each in these)
        shares[degree] = {name: sum(each["divergence"] for each in where(these, product=name)) / total
                          for name in values(these, "product")}  # fmt: skip
        mean = total / len(values(these, "network"))
        by_kind = _summed(shares[degree], lambda name: name.rpartition(".")[2])
        by_block = _summed(shares[degree], lambda name: name.split(".")[1])
        worst = sorted(shares[degree], key=lambda name: -shares[degree][name])[:3]
        rows.append((str(degree), f"{mean:.2g}", *(f"{share:.0%}" for share in by_kind.values()),
                     *(f"{share:.0%}" for share in by_block.values())))  # fmt: skip
        found.append(f"Sensitivity at r = {degree}: the largest shares of the divergence come with "
                     f"{listed([f'{name} ({shares[degree][name]:.0%})' for name in worst])}.")  # fmt: skip
    picture = out.with_name(f"{out.stem}-products.png")
    figures.draw_products(records, picture)
    header = ("r", "sum, nats", *by_kind, *(f"block {block}" for block in by_block))
    note = (f"INT8, one product at a time, all others float32; {len(values(records, 'network'))} networks. Divergence "
            "from the float32 network; the shares are those of the sum.")  # fmt: skip
    body = f"{note}\n\n![divergence of each product alone]({picture.name})\n\n{table(header, rows)}"
    return Section("Sensitivity of products", body, found)


def _summed(shares: Mapping[str, float], key: Any) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in sorted(shares):
        found[key(name)] = found.get(key(name), 0.0) + shares[name]
    return found


def decisions(results: Mapping[str, Any], out: Path) -> Section:
    """Whether decisions are the same, and what comes of those that are not."""
    records = records_of(results, "decisions")
    agreement, split, found = [], [], []
    for form in values(records, "format"):
        for degree in values(records, "degree"):
            these = where(records, format=form, degree=degree)
            own, local = (np.mean([each[key] for each in these], axis=0) for key in ("own", "local"))
            both = (f"{one:.1f} / {other:.1f}" for one, other in zip(own, local, strict=True))
            same_sheets = np.mean([each["same_sheets"] for each in these])
            agreement.append((TITLES[form], str(degree), *both, f"{same_sheets:.1f}"))
            logit, nats = (split_of(these, key) for key in ("logit", "divergence"))
            undisturbed = [each["same_logit"] for each in these if each["same_logit"] is not None]
            split.append((
                TITLES[form], str(degree), *(str(mean_of([each[part] for each in these])) for part in _PARTS),
                *(f"{value:.3f}" for value in (logit.whole, logit.values, logit.forced)),
                f"{np.mean(undisturbed):.3f}" if undisturbed else "-",
                *(f"{value:.2g}" for value in (nats.whole, nats.values, nats.forced)),
            ))  # fmt: skip
            if degree == max(values(records, "degree")):
                found += _decisions_found(these, TITLES[form], degree, own, local)
    picture = out.with_name(f"{out.stem}-decisions.png")
    figures.draw_decisions(records, picture)
    blocks = [f"block {block}" for block in records[0]["blocks"]]
    note = (f"{len(values(records, 'network'))} networks, {records[0]['whole']['sheets']} sheets each. Percent of "
            "the tokens that merge into the same token as in float32, of those that float32 merges: as decisions come "
            "/ with float32's decisions forced in all blocks before. As they come, tokens are known by their places; "
            "behind a block that decided otherwise a place may hold another token, which counts as different. Only "
            "blocks whose decisions the logits depend on.")  # fmt: skip
    explained = (
        "What the change comes from. *Own*: the quantized network as it is. *Values*: the quantized network with "
        "float32's decisions replayed. *Decisions*: float32 with the quantized network's decisions replayed. Change in "
        "top-1 in points; mean magnitude of a logit's change, also on the sheets on which all decisions are the same; "
        "divergence in nats."
    )
    parts = ("own", "values", "decisions")
    header = ("format", "r", *(f"top-1, {part}" for part in parts), *(f"logits, {part}" for part in parts),
              "logits, same decisions", *(f"nats, {part}" for part in parts))  # fmt: skip
    body = "\n\n".join([
        note, f"![decisions that are the same]({picture.name})",
        table(("format", "r", *blocks, "sheets all the same"), agreement, text=("format",)), explained,
        table(header, split, text=("format",)),
    ])  # fmt: skip
    return Section("Decisions", body, found)


_PARTS = ("whole", "values", "forced")


def _decisions_found(these: Sequence[Record], title: str, degree: int, own: Any, local: Any) -> list[str]:
    logit, nats = split_of(these, "logit"), split_of(these, "divergence")
    whole, replayed, forced = (mean_of([each[part] for each in these]) for part in _PARTS)
    most = "flipped decisions" if nats.forced > nats.values else "values"
    same = np.mean([each["same_sheets"] for each in these])
    return [
        f"{title}, decisions at r = {degree}: {own[0]:.1f}% of the merges in the first deciding block are float32's, "
        f"{own[-1]:.1f}% in the last as they come and {local[-1]:.1f}% with float32's decisions before; on {same:.0f}% "
        "of the sheets all are the same.",
        f"{title} at r = {degree}, what the change comes from: replaying float32's decisions takes the mean logit "
        f"change from {logit.whole:.3f} to {logit.values:.3f} and the divergence from {nats.whole:.2g} to "
        f"{nats.values:.2g} nats; its decisions alone, in float32, make {logit.forced:.3f} and {nats.forced:.2g}. So "
        f"most of the divergence comes from {most}. Top-1: {told(whole)} as it is, {told(replayed)} with float32's "
        f"decisions, {told(forced)} by decisions alone. Its own decisions in place of float32's add "
        f"{told(_flips(these))}.",
    ]


def _flips(these: Sequence[Record]) -> Mean:
    """What the quantized network's own decisions add to its change in top-1, with an upper bound of the error."""
    whole, replayed = (mean_of([each[part] for each in these]) for part in ("whole", "values"))
    added, error = split_of(these, "change").decisions, math.hypot(whole.error, replayed.error)
    return Mean(added, error, added, error, len(these))
