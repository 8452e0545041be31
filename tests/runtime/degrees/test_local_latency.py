"""Tests runtime/degrees/local_latency.py: whose times count, when something is measured, and what a bad cache does."""

import json
import multiprocessing
import threading
from dataclasses import replace
from pathlib import Path

import pytest

import tocom.runtime.degrees.local_latency
from tocom.runtime.degrees.latency import Latency
from tocom.runtime.degrees.local_latency import Times, local_latencies, this_machine
from tocom.runtime.errors import InputError
from tocom.runtime.manifest import Family


@pytest.fixture
def measured(monkeypatch):
    """Replaces the clock: lists the degrees and the batch of every group that is measured."""
    calls = []

    def invented(_folder, entries, batch, fixed):
        calls.append(([entry.degree for entry in entries], batch if fixed else f"any, {batch}"))
        slow = len(calls)
        return {entry.degree: Latency(slow * (20.0 - entry.degree), slow * 30.0, 12) for entry in entries}

    monkeypatch.setattr(tocom.runtime.degrees.local_latency, "_together", invented)
    return calls


@pytest.fixture
def cached(family_folder, tmp_path):
    """Asks for latencies with a cache of its own."""
    cache = tmp_path / "cache"

    def ask(batch=1, family=None, tell=None):
        return local_latencies(family_folder, family or Family.read(family_folder), batch, cache=cache, tell=tell)

    return ask, cache


def on_this_machine(family: Family, **changes) -> Family:
    entries = tuple(replace(entry, machine=this_machine(), **changes) for entry in family.engines)
    return replace(family, engines=entries)


def test_this_machine_has_one_name():
    assert this_machine() == this_machine() and this_machine().isprintable() and "core" in this_machine()


def test_the_manifest_counts_where_it_was_written_here(family_folder, cached, measured):
    family = on_this_machine(Family.read(family_folder))
    assert cached[0](family=family) == {2: Times(1.5, 2), 8: Times(1.5, 2)}
    assert not measured and not cached[1].exists()


def test_another_machine_another_batch_or_a_gap_is_measured(family_folder, cached, measured):
    ask, _ = cached
    family = Family.read(family_folder)
    here = on_this_machine(family)
    assert ask(family=family) == {2: Times(18.0, 30.0), 8: Times(12.0, 30.0)}
    assert ask(8, here)
    assert ask(2, replace(here, engines=(here.engines[0], replace(here.engines[1], latency_ms={}))))
    elsewhere = replace(here.engines[1], machine="a pocket calculator")
    assert ask(1, replace(here, engines=(here.engines[0], elsewhere)))  # the key is the same as at first
    assert measured == [([2, 8], 1), ([2, 8], 8), ([2, 8], 2)]


def test_engines_for_any_batch_are_measured_apart(family_folder, tmp_path, measured):
    family = on_this_machine(Family.read(family_folder))
    for fixed in (False, True, False):
        local_latencies(family_folder, family, fixed=fixed, cache=tmp_path)
    assert measured == [([2, 8], "any, 1")]  # the manifest has the others
    local_latencies(family_folder, family, 2, cache=tmp_path)
    assert measured[1:] == [([2, 8], 2)]


def test_measured_once_and_told(cached, measured):
    ask, cache = cached
    lines = []
    first = ask(tell=lines.append)
    assert ask(tell=lines.append) == first and len(measured) == 1
    assert len(lines) == 1 and "measuring 2 engines at batch 1" in lines[0]
    (file,) = cache.glob("*.json")
    assert json.loads(file.read_text())["machine"] == this_machine()


def test_changed_files_libraries_and_machines_are_measured_anew(family_folder, cached, measured, monkeypatch):
    ask, _ = cached
    ask()
    family = Family.read(family_folder)
    changed = replace(family.engines[0], sha256=dict.fromkeys(family.engines[0].sha256, "b" * 64))
    ask(family=family.with_entry(changed))
    monkeypatch.setattr(tocom.runtime.degrees.local_latency, "describe", lambda _backend: "0.0.0")
    ask()
    monkeypatch.setattr(tocom.runtime.degrees.local_latency, "this_machine", lambda: "another one")
    ask()
    ask()
    assert len(measured) == 4


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\xff\xfe", b"[]", b"[" * 50_000, b'{"format": 2, "times": {}}', b'{"format": 1}',
        b'{"format": 1, "times": {"2": {"p50": 1, "p99": 2}}}',
        b'{"format": 1, "times": {"2": {"p50": 0, "p99": 2}, "8": {"p50": 1, "p99": 2}}}',
        b'{"format": 1, "times": {"2": {"p50": NaN, "p99": 2}, "8": {"p50": 1, "p99": 2}}}',
        b'{"format": 1, "times": {"2": {"p50": 3, "p99": 2}, "8": {"p50": 1, "p99": 2}}}',
        b'{"format": 1, "times": {"2": {"p50": 1, "p99": 2}, "9": {"p50": 1, "p99": 2}}}',
    ],
)  # fmt: skip
def test_a_damaged_cache_is_measured_again(cached, measured, content):
    ask, cache = cached
    first = ask()
    (file,) = cache.glob("*.json")
    file.write_bytes(content)
    assert ask().keys() == first.keys() and len(measured) == 2
    ask()
    assert len(measured) == 2


