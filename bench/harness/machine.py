"""What measurements ran on, in two lines: the processor with the instruction sets that matter, and the libraries."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
_CPUINFO = Path("/proc/cpuinfo")


def machine() -> str:
    """Processor, its family and model, the instruction sets that engines use, cores, and the load average."""
    lines = _CPUINFO.read_text().split("\n\n")[0].splitlines() if _CPUINFO.exists() else []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = set(facts.get("flags", "").split())
    inside = [f"{name.removeprefix('cpu ')} {facts[name]}" for name in ("cpu family", "model") if name in facts]
    inside += [name for name in _INSTRUCTION_SETS if name in flags]
    name = facts.get("model name") or platform.processor() or platform.machine()
    told = f"{name} ({', '.join(inside)})" if inside else name
    return f"{told}, {len(os.sched_getaffinity(0))} cores, load average {os.getloadavg()[0]:.1f}"


def versions(libraries: Iterable[str]) -> str:
    """The installed versions of some distributions, and Python's."""
    found = []
    for name in libraries:
        with suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join([*found, f"Python {platform.python_version()}"])
