"""Which engines can run on this machine, which can be built for others, and why not."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import version

from tocom.runtime.backends import BACKENDS, Backend, available
from tocom.runtime.errors import InputError


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis."""

    name: str
    usable: bool
    detail: str


def diagnose() -> list[Finding]:
    """Looks at every engine library, without loading an engine."""
    findings = [Finding(f"engine {status.name}", status.usable, status.detail) for status in available()]
    findings += [_plans(row) for row in BACKENDS.values() if row.builds_without_device]
    findings.append(_cuda())
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "onnx", "onnxscript"))
    findings.append(Finding("compiler", True, f"{libraries}, Python {platform.python_version()}"))
    return findings


def _plans(backend: Backend) -> Finding:
    name = "plans for NVIDIA GPUs"
    try:
        return Finding(name, True, f"{backend.name} {backend.version()} builds them here; running needs a GPU")
    except InputError:
        return Finding(name, False, f"not installed: pip install 'tocom[{backend.extra}]'")


def _cuda() -> Finding:
    import torch

    if torch.cuda.is_available():
        return Finding("CUDA", True, torch.cuda.get_device_name())
    return Finding("CUDA", False, "no usable NVIDIA GPU: engines run on the CPU")
