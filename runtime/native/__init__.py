"""The native merge operator: compiled from C++ on the machine that runs it, and found again by the engines.

Without a compiler nothing is lost but speed: engines are then built from the operator's function body.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from ..errors import InputError, one_line

SOURCE = Path(__file__).resolve().parent
BUILT = SOURCE / "built"

_FILES = ("openvino_operators.cpp", "token_merge.h", "rows.h", "number.h")
_LIBRARIES = ("libopenvino", "libopenvino_onnx_frontend", "libtbb")
# -march=native, because the library is made for the machine it is compiled on. NaN is among the inputs: no -ffast-math.
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-Wall")


def library() -> Path | None:
    """The compiled operator for the OpenVINO that is installed and this processor; None if there is none."""
    try:
        file = _place()
    except PackageNotFoundError:
        return None
    return file if file.is_file() else None


def record(run: Callable[[], object]) -> list[np.ndarray]:
    """Runs something, and says what the native operator decided meanwhile.

    One at a time in a process; whatever else merges meanwhile is recorded too.

    Args:
        run: Runs engines with the native operator.

    Returns:
        Of every call of the operator, in order: src [B, r], dst [B, r] and unm [B, A - r], one behind the other.
    """
    native = ctypes.CDLL(str(library()))
    native.tocom_recorded.restype = ctypes.POINTER(ctypes.c_int64)
    calls: list[np.ndarray] = []
    native.tocom_record(1)
    try:
        run()
        count = ctypes.c_size_t()
        while found := native.tocom_recorded(ctypes.c_size_t(len(calls)), ctypes.byref(count)):
            calls.append(np.ctypeslib.as_array(found, (count.value,)).copy())
    finally:
        native.tocom_record(0)
    return calls


def build(*, force: bool = False) -> Path:
    """Compiles the operator, unless that is done.

    Args:
        force: Compile in any case.

    Returns:
        The library.

    Raises:
        InputError: OpenVINO or a compiler is missing, or the compiler fails; the message says what to do.
    """
    try:
        file = _place()
    except PackageNotFoundError:
        raise InputError(
            "the native merge operator needs OpenVINO, which is not installed: pip install openvino"
        ) from None
    if file.is_file() and not force:
        return file
    package = Path(importlib.util.find_spec("openvino").submodule_search_locations[0])
    command = [
        _compiler(),
        *_FLAGS,
        "-isystem",
        str(package / "include"),
        str(SOURCE / _FILES[0]),
        *(str(next((package / "libs").glob(f"{name}.so.*"))) for name in _LIBRARIES),
    ]
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        BUILT.mkdir(exist_ok=True)
        done = subprocess.run([*command, "-o", str(temporary)], check=False, capture_output=True, text=True)
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
            raise InputError(f"the native merge operator does not compile here ({one_line(first)}); engines use the "
                             "function body instead")  # fmt: skip
        temporary.replace(file)
    except OSError as error:
        raise InputError(
            f"the native merge operator cannot be written to {one_line(BUILT)}: {error.strerror}"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    for old in set(BUILT.glob("*.so")) - {file}:
        old.unlink(missing_ok=True)
    return file


def _compiler() -> str:
    wanted = (os.environ["CXX"],) if os.environ.get("CXX") else ("c++", "g++", "clang++")
    for name in wanted:
        if found := shutil.which(name):
            return found
    raise InputError(f"there is no C++ compiler ({', '.join(wanted)}): engines use the merge operator's function body, "
                     "which is slower; install one and run `make native`")  # fmt: skip


def _place() -> Path:
    """Where the library belongs: its name follows from the sources, OpenVINO's version and the processor.

    Raises:
        PackageNotFoundError: OpenVINO is not installed.
    """
    digest = hashlib.sha256()
    for name in _FILES:
        digest.update((SOURCE / name).read_bytes())
    for text in (version("openvino"), " ".join(_FLAGS), platform.machine(), _processor()):
        digest.update(text.encode() + b"\n")
    return BUILT / f"openvino-{digest.hexdigest()[:16]}.so"


@functools.cache
def _processor() -> str:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def main() -> int:
    """Compiles the operator and says so; where that is not possible, says why and ends well all the same."""
    try:
        print(f"native merge operator: {build()}")
    except InputError as error:
        print(f"native merge operator: {error}", file=sys.stderr)
    return 0
