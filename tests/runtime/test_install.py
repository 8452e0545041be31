"""The wheel: one top-level name, and with an engine library alone it runs families, without torch, timm or onnx."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.metadata import Distribution, distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]

# runs `tocom ARGUMENTS` as the console script does, from the folders given, and from none of this environment's own
COMMAND = """
import sys
sys.path[:] = [entry for entry in sys.path if "site-packages" not in entry] + {paths!r}
sys.argv = ["tocom", *{arguments!r}]
from tocom.export.cli.__main__ import main
try:
    main()
finally:
    for banned in ("torch", "timm", "onnx", "torchvision", "safetensors"):
        assert banned not in sys.modules, banned
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from what git would check out: a stale build/ folder must not end up in it."""
    folder = tmp_path_factory.mktemp("wheel")
    names = ["pyproject.toml", "README.md", "LICENSE", "calib", "export", "runtime", "serving", "tocom"]
    source = folder / "source"
    source.mkdir()
    for name in names:
        (source / name).symlink_to(ROOT / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        source,
    ]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Folders for `sys.path` that hold what `pip install 'tocom[cpu]'` brings, and nothing else."""
    site = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(site)
    engine = packages_distributions()["onnxruntime"][0]  # of a CPU or a GPU
    wheels_own = Distribution.at(next(site.glob("tocom-*.dist-info")))
    for name in (*_required(wheels_own), engine):
        _link(name, site, set())
    return [str(site)]


def _required(installed: Distribution) -> list[str]:
    """Names of the distributions that one needs, extras aside."""
    requirements = map(Requirement, installed.requires or ())
    return [one.name for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]


def _link(name: str, site: Path, linked: set[str]) -> None:
    """Links the files of a distribution and of all that it requires."""
    if name in linked:
        return
    linked.add(name)
    here = distribution(name)
    for top in {file.parts[0] for file in here.files or ()} - {"..", "__pycache__", "bin"}:
        if not (site / top).exists():
            (site / top).symlink_to(here.locate_file(top))
    for required in _required(here):
        _link(required, site, linked)


def run(paths: list[str], *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    code = COMMAND.format(paths=paths, arguments=list(map(str, arguments)))
    return subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, cwd=cwd)


def test_the_wheel_has_one_top_level_name(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"tocom"}
    for needed in (
        "tocom/serving/page/index.html",
        "tocom/runtime/native/token_merge.h",
        "tocom/export/cli/__main__.py",
    ):
        assert needed in names
    assert not [name for name in names if name.endswith(".so") or "test" in name]


def test_the_light_install_infers(installed: list[str], family_folder: Path, photos: Path, tmp_path: Path) -> None:
    done = run(installed, "infer", "--engines", family_folder, photos, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 6


def test_the_light_install_inspects(installed: list[str], family_folder: Path, tmp_path: Path) -> None:
    done = run(installed, "inspect", family_folder, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "degree" in done.stdout


def test_the_light_install_says_what_there_is(installed: list[str], tmp_path: Path) -> None:
    done = run(installed, "doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "onnxruntime" in done.stdout and "tocom[compile]" in done.stdout + done.stderr


def test_the_light_install_cannot_compile_and_says_why(installed: list[str], tmp_path: Path) -> None:
    done = run(installed, "compile", "--model", "deit_tiny_patch16_224", "--degrees", "8", "--out", "f", cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "tocom[compile]" in done.stderr
    assert not (tmp_path / "f").exists()


def test_the_public_door_opens_without_torch(
    installed: list[str], family_folder: Path, photos: Path, tmp_path: Path
) -> None:
    code = (
        f"import sys; sys.path[:] = [e for e in sys.path if 'site-packages' not in e] + {installed!r}\n"
        "import tocom; assert 'numpy' not in sys.modules\n"
        f"family = tocom.load({str(family_folder)!r}); image = {str(next(photos.rglob('*.*')))!r}\n"
        "assert len(family.predict(image)) == 1 and 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
