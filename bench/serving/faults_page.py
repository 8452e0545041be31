"""The page of the fault runs and the soak, written from their states."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.markdown import table
from bench.serving.accounts import OUTCOMES
from bench.serving.faults import RATE, failed
from bench.serving.load_page import machine
from bench.serving.soak import WATCHED
from bench.serving.traffic import sound
from tocom.runtime.files import write_atomically

_UNITS = {"rss_mib": "memory of all processes, MiB", "files": "open files", "threads": "threads"}


def write_faults_page(file: Path, results: Mapping[str, Any], soak: Path | None, command: str) -> None:
    """Writes the page.

    Args:
        file: A page in Markdown.
        results: Of the fault runs.
        soak: State of the soak; None where there was none.
        command: That ran the faults.
    """
    kept = None if soak is None else json.loads(soak.read_text())
    parts = [
        "# Faults while serving",
        f"Written by `{command}` ([bench/serving](../serving)), {datetime.now(UTC):%Y-%m-%d}: {machine()}.",
        *(f"**{line}**" for line in _sums(results)),
        f"Every case is a server of its own on a copy of the family, under steady valid traffic ({RATE:g} requests/s "
        "unless the case needs another rate, open loop) over gRPC, HTTP and the page, 1 to 8 images each, some pinning "
        "a degree or bounding it. A right answer has the local engine's logits of the degree that it names, bit for "
        "bit. A clear refusal is 503 or 429 in one line, over HTTP with Retry-After. Lost is what got neither.",
        table(("case", "s", "sent", *OUTCOMES, "checks", "result"), (_case(*each) for each in results.items()),
              ("case", "result")),
        *_details(results),
        *_malformed(results.get("malformed requests")),
        *([] if kept is None or "soak" not in kept["results"] else _soak(kept)),
    ]  # fmt: skip
    write_atomically(file, ("\n\n".join(parts) + "\n").encode())


def fault_verdicts(results: Mapping[str, Any]) -> list[str]:
    """One line a case."""
    lines = []
    for name, each in results.items():
        if each["skipped"]:
            lines.append(f"SKIPPED: {name}: {each['skipped']}")
        elif each["passed"]:
            lines.append(f"PASS: {name}")
        else:
            lines.append(f"FAILED: {name}: {'; '.join(failed(each))}")
    return lines


def soak_verdicts(result: Mapping[str, Any]) -> list[str]:
    """Whether what is claimed of the soak was seen."""
    lines = [("PASS: " if sound(result["traffic"]) else "FAILED: ") + "every valid request: a right answer or a clear "
             f"refusal ({_counts(result['traffic']['counts'])})"]  # fmt: skip
    for name in WATCHED:
        found = result["slopes"].get(name)
        if found is None:
            lines.append(f"FAILED: {_UNITS[name]}: the run was too short to tell")
            continue
        lines.append(f"{'PASS' if found['flat'] else 'FAILED'}: {_UNITS[name]}: {found['level']:.0f}, growth over the "
                     f"second half {found['growth']:+.1f} ({found['low']:+.1f} to {found['high']:+.1f})")  # fmt: skip
    ended = result["exit"] == 0 and not result["faults"] and not result["said"]
    lines.append(f"{'PASS' if ended else 'FAILED'}: every reload worked, no traceback in the log, exit status 0")
    return lines


def _sums(results: Mapping[str, Any]) -> list[str]:
    run = {name: each for name, each in results.items() if not each["skipped"]}
    passed = sum(each["passed"] for each in run.values())
    counted = [each["notes"]["traffic"]["counts"] for each in run.values() if "traffic" in each["notes"]]
    sums = {key: sum(each[key] for each in counted) for key in ("sent", *OUTCOMES)}
    lines = [f"{passed} of {len(run)} cases pass: {_counts(sums)}."]
    lines += [f"{name} was skipped: {each['skipped']}." for name, each in results.items() if each["skipped"]]
    return lines


def _counts(counts: Mapping[str, int]) -> str:
    return f"{counts['sent']} sent, " + ", ".join(f"{counts[name]} {name}" for name in OUTCOMES)


def _case(name: str, result: Mapping[str, Any]) -> list[str]:
    counts = result["notes"].get("traffic", {}).get("counts", {})
    cells = [str(counts.get(key, "")) for key in ("sent", *OUTCOMES)]
    held = sum(held for _, held, _ in result["checks"])
    verdict = "skipped" if result["skipped"] else "passed" if result["passed"] else "failed"
    return [name, f"{result['seconds']:.0f}", *cells, f"{held} of {len(result['checks'])}", verdict]


def _details(results: Mapping[str, Any]) -> list[str]:
    parts = ["## What was checked"]
    for name, result in results.items():
        lines = [f"- {'' if held else '**does not hold** '}{what}" + (f": {_cell(seen)}" if seen and not held else "")
                 for what, held, seen in result["checks"]]  # fmt: skip
        parts.append("\n".join([f"{name}:", "", *lines]))
        if said := result["notes"].get("traffic", {}).get("said"):
            parts.append("What clients were told, and how often: " +
                         ", ".join(f"{_cell(text)} {count}" for text, count in said.items()) + ".")  # fmt: skip
    return parts


def _malformed(result: Mapping[str, Any] | None) -> list[str]:
    if result is None or "malformed" not in result["notes"]:
        return []
    found = result["notes"]["malformed"]
    verdicts = sorted({verdict for counts in found["kinds"].values() for verdict in counts})
    total = sum(found["verdicts"].values())
    return [
        "## Malformed requests",
        f"{total} in {found['seconds']:.0f} s. Refused: status 4xx and one line. Closed: the connection ended, which "
        "is all that noise, or a request that ends early, can be told. Busy: refused with when to come back. Answered: "
        "what is odd about it touches nothing, such as a query that the route does not read.",
        table(("kind", *verdicts), ([kind, *(str(counts.get(verdict, "")) for verdict in verdicts)]
                                    for kind, counts in found["kinds"].items()), ("kind",)),
    ]  # fmt: skip


def _soak(kept: Mapping[str, Any]) -> list[str]:
    result = kept["results"]["soak"]
    verdicts = result["malformed"]["verdicts"]
    rows = []
    for name in WATCHED:
        found = result["slopes"].get(name)
        if found is not None:
            interval = f"{found['growth']:+.2f} ({found['low']:+.2f} to {found['high']:+.2f})"
            rows.append([_UNITS[name], f"{found['level']:.1f}", f"{found['most']:.1f}", interval,
                         "yes" if found["flat"] else "no"])  # fmt: skip
    return [
        "## Soak",
        f"Written by `{kept['settings']['command']}`: {result['minutes']:g} minutes of valid traffic "
        f"({RATE:g} requests/s), {sum(verdicts.values())} malformed requests "
        f"({', '.join(f'{count} {name}' for name, count in sorted(verdicts.items()))}), {result['reloads']} reloads "
        f"and {result['kills']} killed workers. Sampled every second, without the seconds behind a reload or a kill.",
        *(f"**{line}**" for line in soak_verdicts(result)),
        table(("", "level", "most", "growth over the second half (95%)", "flat"), rows, ("", "flat")),
    ]


def _cell(text: str) -> str:
    shown = "".join(letter if letter.isprintable() else "?" for letter in text[:200])
    return "`` " + shown.replace("|", "\\|").replace("`", "'") + " ``"
