"""Which room may import which: the arrows of CONTRIBUTING.md."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "tocom": set(),
    "runtime": set(),
    "serving": {"runtime"},
    "calib": {"tocom", "runtime"},
    "export": {"calib", "serving", "tocom", "runtime"},
}


def imported(file: Path) -> set[str]:
    """Top-level names of every import in a file, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_follow_the_arrows(room: str) -> None:
    files = list((ROOT / room).rglob("*.py"))
    assert files
    rooms = {*ALLOWED, "examples", "bench", "tests"}
    for file in files:
        assert (imported(file) & rooms) - {room} <= ALLOWED[room], file


def test_an_engine_library_is_imported_by_its_own_modules_only() -> None:
    libraries = {
        "onnxruntime": ("ort.py",),
        "openvino": ("ov.py", "ov_fusion.py"),
        "tensorrt": ("tensorrt_nvidia.py",),
        "tensorrt_rtx": ("tensorrt_rtx.py", "trt.py", "lane.py"),  # the last two for its types only
        "cuda": ("device.py",),
    }
    for file in (ROOT / "runtime").rglob("*.py"):
        for library in imported(file) & libraries.keys():
            assert file.name in libraries[library] and file.parent.name == "engines"


def test_runtime_imports_without_torch() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'timm', 'onnx', 'rich', 'typer')))\n"
        "import tocom.runtime.infer, tocom.runtime.degrees.latency, tocom.runtime.engines.onnxruntime_engine"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_help_answers_without_torch() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'timm', 'onnx')))\n"
        "sys.argv = ['tocom', 'compile', '--help']\nimport tocom.export.cli.__main__\nexport.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert "--source-degree" in done.stdout


def test_no_crowded_files() -> None:
    """Past 400 lines a second job has crept in."""
    for room in ALLOWED:
        for file in (ROOT / room).rglob("*.py"):
            assert len(file.read_text().splitlines()) <= 400, file
