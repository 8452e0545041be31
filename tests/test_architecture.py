"""Which room may import which, and that nothing is imported in a circle: the arrows of CONTRIBUTING.md."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("calib", "export", "runtime", "serving", "tocom")

# Room -> the rooms that it may import. A room's folders below are part of it, unless they are named here.
_BASE = {"tocom", "calib", "runtime"}
_COMPILER = {"export", "export.graph", "export.engine"}
_SERVERS = {"serving", "serving.service", "serving.protocol", "serving.mlserver", "serving.ray", "serving.triton"}
ALLOWED = {
    "runtime": set(),
    "tocom": {"runtime"},
    "calib": {"tocom", "runtime"},
    "serving": {"runtime"},
    "serving.service": {"runtime"},
    "serving.protocol": {"serving.service", "runtime"},
    "serving.mlserver": {"serving", "serving.service", "serving.protocol", "runtime"},
    "serving.ray": {"serving", "serving.service", "serving.protocol", "runtime"},
    "serving.triton": {"serving", "runtime"},
    "export": {"tocom", "runtime"},
    "export.graph": {"export", *_BASE},
    "export.engine": {"export", "export.graph", *_BASE},
    "export.source": {*_COMPILER, *_BASE},
    "export.proof": {*_COMPILER, "export.source", *_BASE},
    "export.family": {*_COMPILER, "export.source", "export.proof", *_BASE},
    "export.cli": {*_COMPILER, "export.source", "export.proof", "export.family", *_SERVERS, *_BASE},
}


@cache
def modules() -> dict[str, Path]:
    """Every module of the product, named without the `tocom.` in front: the package of that name is "tocom"."""
    found = {}
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name] = file
    return found


def imports(name: str) -> set[str]:
    """Modules of the product that a module imports, inside functions too, but not for type checkers alone."""
    file, found = modules()[name], set()
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(file.read_text())
    typing = {
        child for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }  # fmt: skip
    for node in ast.walk(tree):
        if node in typing:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                found |= _ours(alias.name, ())
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                above = ".".join(parts[: len(parts) - node.level + 1])
                base = "tocom." + ".".join(part for part in (above, base) if part)
            found |= _ours(base, [alias.name for alias in node.names])
    return found - {name}


def _ours(module: str, names: Iterable[str]) -> set[str]:
    if module.split(".")[0] != "tocom":
        return set()
    rest = module.removeprefix("tocom").removeprefix(".")
    own = rest if rest.split(".")[0] in PACKAGES else ".".join(part for part in ("tocom", rest) if part)
    found = set()
    for name in names:
        full = f"{own}.{name}" if own != "tocom" or name not in PACKAGES else name
        found.add(full if full in modules() else own)
    return (found or {own}) & modules().keys()


def room_of(name: str) -> str:
    parts = name.split(".")
    return next(room for n in range(len(parts), 0, -1) if (room := ".".join(parts[:n])) in ALLOWED)


# The public door and `python -m tocom` stand in front of the house: they open what lies behind, when it is asked for.
DOORS = {"tocom": {"runtime"}, "tocom.__main__": {"export.cli"}}


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_follow_the_arrows(room: str) -> None:
    inside = [name for name in modules() if room_of(name) == room]
    assert inside
    for name in inside:
        wrong = {
            other for other in imports(name) if room_of(other) not in ALLOWED[room] | {room} | DOORS.get(name, set())
        }
        assert not wrong, f"{name} imports {sorted(wrong)}"


def circle(arrows: Mapping[str, set[str]]) -> list[str] | None:
    """One circle among the arrows; None where there is none."""
    try:
        tuple(TopologicalSorter(arrows).static_order())
    except CycleError as error:
        return error.args[1]
    return None


def test_no_file_imports_itself_by_a_detour() -> None:
    assert circle({name: imports(name) for name in modules() if name not in DOORS}) is None


def test_no_folder_imports_itself_by_a_detour() -> None:
    """A folder's `__init__` counts as the folder; what lies deeper is a folder of its own.

    A folder and what lies in it may use each other, as a package's front door does: there the files decide.
    """
    arrows: dict[str, set[str]] = {}
    for name in modules():
        folder = folder_of(name)
        others = {folder_of(other) for other in imports(name)} if name not in DOORS else set()
        arrows.setdefault(folder, set()).update(other for other in others if not _nested(folder, other))
    assert circle(arrows) is None


def _nested(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def folder_of(name: str) -> str:
    return name if modules()[name].name == "__init__.py" else name.rpartition(".")[0]


def test_a_circle_would_be_seen() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) is not None
    assert "runtime.manifest" in imports("runtime.predictor")
    assert "runtime.errors" in imports("tocom.merging") | imports("tocom.schedule")


def test_everything_is_imported_by_its_one_name() -> None:
    """From the repository's folder `import runtime` would find a second copy, with an InputError of its own."""
    for folder in (*PACKAGES, "bench", "tests", "examples"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and node.level == 0:
                    named = [node.module or ""]
                else:
                    named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                for name in named:
                    assert name.split(".")[0] not in set(PACKAGES) - {"tocom"}, f"{file}: import tocom.{name}"


def test_every_folder_is_installed() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {folder_of(name) for name in modules()}
    assert {name if name == "tocom" else f"tocom.{name}" for name in folders} == set(setuptools["packages"])
    assert {folder.split(".")[0] for folder in folders} == set(setuptools["package-dir"].values())


def test_export_has_few_doors() -> None:
    entries = [entry for entry in (ROOT / "export").iterdir() if entry.name != "__pycache__"]
    assert len(entries) <= 8, sorted(entry.name for entry in entries)


def test_runtime_imports_without_torch() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'timm', 'onnx', 'rich', 'typer')))\n"
        "import tocom.runtime.infer, tocom.runtime.degrees.latency, tocom.runtime.engines.onnxruntime_engine"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_help_answers_without_torch() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'timm', 'onnx')))\n"
        "sys.argv = ['tocom', 'compile', '--help']\nfrom tocom.__main__ import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert "--source-degree" in done.stdout


def test_no_crowded_files() -> None:
    """Past 400 lines a second job has crept in."""
    for file in modules().values():
        assert len(file.read_text().splitlines()) <= 400, file
