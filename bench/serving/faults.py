"""Fault runs: each breaks one thing under steady traffic and checks what the server makes of it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.serving.case import Bench, Case, FaultOptions, SkippedError
from bench.serving.subject import Body, Subject


def run_case(
    name: str, case: Case, subject: Subject, bodies: list[Body], options: FaultOptions, work: Path
) -> dict[str, Any]:
    """Runs one case on a copy of the family below a folder; JSON-ready."""
    folder = work / "".join(letter if letter.isalnum() else "-" for letter in name)
    shutil.rmtree(folder, ignore_errors=True)
    family = folder / "family"
    shutil.copytree(subject.folder, family)
    bench = Bench(subject, bodies, options, folder, family)
    began, skipped = time.monotonic(), ""
    try:
        case(bench)
    except SkippedError as reason:
        skipped = str(reason)
    seconds = time.monotonic() - began
    passed = not skipped and all(held for _, held, _ in bench.checks)
    return {"passed": passed, "skipped": skipped, "seconds": seconds, "checks": bench.checks, "notes": bench.notes}


def failed(result: Mapping[str, Any]) -> list[str]:
    """What did not hold, with what was seen."""
    return [f"{what} ({seen})" if seen else what for what, held, seen in result["checks"] if not held]
