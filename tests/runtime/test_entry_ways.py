"""The ways into the runtime: as a file, as a copied folder, as the command, as a package, and the native build."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import onnxruntime
import PIL
import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILT_OR_CACHED = shutil.ignore_patterns("built", "__pycache__")


@pytest.fixture
def bare_site(tmp_path: Path) -> Path:
    """What a copied folder needs beside it, and nothing else: no tocom, no torch."""
    site = tmp_path / "site"
    site.mkdir()
    for package in (numpy, PIL, onnxruntime):
        packages = Path(package.__file__).parents[1]
        for name in ("numpy", "numpy.libs", "PIL", "pillow.libs", "onnxruntime", "flatbuffers", "google", "packaging"):
            if (packages / name).exists() and not (site / name).exists():
                (site / name).symlink_to(packages / name)
    return site


def run(*command: object, cwd: Path, **variables: object) -> str:
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, cwd=cwd, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_as_a_file_and_as_the_command_it_answers_the_same(family_folder: Path, photos: Path, tmp_path: Path) -> None:
    arguments = ("--engines", family_folder, "--json", "--top-k", 3, photos)
    answers = run(ROOT / "runtime/infer.py", *arguments, cwd=tmp_path)
    assert len(answers.splitlines()) == 6
    assert run("-m", "tocom", "infer", *arguments, cwd=tmp_path) == answers


@pytest.mark.parametrize("name", ["engine_room", "tocom-runtime-0.1"])
def test_a_copied_folder_runs_alone(
    family_folder: Path, photos: Path, tmp_path: Path, bare_site: Path, name: str
) -> None:
    """Under another name, from another folder, with no tocom beside it."""
    arguments = ("--engines", family_folder, "--json", photos)
    copy, elsewhere = tmp_path / "deployed" / name, tmp_path / "elsewhere"
    shutil.copytree(ROOT / "runtime", copy, ignore=BUILT_OR_CACHED)
    (copy.parent / "numpy.py").write_text("raise ImportError('what lies beside the folder is not to be imported')")
    elsewhere.mkdir()
    alone = run("-S", copy / "infer.py", *arguments, cwd=elsewhere, PYTHONPATH=bare_site)
    assert alone == run(ROOT / "runtime/infer.py", *arguments, cwd=tmp_path)
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('tocom') is not None)"
    run("-S", "-c", code, cwd=elsewhere, PYTHONPATH=bare_site)


def test_the_package_predicts_without_torch(family_folder: Path, photos: Path, tmp_path: Path) -> None:
    code = (
        "import sys; banned = ('torch', 'timm', 'onnx', 'rich', 'typer'); sys.modules.update(dict.fromkeys(banned))\n"
        f"import tocom\nwith tocom.load({str(family_folder)!r}) as family:\n"
        f"    (prediction,) = family.predict({str(photos / 'red/0.png')!r}, degree=8)\n"
        "    print(prediction.names[0], prediction.degree)"
    )
    assert run("-c", code, cwd=tmp_path) == "red 8\n"


def test_an_installed_package_builds_its_native_operator(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("there is no C++ compiler")
    package = tmp_path / "site/tocom"
    shutil.copytree(ROOT / "tocom", package, ignore=BUILT_OR_CACHED)
    shutil.copytree(ROOT / "runtime", package / "runtime", ignore=BUILT_OR_CACHED)
    variables = {"PYTHONPATH": package.parent, "XDG_CACHE_HOME": tmp_path / "cache"}
    told = run("-m", "tocom.runtime.native", cwd=tmp_path, **variables)
    (file,) = (package / "runtime/native/built").glob("*.so")
    assert told == f"native merge operator: {file}\n" and not (tmp_path / "cache").exists()
    code = "import tocom.runtime.backends as backends; print(*backends.native_operators('openvino'))"
    assert run("-c", code, cwd=tmp_path, **variables) == "TokenMerge\n"
