"""Two networks on the same sheets, in numbers; and many such comparisons in one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from torch import Tensor
from torch.nn import functional

Record = Mapping[str, Any]


def compared(reference: Tensor, candidate: Tensor, classes: Tensor) -> dict[str, float]:
    """What a candidate does on sheets that the reference saw too.

    Args:
        reference: Logits [B, classes].
        candidate: Likewise.
        classes: The right ones, [B].

    Returns:
        `sheets`, their number; `reference` and `candidate`, top-1 in percent; `change`, the second minus the first;
        `error`, the standard error of that, sheet by sheet; `equal`, percent of sheets that are given the same class;
        `divergence`, KL(reference || candidate) in nats; `logit`, the mean magnitude of a logit's change.
    """
    right = [(logits.argmax(1) == classes).double() for logits in (reference, candidate)]
    difference = right[1] - right[0]
    error = float(difference.std() / len(difference) ** 0.5) if len(difference) > 1 else 0.0
    logs = [logits.double().log_softmax(1) for logits in (reference, candidate)]
    return {
        "sheets": len(classes),
        "reference": 100 * float(right[0].mean()),
        "candidate": 100 * float(right[1].mean()),
        "change": 100 * float(difference.mean()),
        "error": 100 * error,
        "equal": 100 * float((reference.argmax(1) == candidate.argmax(1)).double().mean()),
        "divergence": float(functional.kl_div(logs[1], logs[0], reduction="batchmean", log_target=True)),
        "logit": float((candidate - reference).abs().mean()),
    }


def against(reference: Tensor, baseline: Tensor, candidate: Tensor, classes: Tensor) -> dict[str, float]:
    """`compared` to the reference; with `gain` and `gain_error`, the change in top-1 from a baseline."""
    gain = compared(baseline, candidate, classes)
    return {**compared(reference, candidate, classes), "gain": gain["change"], "gain_error": gain["error"]}


@dataclass(frozen=True)
class Mean:
    """Of several measurements.

    Attributes:
        mean: Of them.
        error: Its standard error, from theirs, taken as independent.
        worst: The lowest.
        worst_error: Its standard error.
        count: How many.
    """

    mean: float
    error: float
    worst: float
    worst_error: float
    count: int

    @property
    def within_error(self) -> bool:
        """Whether the mean is less than two standard errors from zero."""
        return abs(self.mean) <= 2 * self.error

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ± {self.error:.2f}"


def mean_of(records: Sequence[Record], key: str = "change", error: str = "error") -> Mean:
    """The mean of one number of some records."""
    values, errors = [each[key] for each in records], [each[error] for each in records]
    worst = int(np.argmin(values))
    return Mean(float(np.mean(values)), math.sqrt(sum(each**2 for each in errors)) / len(errors), values[worst],
                errors[worst], len(values))  # fmt: skip


@dataclass(frozen=True)
class Ratio:
    """How many times as large something became: geometric mean, and the ends of its 95% interval (Student's t)."""

    mean: float
    low: float
    high: float

    @property
    def tells(self) -> bool:
        """Whether the interval leaves 1 out."""
        return self.low > 1 or self.high < 1

    def __str__(self) -> str:
        ends = f" [{self.low:.2f}, {self.high:.2f}]" if math.isfinite(self.high) else ""
        return f"{self.mean:.2f}x{ends}"


def ratio_of(groups: Iterable[Sequence[tuple[float, float]]]) -> Ratio:
    """Of pairs (before, after) in groups that are one observation each, such as a checkpoint at all degrees."""
    logs = [float(np.mean([math.log(after / before) for before, after in group])) for group in groups]
    middle, half = float(np.mean(logs)), math.inf
    if len(logs) > 1:
        half = float(stats.t.ppf(0.975, len(logs) - 1) * np.std(logs, ddof=1) / len(logs) ** 0.5)
    return Ratio(math.exp(middle), math.exp(middle - half), float(np.exp(middle + half)))


@dataclass(frozen=True)
class Split:
    """A change, in two parts that add up to it.

    Attributes:
        whole: With all that the narrow network does.
        values: With the float network's decisions replayed in the narrow network.
        forced: With the narrow network's decisions replayed in the float network.
    """

    whole: float
    values: float
    forced: float

    @property
    def decisions(self) -> float:
        """What deciding for itself adds."""
        return self.whole - self.values


def split_of(records: Sequence[Record], key: str) -> Split:
    """Mean over records of the `decisions` stage."""
    parts = [float(np.mean([each[part][key] for each in records])) for part in ("whole", "values", "forced")]
    return Split(*parts)


def rounded(value: Any) -> Any:
    """Every number of plain data with five significant digits, for files."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return value
