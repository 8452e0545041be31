"""The page of the fault runs and the soak, and what is claimed of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from bench.harness.page import cell, render
from bench.serving.accounts import OUTCOMES
from bench.serving.case import RATE, failed


def fault_verdicts(cases: Mapping[str, Any]) -> list[str]:
    """One line a case."""
    return [
        f"SKIPPED: {name}: {each['skipped']}" if each["skipped"]
        else f"PASS: {name}" if each["passed"] else f"FAILED: {name}: {'; '.join(failed(each))}"
        for name, each in cases.items()
    ]  # fmt: skip


def _counts(counts: Mapping[str, int]) -> str:
    return f"{counts['sent']} sent, " + ", ".join(f"{counts[name]} {name}" for name in OUTCOMES)


def write_faults_page(results: Mapping[str, Any], out: Path) -> None:
    """Writes the page. The soak, if it ran, is summed up by itself."""
    cases = results["cases"]
    run = {name: each for name, each in cases.items() if not each["skipped"] and name != "soak"}
    counted = [each["notes"]["traffic"]["counts"] for each in run.values() if "traffic" in each["notes"]]
    sums = pd.DataFrame(counted, columns=["sent", *OUTCOMES]).sum().astype(int)
    told = [{"case": name, "clients were told": cell(text), "times": times} for name, each in cases.items()
            for text, times in each["notes"].get("traffic", {}).get("said", {}).items()]  # fmt: skip
    checks = [{"case": name, "checks": "; ".join(dict.fromkeys(what for what, _, _ in each["checks"])),
               **({"do not hold": "; ".join(map(cell, failed(each)))} if failed(each) else {})}
              for name, each in cases.items()]  # fmt: skip
    malformed = cases.get("malformed requests", {}).get("notes", {}).get("malformed")
    soak = cases.get("soak", {}).get("notes")
    render("serving/faults.md.j2", out, setup=results["setup"], soak=soak, rate=RATE, cases=run,
           passed=sum(each["passed"] for each in run.values()), sums=_counts(sums), told=told, checks=checks,
           skipped=[(name, each["skipped"]) for name, each in cases.items() if each["skipped"]],
           rows=[_case(*each) for each in cases.items()], malformed=malformed,
           kinds=malformed and [{"kind": kind} | counts for kind, counts in malformed["kinds"].items()],
           slopes=_slopes(soak["slopes"]) if soak else [])  # fmt: skip


def _case(name: str, result: Mapping[str, Any]) -> dict[str, Any]:
    counts = result["notes"].get("traffic", {}).get("counts", {})
    held = sum(held for _, held, _ in result["checks"])
    verdict = "skipped" if result["skipped"] else "passed" if result["passed"] else "failed"
    return {"case": name, "s": f"{result['seconds']:.0f}", **{key: counts.get(key, "") for key in ("sent", *OUTCOMES)},
            "checks": f"{held} of {len(result['checks'])}", "result": verdict}  # fmt: skip


def _slopes(slopes: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"": title.strip(","), "level": f"{found['level']:.1f}", "most": f"{found['most']:.1f}",
             "growth over the second half (95%)": f"{found['growth']:+.2f} ({found['low']:+.2f} to "
             f"{found['high']:+.2f})", "flat": "yes" if found["flat"] else "no"}
            for title, found in slopes.items() if found]  # fmt: skip
