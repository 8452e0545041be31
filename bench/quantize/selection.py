"""Records of the results, by stage and by what they hold; and sections of the page that are made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.quantize.comparison import Mean, Ratio, Record, mean_of, ratio_of

SHIPPED = "example-shipped"


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: Its heading.
        body: Markdown: what was measured, tables and plots.
        found: Sentences for the top of the page.
    """

    title: str
    body: str
    found: list[str] = field(default_factory=list)


def records_of(results: Mapping[str, Any], stage: str) -> list[dict[str, Any]]:
    """All records of a stage, each with its `network`; none if the stage is not there."""
    found = results["stages"].get(stage, {})
    return [{"network": name, **record} for name, records in found.items() for record in records]


def where(records: Iterable[Record], **wanted: Any) -> list[Record]:
    """Those that hold all of some values."""
    return [each for each in records if all(each[key] == value for key, value in wanted.items())]


def values(records: Iterable[Record], key: str) -> list[Any]:
    """What a key holds, each once, in the order in which it comes."""
    return list(dict.fromkeys(each[key] for each in records))


def gain_of(records: Sequence[Record]) -> Mean:
    """Mean change in top-1 from the baseline."""
    return mean_of(records, "gain", "gain_error")


def divergence_ratio(records: Sequence[Record], baseline: Sequence[Record]) -> Ratio:
    """Of the divergence from float to a baseline's; a network is one observation."""
    before = {(each["network"], each["degree"]): each["divergence"] for each in baseline}
    groups: dict[str, list[tuple[float, float]]] = {}
    for each in records:
        pair = (before[each["network"], each["degree"]], each["divergence"])
        groups.setdefault(each["network"], []).append(pair)
    return ratio_of(groups.values())


def told(mean: Mean) -> str:
    """A mean change in points, and whether it is one.

    >>> told(Mean(-0.1, 0.08, -0.3, 0.2, 9))
    '-0.10 ± 0.08 points (within the error)'
    """
    return f"{mean} points" + (" (within the error)" if mean.within_error else "")


def listed(names: Sequence[str]) -> str:
    """Names in a sentence.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)
