"""The documentation: links lead somewhere, and commands run as written."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from tocom.export.cli.__main__ import COMMANDS, make_app
from tocom.runtime.infer import option_names

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    page
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bench/**/*.md"))
    if "build" not in page.relative_to(ROOT).parts
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {_anchor(heading) for heading in headings}


def _anchor(heading: str) -> str:
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
    kept = (c for c in text if c in " -_" or unicodedata.category(c)[0] in "LN")
    return "".join(kept).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target}: there is no {file}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{target}: no such heading"


def test_headings_become_anchors_as_on_github() -> None:
    assert _anchor("family.json (format 1)") == "familyjson-format-1"
    assert _anchor("What `r` is, and why") == "what-r-is-and-why"


GUIDES = [page for page in PAGES if page.name != "cli.md" and "studies" not in page.parts and "bench" not in page.parts]
NAMES = [name for commands in COMMANDS.values() for name in commands]


def shown(page: Path) -> list[list[str]]:
    """Words of the command lines in a page's blocks of code; those that go on behind a backslash are one."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    code = "".join(text for language, text in blocks if language in ("", "sh", "console")).replace("\\\n", " ")
    lines = [line for line in code.splitlines() if re.match(r"(\.venv/bin/)?(tocom|python|make) ", line)]
    # what is said of a command stands behind # or far to the right
    return [shlex.split(re.sub(r"\s{3,}[^-\s].*$", "", line), comments=True) for line in lines]


def tocom_commands(page: Path) -> list[list[str]]:
    """Arguments of every `tocom` command, and of those that `make engines` and `make serve` pass on."""
    found = []
    for words in shown(page):
        if words[0].removeprefix(".venv/bin/") == "tocom":
            found.append(words[1:])
        elif words[:2] in (["make", "engines"], ["make", "serve"]):
            passed = next((word.removeprefix("ARGS=") for word in words if word.startswith("ARGS=")), "")
            found.append(["compile" if words[1] == "engines" else "serve", *passed.split()])
    return found


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_their_options_exist(page: Path) -> None:
    for command, *arguments in tocom_commands(page):
        if command.startswith("-"):
            continue
        assert command in NAMES, f"tocom {command}"
        if command == "infer":
            known = option_names()
        else:
            known = {name for one in make_app(command)[command].assemble_argument_collection() for name in one.names}
        for word in arguments:
            option = word.partition("=")[0]
            assert not option.startswith("--") or option in known | {"--help"}, f"tocom {command} has no {option}"


def test_there_are_commands_to_look_at() -> None:
    every = [command for page in GUIDES for command, *_ in tocom_commands(page)]
    assert len(every) >= 25 and {"compile", "infer", "serve", "validate", "frontier"} <= set(every)


SHORT = ("tocom infer", "tocom inspect", "tocom frontier", "tocom export-triton", "tocom doctor")
_FITTING = {"8": "4", "0,8,16": "0,4", "5": "1000", "40": "1000"}  # the degrees that there are, and time enough


@pytest.mark.parametrize("page", ["README.md", "docs/budgets.md", "docs/compile.md", "docs/triton.md"])
def test_short_commands_run_as_written(page: str, small_family: Path, tmp_path: Path) -> None:
    """Where `engines/digits` and `photos/` are; on a small family, whose accuracies were not measured."""
    for name in ("digits", "mine"):
        shutil.copytree(small_family / "family", tmp_path / "engines" / name)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "runtime").symlink_to(ROOT / "runtime")
    (tmp_path / "photos").symlink_to(ROOT / "examples" / "digits" / "sheets" / "3")
    ran = 0
    for words in shown(ROOT / page):
        command = " ".join(words).removeprefix(".venv/bin/")
        if command.startswith("python runtime/infer.py"):
            call = [sys.executable, *words[1:]]
        elif command.startswith(SHORT) and not {"--min-accuracy", "--cascade"} & {*words}:
            call = [sys.executable, "-m", "tocom", *words[1:]]
        else:
            continue
        call = [_FITTING.get(word, word) for word in call]
        if "frontier" in call:
            call = call[: call.index("--out")]  # a picture needs accuracies
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        ran += 1
    assert ran
