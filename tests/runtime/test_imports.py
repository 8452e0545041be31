"""Tests that the runtime runs without torch, timm and onnx, and that its imports point the right way."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import onnxruntime
import openvino
import PIL
import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted((ROOT / "runtime").rglob("*.py"))

# Library -> the only modules that may import it.
ENGINE_LIBRARIES = {
    "onnxruntime": ("runtime/engines/onnxruntime_engine.py",),
    "openvino": ("runtime/engines/openvino_engine.py", "runtime/engines/openvino_fusion.py"),
    "tensorrt": ("runtime/engines/tensorrt/nvidia.py",),
    # the last two for its types, which are TensorRT's as well
    "tensorrt_rtx": (
        "runtime/engines/tensorrt/rtx.py",
        "runtime/engines/tensorrt/runner.py",
        "runtime/engines/tensorrt/lane.py",
    ),
    "cuda": ("runtime/engines/tensorrt/device.py",),  # where it is first needed: a box without it can say so
    "google": ("runtime/engines/graph_file.py",),  # protobuf, which ONNX Runtime needs itself
}
ALLOWED = {"numpy", "PIL", *sys.stdlib_module_names}

# What the engine libraries need besides numpy.
NEEDED = ("numpy", "numpy.libs", "PIL", "pillow.libs", "onnxruntime", "flatbuffers", "google", "packaging", "openvino",
          "openvino_telemetry", f"openvino-{openvino.__version__.partition('-')[0]}.dist-info")  # fmt: skip

SCRIPT = """
import importlib, importlib.util, sys
sys.path[:] = [entry for entry in sys.path if "site-packages" not in entry]
sys.path += {paths!r}
for module in {modules!r}:
    importlib.import_module(module)
for missing in {missing!r}:
    try:
        importlib.import_module(missing)
    except ModuleNotFoundError as error:
        assert error.name.startswith("tensorrt"), error
    else:
        raise AssertionError(missing)
from runtime.infer import main
status = main({arguments!r})
for banned in ("torch", "timm", "onnx", "rich", "typer"):
    assert banned not in sys.modules, banned
    assert importlib.util.find_spec(banned) is None, banned
sys.exit(status)
"""


def imported(module: Path) -> set[str]:
    """Top-level names of everything a module imports, also inside its functions."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level or node.module.split(".")[0] != "tocom", f"{module}: a copied folder has another name"
            names |= set() if node.level else {node.module.partition(".")[0]}
    return names


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(ROOT)))
def test_imports_only_what_a_deployed_box_has(module):
    own = {name for name, owners in ENGINE_LIBRARIES.items() if str(module.relative_to(ROOT)) in owners}
    assert imported(module) <= ALLOWED | own


def test_runs_in_a_bare_environment(tmp_path, family_folder, photos):
    site = tmp_path / "site"
    site.mkdir()
    shutil.copytree(ROOT / "runtime", tmp_path / "runtime", ignore=shutil.ignore_patterns("built", "__pycache__"))
    for package in (numpy, PIL, onnxruntime, openvino):
        packages = Path(package.__file__).parents[1]
        for name in NEEDED:
            if (packages / name).exists() and not (site / name).exists():
                (site / name).symlink_to(packages / name)
    modules = [".".join(m.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for m in MODULES]
    missing = ["runtime.engines.tensorrt.nvidia", "runtime.engines.tensorrt.rtx"]
    modules = [name for name in modules if name not in missing]
    arguments = ["--engines", str(family_folder), str(photos)]
    script = SCRIPT.format(paths=[str(site), str(tmp_path)], modules=modules, missing=missing, arguments=arguments)
    command = [sys.executable, "-I", "-S", "-c", script]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 6 and "100.00% correct" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("door", ["tocom", "tocom.runtime.engines.onnxruntime_engine"])
@pytest.mark.parametrize("library", ["onnxruntime", "openvino"])
def test_no_engine_library_reports_to_its_makers(tmp_path, door, library):
    """Their reports begin with an identifier that they keep below HOME."""
    environment = {
        name: value for name, value in os.environ.items() if name[:4] not in ("XDG_", "ORT_") and name != "CI"
    }
    command = [sys.executable, "-c", f"import {door}, {library}"]
    subprocess.run(command, check=True, env=environment | {"HOME": str(tmp_path)}, cwd=ROOT)
    assert not list(tmp_path.iterdir())
