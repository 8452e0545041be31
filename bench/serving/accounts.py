"""What became of every request: nothing is left out of the count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RIGHT, WRONG = "answered right", "answered wrong"
REFUSED, UNCLEAR, LOST = "refused clearly", "refused unclearly", "lost"
OUTCOMES = (RIGHT, WRONG, REFUSED, UNCLEAR, LOST)
BUSY = (429, 503)


@dataclass(frozen=True)
class Reply:
    """What came back, whichever protocol brought it."""

    status: int  # of HTTP; what a code of gRPC stands for there; 0 where nothing came
    text: str = ""  # what a refusal says, or how the connection failed
    retry_after: bool = False  # whether the refusal says when to come back, for which gRPC has no place
    logits: np.ndarray | None = None  # float32 [n, classes], of an answer
    classes: tuple[int, ...] | None = None  # best class of each image, of an answer that tells no logits
    degree: int | None = None  # that answered


@dataclass(slots=True)
class Record:
    """One request."""

    at_s: float  # when it was to be sent, from the start of the phase; its latency counts from here
    body: int  # which one
    sent_s: float = 0.0  # when it was sent
    done_s: float = 0.0  # when its answer was there
    reply: object = None  # the answer, as it came


@dataclass(frozen=True)
class Judged:
    """One request, and what became of it."""

    at_s: float  # see `Record`
    latency_ms: float  # from when it was to be sent to its answer
    outcome: str  # Of `OUTCOMES`
    images: int  # in it
    correct: int = 0  # of the images, how many got the class of their label
    degree: int | None = None  # that answered
    text: str = ""  # what a refusal or a failure said


def tallied(judged: Sequence[Judged]) -> dict[str, object]:
    """Counts of outcomes, and the texts that were said most often with those that are no right answer."""
    counts = Counter(each.outcome for each in judged)
    said = Counter(f"{each.outcome}: {each.text[:160]}" for each in judged if each.outcome != RIGHT and each.text)
    named = {name: counts[name] for name in OUTCOMES}
    return {"counts": {"sent": len(judged), **named}, "said": dict(said.most_common(8))}


def clear_refusal(reply: Reply, *, over_http: bool) -> bool:
    """Whether a valid request was refused so that a client knows what to do: come back, and over HTTP when."""
    readable = bool(reply.text.strip()) and "\n" not in reply.text and "Traceback" not in reply.text
    return reply.status in BUSY and readable and (reply.retry_after or not over_http)


def latencies(judged: Sequence[Judged]) -> np.ndarray:
    """Of answers, in ms."""
    return np.array([each.latency_ms for each in judged if each.outcome in (RIGHT, WRONG)])


def percentile(values: np.ndarray, share: float) -> float | None:
    """The least value that a share of all values does not exceed; None of nothing.

    >>> percentile(np.arange(1.0, 101.0), 99)
    99.0
    """
    return float(np.percentile(values, share, method="inverted_cdf")) if len(values) else None


def summary(judged: Sequence[Judged], seconds: float) -> dict[str, object]:
    """What a phase came to that was offered for some seconds, JSON-ready."""
    answered = [each for each in judged if each.outcome in (RIGHT, WRONG)]
    taken = latencies(judged)
    images = sum(each.images for each in answered)
    degrees = Counter[int]()
    for each in answered:
        degrees[-1 if each.degree is None else each.degree] += each.images
    asked = sum(each.images for each in judged)
    return {
        "seconds": seconds,
        "requests": len(judged),
        "offered": asked / seconds,
        "answered": images / seconds,
        "p50_ms": percentile(taken, 50),
        "p99_ms": percentile(taken, 99),
        "p99_of_all_ms": _p99_of_all(taken, len(judged)),
        "refused": sum(each.outcome == REFUSED for each in judged) / max(len(judged), 1),
        "top1": sum(each.correct for each in answered) / images if images else None,
        "degrees": {str(degree): count / images for degree, count in sorted(degrees.items())},
        **tallied(judged),
    }


def _p99_of_all(answered_ms: np.ndarray, requests: int) -> float | None:
    """As if what was never answered had taken for ever; None where that is more than one in a hundred."""
    never = np.full(requests - len(answered_ms), np.inf)
    p99_ms = percentile(np.concatenate([answered_ms, never]), 99)
    return p99_ms if p99_ms is not None and np.isfinite(p99_ms) else None


def over_time(judged: Sequence[Judged], seconds: float, bin_s: float = 1.0) -> list[dict[str, object]]:
    """The same by when requests were to be sent: degree, p50 and p99 in ms, refused, for every bin."""
    bins: list[list[Judged]] = [[] for _ in range(int(np.ceil(seconds / bin_s)))]
    for each in judged:
        bins[min(int(each.at_s / bin_s), len(bins) - 1)].append(each)
    return [
        {
            "at_s": number * bin_s,
            "requests": len(inside),
            "degree": float(np.mean(found)) if (found := _degrees(inside)) else None,
            "highest": max(found, default=None),
            "p50_ms": percentile(latencies(inside), 50),
            "p99_ms": percentile(latencies(inside), 99),
            "refused": sum(each.outcome == REFUSED for each in inside),
        }
        for number, inside in enumerate(bins)
    ]


def _degrees(judged: Sequence[Judged]) -> list[int]:
    return [each.degree for each in judged if each.degree is not None]
