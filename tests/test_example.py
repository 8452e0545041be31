"""The shipped example does what the README says it does."""

from __future__ import annotations

import doctest
import subprocess
import sys
from pathlib import Path

import pytest

from tocom.export.family.compile import compile_family
from tocom.export.source.options import CompileOptions
from tocom.runtime.manifest import Family

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "digits"


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engines") / "digits"
    options = CompileOptions(
        model=str(EXAMPLE),
        out=out,
        degrees=(16,),
        compensator=EXAMPLE / "compensator.safetensors",
        source_degree=0,
        images=EXAMPLE / "sheets",
    )
    assert not compile_family(options).failed
    return out


@pytest.mark.full
def test_the_compensator_gives_back_what_merging_takes(engines: Path) -> None:
    family = Family.read(engines)
    plain, merged = family.entry(0).accuracy, family.entry(16).accuracy
    assert plain["images"] >= 1000
    assert plain["top1"] >= 0.92
    assert plain["top1"] == plain["top1_without_compensator"]  # nothing to compensate at the source degree
    assert merged["top1_without_compensator"] < plain["top1"] - 0.05  # merging really hurts here
    assert merged["top1"] >= merged["top1_without_compensator"] + 0.03
    assert family.entry(16).gmacs < family.entry(0).gmacs / 1.8


@pytest.mark.full
def test_infer_as_a_script(engines: Path) -> None:
    """As the README shows it, from another folder, and agreeing with what the compile measured."""
    script = [sys.executable, ROOT / "runtime" / "infer.py", "--engines", engines, "--degree", "16", EXAMPLE]
    done = subprocess.run(script, capture_output=True, text=True, check=True, cwd=engines)
    assert len(done.stdout.splitlines()) == Family.read(engines).entry(16).accuracy["images"]
    assert f"{Family.read(engines).entry(16).accuracy['top1']:.2%} correct" in done.stderr


@pytest.mark.full
def test_the_python_api_does_what_its_page_shows(
    engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "digits").symlink_to(engines)
    (tmp_path / "sheets").symlink_to(EXAMPLE / "sheets")
    flags = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
    page = str(ROOT / "docs" / "python-api.md")
    found = doctest.testfile(page, module_relative=False, optionflags=flags, encoding="utf-8")
    assert found.failed == 0
    assert found.attempted > 15


def test_binaries_stay_small() -> None:
    """10 MB of binary files in all."""
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT, check=False).stdout
    files = [ROOT / name for name in listed.split("\0") if name] or list(EXAMPLE.rglob("*.*"))
    binary = [file for file in files if file.suffix in (".png", ".safetensors", ".onnx", ".bin") and file.exists()]
    assert binary
    assert sum(Path(file).stat().st_size for file in binary) < 10e6
