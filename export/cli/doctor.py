"""`tocom doctor`: which engines can run on this machine, which can be built for others, and why not."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec

from tocom.export.cli.console import open_console
from tocom.export.cli.extras import EXTRAS
from tocom.runtime.backends import BACKENDS, Backend, available
from tocom.runtime.errors import InputError


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis."""

    name: str
    usable: bool
    detail: str


def doctor_command() -> None:
    """Say which engines can run on this machine, and why the others cannot.

    Looks at every engine library, NVIDIA's GPU, and what the compiler needs, and names what to install. Writes nothing.

    Examples of use:

        tocom doctor

    Exit status: 0 done.

    See also: `tocom --version`, `tocom inspect`.
    """
    from rich.markup import escape
    from rich.table import Table

    table = Table("part", "usable", "detail")
    for finding in diagnose():
        table.add_row(finding.name, "[green]yes[/]" if finding.usable else "[yellow]no[/]", escape(finding.detail))
    open_console().print(table)


def diagnose() -> list[Finding]:
    """Looks at every engine library, without loading an engine."""
    findings = [Finding(f"engine {status.name}", status.usable, status.detail) for status in available()]
    findings += [_plans(row) for row in BACKENDS.values() if row.builds_without_device]
    findings.append(_cuda())
    findings.append(_compiler())
    return findings


def _compiler() -> Finding:
    missing = [name for name in EXTRAS["compile"] if find_spec(name) is None]
    if missing:
        return Finding("compiler", False, f"{', '.join(missing)} not installed: pip install 'tocom[compile]'")
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "onnx", "onnxscript"))
    return Finding("compiler", True, f"{libraries}, Python {platform.python_version()}")


def _plans(backend: Backend) -> Finding:
    name = "plans for NVIDIA GPUs"
    try:
        return Finding(name, True, f"{backend.name} {backend.version()} builds them here; running needs a GPU")
    except InputError:
        return Finding(name, False, f"not installed: pip install 'tocom[{backend.extra}]'")


def _cuda() -> Finding:
    if find_spec("torch") is None:  # then TensorRT's bindings are who can tell
        from tocom.runtime.engines.tensorrt import device

        why = device.unusable()
        return Finding("CUDA", why is None, why or device.describe())
    import torch

    if torch.cuda.is_available():
        return Finding("CUDA", True, torch.cuda.get_device_name())
    return Finding("CUDA", False, "no usable NVIDIA GPU: engines run on the CPU")
