"""The native merge operator: compiled from C++ on the machine that runs it, and found again by the engines.

It lies in this folder's built/, or in the user's cache where that cannot be written, as in a package that somebody else
installed. Without a compiler nothing is lost but speed: engines are then built from the operator's function body.
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
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from ..errors import InputError, one_line
from ..files import user_cache

SOURCE = Path(__file__).resolve().parent
BUILT = SOURCE / "built"
COMMAND = f"python -m {__name__}"  # builds it

_FILES = ("openvino_operators.cpp", "token_merge.h", "rows.h", "number.h")
_LIBRARIES = ("libopenvino", "libopenvino_onnx_frontend", "libtbb")
# -march=native, because the library is made for the machine it is compiled on. NaN is among the inputs: no -ffast-math.
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-Wall")


def library() -> Path | None:
    """The compiled operator for the OpenVINO that is installed and this processor; None if there is none."""
    try:
        name = _name()
    except PackageNotFoundError:
        return None
    return next((folder / name for folder in _folders() if (folder / name).is_file()), None)


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
        while values := native.tocom_recorded(ctypes.c_size_t(len(calls)), ctypes.byref(count)):
            calls.append(np.ctypeslib.as_array(values, (count.value,)).copy())
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
        InputError: OpenVINO or a compiler is missing, the compiler fails, or no folder can be written; the message says
            what to do.
    """
    try:
        name = _name()
    except PackageNotFoundError:
        raise InputError(
            "the native merge operator needs OpenVINO, which is not installed: pip install openvino"
        ) from None
    if not force and (file := library()) is not None:
        return file
    folder = _writable(_folders())
    _compile(folder / name)
    for old in set(folder.glob("*.so")) - {folder / name}:
        old.unlink(missing_ok=True)
    return folder / name


def _folders() -> tuple[Path, ...]:
    """Where the library may lie, the best place first."""
    cache = user_cache()
    return (BUILT,) if cache is None else (BUILT, cache / "native")


def _writable(folders: tuple[Path, ...]) -> Path:
    """The first folder that can be written; it is made if it is not there.

    Raises:
        InputError: None can.
    """
    reasons = []
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError as error:
            reasons.append(f"{one_line(folder)} ({error.strerror})")
    raise InputError(f"the native merge operator cannot be written to {' or to '.join(reasons)}")


def _compile(file: Path) -> None:
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
        done = subprocess.run([*command, "-o", str(temporary)], check=False, capture_output=True, text=True)
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
            raise InputError(f"the native merge operator does not compile here ({one_line(first)}); engines use the "
                             "function body instead")  # fmt: skip
        temporary.replace(file)
    except OSError as error:
        raise InputError(
            f"the native merge operator cannot be written to {one_line(file.parent)}: {error.strerror}"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _compiler() -> str:
    compilers = (os.environ["CXX"],) if os.environ.get("CXX") else ("c++", "g++", "clang++")
    for name in compilers:
        if path := shutil.which(name):
            return path
    raise InputError(f"there is no C++ compiler ({', '.join(compilers)}): engines use the merge operator's function "
                     f"body, which is slower; install one and run `{COMMAND}`")  # fmt: skip


def _name() -> str:
    """Name of the library: it follows from the sources, OpenVINO's version and the processor.

    Raises:
        PackageNotFoundError: OpenVINO is not installed.
    """
    digest = hashlib.sha256()
    for name in _FILES:
        digest.update((SOURCE / name).read_bytes())
    for text in (version("openvino"), " ".join(_FLAGS), platform.machine(), _processor()):
        digest.update(text.encode() + b"\n")
    return f"openvino-{digest.hexdigest()[:16]}.so"


@functools.cache
def _processor() -> str:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def main() -> int:
    """Compiles the operator and says so; where that is not possible, says why and ends well all the same."""
    try:
        file = build()
        elsewhere = "" if file.parent == BUILT else f", because {BUILT} cannot be written"
        print(f"native merge operator: {file}{elsewhere}")
    except InputError as error:
        print(f"native merge operator: {error}", file=sys.stderr)
    return 0
