"""What a GPU machine is, without its name."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
from contextlib import suppress

import torch

_LIBRARIES = (
    "torch", "timm", "triton", "onnx", "onnx-ir", "onnxscript", "onnxruntime-gpu", "tensorrt-rtx-cu13", "tensorrt-rtx",
    "tensorrt-cu13", "tensorrt-cu12", "tensorrt", "cuda-bindings",
)  # fmt: skip


def describe() -> dict[str, str]:
    """The current CUDA device, its driver, and the libraries that are installed, by name."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    found = {
        "GPU": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "driver": _driver(),
        "CUDA": str(torch.version.cuda),
        "Python": platform.python_version(),
    }
    for name in _LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {**found, "torch": torch.__version__}  # which also tells the build


def slug(name: str) -> str:
    """A GPU's name as part of a file name.

    >>> slug("NVIDIA H200")
    'nvidia-h200'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _driver() -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            check=True, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return next(iter(done.stdout.split()), "unknown")
