"""What `tocom --version` says."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from tocom.runtime.backends import BACKENDS

_LIBRARIES = ("torch", "timm", "onnx")


def versions() -> str:
    """The version of this package, and of the libraries that are installed, without importing one."""
    engines = (name for backend in BACKENDS.values() for name in backend.distributions)
    installed = {name: known for name in (*_LIBRARIES, *engines) if (known := _version(name)) is not None}
    libraries = ", ".join(f"{name} {known}" for name, known in installed.items())
    return f"tocom {_version('tocom') or 'unknown'} (Python {platform.python_version()}; {libraries or 'no engine'})"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
