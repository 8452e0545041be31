"""Parts of this package that are installed by name, and the one line that says so where one is missing."""

from __future__ import annotations

from importlib.util import find_spec

from tocom.runtime.backends import BACKENDS
from tocom.runtime.errors import InputError

# Extra -> the modules that it brings and that the command cannot do without, as pyproject.toml has them.
EXTRAS = {
    "compile": ("torch", "timm", "onnx", "onnx_ir", "onnxscript", "safetensors", "ml_dtypes", "tomli_w"),
    "distill": ("torch", "timm", "safetensors", "torchvision", "lightning_fabric", "tensorboardX"),
    "report": ("matplotlib",),
    "polygraphy": ("polygraphy", "onnx_graphsurgeon"),
    "serve": ("mlserver", "uvicorn", "prometheus_client", "httptools"),
    "ray": ("ray",),
}


def require_extra(extra: str, doing: str) -> None:
    """Checks that what a command needs is installed, without importing it.

    Args:
        extra: One of `EXTRAS`.
        doing: What needs it, for the message.

    Raises:
        InputError: If something is missing.
    """
    missing = next((name for name in EXTRAS[extra] if find_spec(name) is None), None)
    if missing is not None:
        raise InputError(f"{doing} needs {missing}, which is not installed: pip install 'tocom[{extra}]'")


def require_engine() -> None:
    """Checks that at least one library is installed that runs engines, without importing it.

    Raises:
        InputError: If there is none.
    """
    if all(find_spec(backend.library) is None for backend in BACKENDS.values()):
        raise InputError("running an engine needs an engine library, and none is installed: pip install 'tocom[cpu]', "
                         "or 'tocom[gpu]' for NVIDIA GPUs")  # fmt: skip