def test_a_folder_in_the_place_of_the_file_is_no_error(cached, measured):
    ask, cache = cached
    ask()
    (file,) = cache.glob("*.json")
    file.unlink()
    file.mkdir()
    assert ask() and len(measured) == 2


def test_a_cache_that_cannot_be_written_is_told_once(family_folder, tmp_path, measured):
    cache = tmp_path / "file"
    cache.write_text("in the way")
    lines, family = [], Family.read(family_folder)
    for _ in range(2):
        assert local_latencies(family_folder, family, cache=cache / "latency", tell=lines.append)
    assert len(measured) == 2
    assert [("measuring" in line, "cannot be written" in line) for line in lines] == [
        (True, False), (False, True), (True, False),
    ]  # fmt: skip


def test_the_default_cache_is_the_users(family_folder, tmp_path, measured, monkeypatch):
    family = Family.read(family_folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    local_latencies(family_folder, family)
    assert len(list((tmp_path / "xdg/tocom/latency").glob("*.json"))) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    local_latencies(family_folder, family)
    assert len(list((tmp_path / "home/.cache/tocom/latency").glob("*.json"))) == 1

    def homeless():
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", homeless)
    assert local_latencies(family_folder, family) and len(measured) == 3


def test_a_large_family_is_measured_in_groups_on_one_scale(family_folder, entry_of, colour_graph, tmp_path, measured):
    family = Family.read(family_folder)
    for degree in range(10, 20):
        colour_graph(family_folder / f"r{degree:02}/model.onnx")
        family = family.with_entry(entry_of(family_folder, degree))
    found = local_latencies(family_folder, family, cache=tmp_path / "cache")
    assert [degrees for degrees, _ in measured] == [[2, 8, 10, 11, 12], [2, 13, 14, 15, 16], [2, 17, 18, 19]]
    assert {degree: times.p50_ms for degree, times in found.items()} == {
        degree: 2 * (20.0 - degree) for degree in (2, 8, *range(10, 20))
    }


def test_bad_arguments_are_refused(family_folder):
    family = Family.read(family_folder)
    with pytest.raises(InputError, match="batch must be 1 or more, got 0"):
        local_latencies(family_folder, family, 0)
    with pytest.raises(InputError, match="no finished engine"):
        local_latencies(family_folder, replace(family, engines=()))
    with pytest.raises(InputError, match="backend must be one of"):
        local_latencies(family_folder, family.with_entry(replace(family.engines[0], backend="abacus")))


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.timing
def test_real_engines_are_measured(fixed, family_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tocom.runtime.degrees.local_latency, "_SECONDS", 0.0)
    found = local_latencies(family_folder, Family.read(family_folder), 3, fixed=fixed, cache=tmp_path)
    assert found.keys() == {2, 8}
    assert all(0 < times.p50_ms <= times.p99_ms for times in found.values())


def _ask(folder: Path, cache: Path, log: Path) -> None:
    def slow(_folder, entries, _batch, _fixed):
        with log.open("a") as file:
            file.write("measured\n")
        threading.Event().wait(0.3)
        return {entry.degree: Latency(1.0 + entry.degree, 20.0, 12) for entry in entries}

    tocom.runtime.degrees.local_latency._together = slow
    assert local_latencies(folder, Family.read(folder), cache=cache) == {2: Times(3.0, 20.0), 8: Times(9.0, 20.0)}


@pytest.mark.timing
def test_processes_that_ask_at_once_measure_once(family_folder, tmp_path):
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    asking = [context.Process(target=_ask, args=(family_folder, tmp_path / "cache", log)) for _ in range(3)]
    for process in asking:
        process.start()
    for process in asking:
        process.join(60)
        assert process.exitcode == 0
    assert log.read_text() == "measured\n"
    assert [file.name for file in (tmp_path / "cache").glob(".*")] == [".lock"]


@pytest.mark.timing
def test_threads_that_ask_at_once_measure_once(family_folder, tmp_path, measured):
    family, found = Family.read(family_folder), []
    threads = [
        threading.Thread(target=lambda: found.append(local_latencies(family_folder, family, cache=tmp_path)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 4 and len(measured) == 1
