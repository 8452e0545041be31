"""Every name of TensorRT that this project uses is there, with that signature, in each library it serves.

The code is type-checked against stubs that are made here from the libraries' docstrings. The wheels of full TensorRT's
bindings import once empty functions stand in for its libraries, so signatures can be read on any machine.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[4]
WHEELS = ROOT / "build/tensorrt-api"
STUBS = Path(__file__).with_name("tensorrt_stubs.py")

RTX = "TensorRT for RTX"
OLD, NEW = "10.16.1.11", "11.4.0.106"  # of TensorRT; a folder of WHEELS each
LIBRARIES = (OLD, NEW, RTX)

# File -> the libraries that it is handed.
CHECKED = {
    "runtime/engines/tensorrt/runner.py": LIBRARIES,
    "runtime/engines/tensorrt/lane.py": LIBRARIES,
    "runtime/engines/tensorrt/nvidia.py": (OLD, NEW),
    "runtime/engines/tensorrt/rtx.py": (RTX,),
    "export/engine/tensorrt/plan.py": LIBRARIES,
    "export/engine/tensorrt/register_plugin.py": (
        OLD,
        NEW,
    ),  # what it calls in tensorrt.plugin is Python, run by tests/export/plans/test_plugin.py
}
# Names that code which is handed any library uses, after a look at which one it is.
ONLY_IN_RTX = {"ComputeCapability", "num_compute_capabilities", "set_compute_capability"}
# Names of TensorRT's that other objects have as well, so that meeting them proves nothing.
COMMON = {"log", "type", "value", *(name for each in (list, str, slice, Path, np.ndarray) for name in dir(each))}
KINDS = {"attr-defined", "name-defined", "call-arg", "arg-type", "call-overload", "assignment", "index", "operator"}

# What the wheels' bindings expect of libraries that come separately.
SYMBOLS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL", "getPluginRegistry",
    "getBuilderPluginRegistry", "initLibNvInferPlugins", "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "getNvOnnxParserVersion",
)  # fmt: skip

# Code -> the libraries that have no such thing: the check can fail, and does so only where it must.
WITNESSES = {
    "trt.BuilderFlag.REFIT": (),
    "trt.BuilderFlag.FP16": (NEW, RTX),
    "config.int8_calibrator": (NEW, RTX),
    "trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH": (NEW, RTX),
    "config.num_compute_capabilities": (OLD, NEW),
    "config.set_flag(trt.BuilderFlag.REFIT)": (),
    "config.set_flag('REFIT')": LIBRARIES,
    "config.set_flag()": LIBRARIES,
    "config.builder_optimization_level.real": (),
    "context.set_tensor_address('x', 1)": (),
    "context.set_tensor_address(name='x', memory=1)": (),
    "context.set_tensor_address(name='x', address=1)": LIBRARIES,
    "context.set_input_shape('x', (1, 3))": (),
    "context.set_input_shape('x', 1)": LIBRARIES,
    "context.execute_async_v3('stream')": LIBRARIES,
    "context.execute_async_v2(1)": LIBRARIES,
    "context.engine.num_io_tensors.real": (),
    "context.engine.num_bindings": LIBRARIES,
}

CONFIGURATION = """\
[mypy]
follow_imports = skip
ignore_missing_imports = True
check_untyped_defs = True
explicit_package_bases = True
namespace_packages = True
[mypy-tensorrt,tensorrt_rtx]
follow_imports = normal
"""

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mypy") is None, reason="mypy is not installed: pip install 'tocom[dev]'"
)


class Finding(NamedTuple):
    """What the type checker says about a line."""

    file: str
    line: int
    message: str


@pytest.fixture(scope="module")
def stub(tmp_path_factory) -> Callable[..., str]:
    """Library -> its stub; with members=False one whose classes are empty."""
    folder = tmp_path_factory.mktemp("symbols")

    @cache
    def made(library: str, members: bool = True) -> str:
        package, environment = "tensorrt_rtx_bindings", {}
        if library == RTX:
            if importlib.util.find_spec("tensorrt_rtx") is None:
                pytest.skip("TensorRT for RTX is not installed: pip install 'tocom[tensorrt-rtx]'")
        else:
            if not (WHEELS / library).is_dir():
                pytest.skip(f"the bindings of TensorRT {library} were not fetched: make setup-tensorrt-api")
            package = "tensorrt_bindings"
            libraries = save_empty_libraries(folder, library.partition(".")[0])
            environment = {"PYTHONPATH": str(WHEELS / library), "LD_LIBRARY_PATH": str(libraries)}
        command = [sys.executable, str(STUBS), package, *(["--no-members"] * (not members))]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return made


def save_empty_libraries(folder: Path, major: str) -> Path:
    """Compiles libraries in which every function that the bindings need does nothing."""
    compiler = shutil.which("cc") or shutil.which("gcc") or pytest.skip("there is no C compiler: install gcc")
    folder = folder / major
    folder.mkdir(exist_ok=True)
    (folder / "empty.c").write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS))
    for name in ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser"):
        file = f"{name}.so.{major}"
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{file}", "-o", file, "empty.c"]
        subprocess.run(command, check=True, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def findings(tmp_path_factory, stub) -> Callable[..., list[Finding]]:
    """Library -> what is wrong with the code and the witnesses, all lines of all libraries' files included."""
    folder = tmp_path_factory.mktemp("checked")
    (folder / "mypy.ini").write_text(CONFIGURATION)
    files = [name for name in CHECKED if (ROOT / name).exists()]
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(bound((ROOT / name).read_text()))
    head = "import tensorrt_rtx as trt\ndef witnesses(config: trt.IBuilderConfig, context: trt.IExecutionContext): "
    (folder / "witnesses.py").write_text(head + "".join(f"\n    {code}" for code in WITNESSES))

    @cache
    def found(library: str, members: bool = True) -> list[Finding]:
        for name in ("tensorrt", "tensorrt_rtx"):  # whichever the code names, it is handed this one
            (folder / f"{name}.pyi").write_text(stub(library, members))
        options = ["--config-file=mypy.ini", "--no-site-packages", f"--cache-dir=cache-{library}-{members}"]
        command = [sys.executable, "-m", "mypy", *options, *files, "witnesses.py"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
        lines = re.findall(r"^([\w/]+\.py):(\d+): error: (.*)  \[([\w-]+)\]$", done.stdout, re.MULTILINE)
        assert "errors prevented further checking" not in done.stdout and not done.stderr, done.stdout + done.stderr
        return [Finding(file, int(line), message) for file, line, message, kind in lines if kind in KINDS]

    return found


def bound(source: str) -> str:
    """Code in which the library that a function is handed is the one whose types it names, line by line the same.

    A module that is handed over as a value has no type that a checker follows. So what is read from it is read from the
    imported one instead, and anything else that could be done with it is refused.
    """
    tree = ast.parse(source)
    imports = [name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
    alias = next((name.asname or name.name for name in imports if name.name in ("tensorrt", "tensorrt_rtx")), None)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation and ast.unparse(node.annotation) == "ModuleType":
            source = re.sub(rf"\b{node.arg}: ModuleType", f"{node.arg}: object", source)
            source = re.sub(rf"(?<![\w.])(?:self\._?)?{node.arg}\.(?=\w)", f"{alias}.", source)
    return source


def test_every_file_that_names_a_library_is_checked():
    files = [file for room in ("bench", "calib", "export", "runtime", "tocom") for file in (ROOT / room).rglob("*.py")]
    named = re.compile(r"^\s*(?:import|from) tensorrt(?:_rtx)?\b", re.MULTILINE)
    assert {file.relative_to(ROOT).as_posix() for file in files if named.search(file.read_text())} <= set(CHECKED)


@pytest.mark.parametrize("library", LIBRARIES)
def test_everything_used_is_there(library, findings):
    wrong = [
        finding
        for finding in findings(library)
        if library in CHECKED.get(finding.file, ())
        and not (library != RTX and any(f'"{name}"' in finding.message for name in ONLY_IN_RTX))
    ]
    assert not wrong, "\n".join(f"{file}:{line}: {message}" for file, line, message in wrong)


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_is_not_there_is_refused(library, findings):
    refused = {finding.line - 3 for finding in findings(library) if finding.file == "witnesses.py"}
    found = {code: number in refused for number, code in enumerate(WITNESSES)}
    assert found == {code: library in missing for code, missing in WITNESSES.items()}


def test_no_name_escapes_the_check(stub, findings):
    """Without members in the library's classes, every use of one is refused: the type before its dot is known."""
    members = set(re.findall(r"^ +(?:def )?([A-Za-z]\w*)[(:]", stub(RTX), re.MULTILINE)) - COMMON
    refused = {(finding.file, finding.line) for finding in findings(RTX, members=False)}
    used = {
        (name, node.lineno, node.attr)
        for name in CHECKED
        if (ROOT / name).exists()
        for node in ast.walk(ast.parse((ROOT / name).read_text()))
        if isinstance(node, ast.Attribute) and node.attr in members
    }
    assert {"execute_async_v3", "set_tensor_address", "deserialize_cuda_engine"} <= {
        attribute for *_, attribute in used
    }
    escaped = [f"{file}:{line}: .{attribute}" for file, line, attribute in used if (file, line) not in refused]
    assert not escaped, f"the check does not know what these are read from, annotate it: {', '.join(sorted(escaped))}"


@pytest.mark.parametrize("library", (OLD, NEW))
def test_what_only_one_library_has_is_told_rightly(library, stub):
    for name in ONLY_IN_RTX:
        assert re.search(rf"\b{name}\b", stub(RTX)) and not re.search(rf"\b{name}\b", stub(library))
