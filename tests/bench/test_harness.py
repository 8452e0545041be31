"""What campaigns share: state that a kill does not lose, one line for what goes wrong, pages from kept results."""

from __future__ import annotations

import ast
import doctest
import importlib
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Annotated

import pytest
import typer

from bench.harness import machine, page, run
from bench.harness.state import State
from tocom.runtime.errors import GateError, InputError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
PAGES = {"cpu": "cpu", "cpu-int8": "cpu", "cpu-onnxruntime": "cpu", "cpu-openvino-bf16": "cpu", "budgets": "budgets",
         "fuzz": "fuzz", "proof": "proof", "quantize": "quantize", "serving": "serving load",
         "serving-faults": "serving faults"}  # fmt: skip
QUICK = ("fuzz", "serving-faults")  # no pictures


def test_state_goes_on_and_refuses_other_settings(tmp_path: Path) -> None:
    file = tmp_path / "state.jsonl"
    State.load(file, {"seconds": 5, "cores": (0,)}).keep("1x", {"p99_ms": 3.0})
    again = State.load(file, {"seconds": 5, "cores": (0,)})
    assert again.results == {"1x": {"p99_ms": 3.0}}
    assert again.once("1x", lambda: pytest.fail("measured twice")) == {"p99_ms": 3.0}
    assert again.once("2x", lambda: (1, 2)) == [1, 2]
    with pytest.raises(InputError, match="--fresh"):
        State.load(file, {"seconds": 6, "cores": (0,)})
    assert State.load(file, {"seconds": 6}, fresh=True).results == {}


def test_a_line_that_a_kill_cut_off_is_measured_again(tmp_path: Path) -> None:
    state = State.load(tmp_path / "state.jsonl", {})
    state.keep("a", 1)
    state.keep("b", "long" * 10)
    state.file.write_text(state.file.read_text()[:-20])
    again = State.load(state.file, {})
    assert again.results == {"a": 1}
    again.keep("b", 2)
    again.keep("b", 3)  # the last line of a name counts
    assert State.load(state.file, {}).results == {"a": 1, "b": 3}
    again.forget(["a", "nobody"])
    assert State.load(state.file, {}).results == {"b": 3}


@pytest.mark.parametrize("content", ["", "[]\n", "{}\n", "no JSON\n"])
def test_another_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "state.jsonl").write_text(content)
    with pytest.raises(InputError, match="of other settings"):
        State.load(tmp_path / "state.jsonl", {})


def test_cases_that_are_finished_are_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = []
    state = State.load(tmp_path / "state.jsonl", {})
    for _ in range(2):
        assert run.run_cases(state, {"a": lambda: ran.append("a") or 1, "b": lambda: ran.append("b") or 2}) == {
            "a": 1, "b": 2
        }  # fmt: skip
    assert ran == ["a", "b"] and "b (2 of 2)" in capsys.readouterr().err


def _campaign(what: Annotated[str, typer.Option()] = "") -> None:
    """Does nothing."""
    problems = {"input": InputError("two\nlines"), "gate": GateError("too far"), "kill": KeyboardInterrupt()}
    if what:
        raise problems[what]


