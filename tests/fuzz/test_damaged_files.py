"""A short campaign of damaged files; `python -m bench.fuzz` is the long one."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.fuzz import worker
from bench.fuzz.case import (
    CRASH,
    DIFFERENT,
    ESCAPED,
    FINE,
    HANG,
    LIBRARY_CRASH,
    MEMORY,
    REFUSED,
    SAME,
    WRONG,
    Case,
    Entry,
    FaultError,
    Outcome,
    RefusedError,
)
from bench.fuzz.given import Given, make
from bench.fuzz.mutate_bytes import BYTES
from bench.fuzz.page import plain, summary, write_page
from bench.fuzz.registry import ENTRIES, cases
from bench.fuzz.supervisor import Supervisor
from tests.waiting import SAFETY_S
from tocom.runtime.manifest import Family

SEED = 20261122
SLOW = ("family.json -> tocom compile", "checkpoint .safetensors -> tocom compile", "largest image -> infer")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    """The whole files, made once per session: worker processes find each other's on disk."""
    root = tmp_path_factory.getbasetemp()
    return make((root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "fuzz" / "given")


@pytest.fixture(scope="module")
def supervisor(given: Given) -> Iterator[Supervisor]:
    with Supervisor(given) as watching:
        yield watching


def run_all(supervisor: Supervisor, chosen: list[Case]) -> dict[str, Outcome]:
    outcomes = {case.key: supervisor.run(case) for case in chosen}
    faults = {key: (each.verdict, each.message) for key, each in outcomes.items() if each.verdict not in FINE}
    assert not faults
    return outcomes


def test_no_fault(supervisor: Supervisor) -> None:
    quick = (case for case in cases(SEED) if case.entry not in SLOW)
    outcomes = run_all(supervisor, list(itertools.islice(quick, 100)))
    assert {key.split("|")[0] for key in outcomes} == ENTRIES.keys() - {*SLOW}
    counts = Counter(each.verdict for each in outcomes.values())
    assert counts[REFUSED] > 50 and counts[SAME] > 5 and counts[DIFFERENT] > 2  # it looks at all three


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("entry", ENTRIES)
def test_no_fault_at_length(supervisor: Supervisor, entry: str) -> None:
    count = {SLOW[0]: 20, SLOW[1]: 20, SLOW[2]: 1}.get(entry, 250)
    run_all(supervisor, list(itertools.islice(cases(SEED + 1, entry), count)))


@pytest.mark.parametrize("entry", [name for name in ENTRIES if name not in SLOW])
def test_whole_files_are_answered_as_they_are(given: Given, supervisor: Supervisor, entry: str) -> None:
    """What is not damaged is not refused: else nothing above would mean anything."""
    case = Case(entry, "none", 0, 0)
    whole = ENTRIES[entry].whole(given, case.random())
    content = (given.folder / "image.png").read_bytes() if entry.startswith("image") else whole
    outcome = supervisor.run_file(case, content)
    assert outcome.verdict in (SAME, DIFFERENT), outcome


def test_cases_are_the_same_every_time(given: Given) -> None:
    first, second = (list(itertools.islice(cases(5), 60)) for _ in range(2))
    assert first == second
    for case in first[:20]:
        entry = ENTRIES[case.entry]
        assert worker.damaged(entry, given, case) == worker.damaged(entry, given, case)


def _nothing(*_: object) -> None:
    """Checks nothing."""


@pytest.mark.parametrize("entry", ["engine's files -> infer", "engine's files -> tocom inspect"])
def test_a_check_that_is_gone_is_seen(
    given: Given, entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without the hashes, an altered weight is accepted, and that is told."""
    found = ENTRIES[entry]
    weights = next(given.family("onnxruntime").glob("weights-*.bin"))
    altered = bytearray(weights.read_bytes())
    altered[0] ^= 1
    content = weights.name.encode() + b"\n" + altered
    with capfd.disabled():  # what the commands print is read from where they print it
        refused = worker.run(found, given, content, tmp_path)
        monkeypatch.setattr(Family, "check_files", _nothing)
        accepted = worker.run(found, given, content, tmp_path)
    assert refused.verdict == REFUSED and "sha256" in refused.message
    assert accepted.verdict == WRONG


def _dies(_given: Given, _folder: Path) -> bool:
    os.abort()


def _hangs(_given: Given, _folder: Path) -> bool:
    while True:
        pass


def _swells(_given: Given, _folder: Path) -> bool:
    return bool(bytearray(b"x") * (400 << 20))


def _raises(_given: Given, _folder: Path) -> bool:
    return {}["missing"]


def _refuses(_given: Given, _folder: Path) -> bool:
    raise RefusedError("no")


def _mistakes(_given: Given, _folder: Path) -> bool:
    raise FaultError("wrong answer", "7")


@pytest.mark.timing
@pytest.mark.parametrize(
    ("run", "forged", "verdict"),
    [
        (_dies, False, CRASH),
        (_dies, True, LIBRARY_CRASH),
        (_hangs, False, HANG),
        (_swells, False, MEMORY),
        (_raises, False, ESCAPED),
        (_refuses, False, REFUSED),
        (_mistakes, False, "wrong answer"),
    ],
)
def test_faults_are_seen(given: Given, monkeypatch: pytest.MonkeyPatch, run, forged: bool, verdict: str) -> None:
    """Each kind of fault, by an entry point that has it."""
    entry = Entry("broken", BYTES, lambda *_: b"whole", lambda *_: None, run, forged=forged)
    monkeypatch.setattr("bench.fuzz.supervisor.ENTRIES", {"broken": entry})
    monkeypatch.setattr("bench.fuzz.supervisor.begin", _begin)
    monkeypatch.setattr("bench.fuzz.supervisor.run_case", _Run(entry, given.folder))
    seconds = 2 if verdict == HANG else SAFETY_S  # nothing but what hangs is judged by a clock
    with Supervisor(given, seconds=seconds, mebibytes=200) as watching:
        outcome = watching.run(Case("broken", "truncated", 0, 0))
    assert outcome.verdict == verdict, outcome


def _begin(*_: object) -> None:
    """Loads nothing."""


class _Run:
    """What a worker does that knows one entry point only."""

    def __init__(self, entry: Entry, folder: Path) -> None:
        self.run, self.folder = entry.run, folder

    def __call__(self, _case: Case, content: bytes) -> Outcome:
        entry = Entry("broken", {}, lambda *_: b"", lambda *_: None, self.run)
        return worker.run(entry, Given(self.folder), content, self.folder.parent)


def test_the_page_tells_every_fault(tmp_path: Path) -> None:
    outcomes = {
        "a -> b|cut|0": Outcome(REFUSED, "/tmp/x/file.onnx must have 3 | 4 bytes"),
        "a -> b|cut|1": Outcome(ESCAPED, "KeyError: 'x'"),
        "a -> c|cut|0": Outcome(LIBRARY_CRASH, "the process died: SIGSEGV"),
    }
    found = summary({key: vars(each) for key, each in outcomes.items()})
    setup = {"command": "it", "date": "x", "machine": "m", "libraries": "l", "seed": 3, "limits": "none"}
    write_page({"setup": setup, **found}, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "**1 faults (1 exception, 1 library's crash).**" in text
    assert "KeyError" in text and "SIGSEGV" in text and "FILE must have N \\| N bytes" in text
    assert plain("'x' 12 0123456789abcdef") == "'...' N HASH"