@pytest.mark.parametrize(("arguments", "status", "told"), [
    ([], 0, ""),
    (["--what", "input"], 2, "it: two lines\n"),
    (["--what", "gate"], 1, "it: too far\n"),
    (["--what", "kill"], 130, "it: interrupted; the same command goes on\n"),
    (["--nonsense"], 2, "it: No such option: --nonsense\n"),
])  # fmt: skip
def test_what_goes_wrong_is_one_line(arguments, status, told, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run.main("it", _campaign, arguments=arguments)
    assert (left.value.code, capsys.readouterr().err) == (status, told)


def test_options_are_checked() -> None:
    assert run.numbers("batches", "1,8", 1) == (1, 8) and run.names("only", "b", ("a", "b")) == ["b"]
    assert run.names("only", "", ("a", "b")) == ["a", "b"] and run.matching("only", "IM", ("image", "x")) == ["image"]
    for wrong in (lambda: run.numbers("batches", "0", 1), lambda: run.numbers("batches", "4,x"),
                 lambda: run.names("only", "c", ("a",)), lambda: run.matching("only", "c", ("a", "b"))):  # fmt: skip
        with pytest.raises(InputError, match="--(batches|only) must be"):
            wrong()
    assert run.Common(quick=True).places("cpu").page == ROOT / "build/bench/cpu/quick/cpu.md"
    assert run.Common(work=Path("x")).places("cpu").state == Path("x/state.jsonl")


def test_tables_and_texts() -> None:
    shown = page.table([{"who": "a", "n": 1, "share": "50%"}, {"who": "b | c", "n": None, "share": "-"}])
    assert [line.replace(" ", "") for line in shown.splitlines()] == [
        "|who|n|share|", "|:------|----:|--------:|", "|a|1|50%|", "|b|c||-|"
    ]  # fmt: skip
    assert page.cell("a | `b`\x1b") == "`` a \\| 'b'? ``" and page.cell("") == ""
    assert doctest.testmod(page).failed == 0 and doctest.testmod(page).attempted == 2


def test_results_stand_on_a_line_each(tmp_path: Path) -> None:
    results = {"setup": {"date": "x"}, "rows": [{"a": 1, "b": [1, 2]}, {"a": 2}], "deep": {"c": {"d": [{"e": 1}]}}}
    page.write_results(tmp_path / "results.json", results)
    assert '{"a": 1, "b": [1, 2]},\n{"a": 2}' in (tmp_path / "results.json").read_text()
    assert page.read_results(tmp_path / "results.json") == results
    with pytest.raises(InputError, match="without --report-only"):
        page.read_results(tmp_path / "none.json")


def test_the_machine_is_told_in_a_line() -> None:
    told = machine.machine()
    assert "\n" not in told and " cores, load average " in told
    assert machine.versions(["typer", "no-such-thing"]).startswith("typer ")


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.bench)
                                  for name in PAGES])  # fmt: skip
def test_pages_follow_from_kept_results(name: str, tmp_path: Path) -> None:
    shutil.copy(RESULTS / f"{name}.json", tmp_path)
    module, *command = PAGES[name].split()
    loaded = importlib.import_module(f"bench.{module}.__main__")
    commands = [getattr(loaded, each) for each in (("load", "faults") if module == "serving" else (module,))]
    with pytest.raises(SystemExit) as left:
        run.main(module, *commands, arguments=[*command, "--report-only", "--out", str(tmp_path / f"{name}.md")])
    assert left.value.code == 0
    assert (tmp_path / f"{name}.md").read_text() == (RESULTS / f"{name}.md").read_text()


@pytest.mark.bench
def test_the_experiment_follows_from_its_results(tmp_path: Path) -> None:
    from bench.experiment.__main__ import experiment

    with pytest.raises(SystemExit) as left:
        run.main("it", experiment, arguments=["--report-only", "--out", str(tmp_path / "experiment.md")])
    assert left.value.code == 0
    assert (tmp_path / "experiment.md").read_text() == (ROOT / "docs" / "experiment.md").read_text()


def test_every_page_and_picture_has_its_results() -> None:
    assert {file.stem for file in RESULTS.glob("*.md") if not file.stem.startswith("gpu-")} == set(PAGES)
    shown = "".join(file.read_text() for folder in ("bench/results", "docs") for file in (ROOT / folder).rglob("*.md"))
    assert [file.name for file in RESULTS.glob("*.png") if file.name not in shown] == []


@pytest.mark.bench
@pytest.mark.parametrize("name", ["cpu", "gpu", "experiment", "quantize", "budgets", "serving", "fuzz", "proof"])
def test_help(name: str) -> None:
    done = subprocess.run([sys.executable, "-m", f"bench.{name}", "--help"], cwd=ROOT, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0 and "Usage:" in done.stdout and not done.stderr


def test_nothing_is_imported_in_a_circle() -> None:
    files = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in (ROOT / "bench").rglob("*.py")}
    arrows = {}
    for name, file in files.items():
        found = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
        modules = {node.module for node in found if node.module}
        modules |= {f"{node.module}.{alias.name}" for node in found for alias in node.names}
        arrows[name] = modules & files.keys()
    assert list(TopologicalSorter(arrows).static_order())
