"""A family's folder that others write into, that cannot be written, that is full, and a clock that goes backwards."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import SMALL as NAME
from tests.conftest import SMALL_ARGS as ARGS
from tests.processes import PROCESSES
from tocom.runtime.engines.base import open_engine
from tocom.runtime.manifest import Family

Start = Callable[..., "Command"]
_NEW_MOUNTS = 0x00020000  # CLONE_NEWNS: what is mounted then is seen by nobody else, and goes with the process


class FallingClock:
    """Tells, at every look, an earlier time than at the one before."""

    def __init__(self) -> None:
        self._now, self._looks = time.time, 0

    def __call__(self) -> float:
        self._looks += 1
        return self._now() + 60 - 3600 * self._looks


def _tocom(options: Sequence[str], said: Path, mounts: Sequence[str], afterwards: Sequence[str], falling: bool) -> None:
    """The command as its own process runs it, maybe on file systems of its own, or by a clock that falls."""
    from tocom.export.cli import __main__ as cli
    from tocom.export.engine import measure_latency

    measure_latency._SECONDS, measure_latency._ROUNDS = 0.0, 3  # nobody looks at how fast anything is
    for descriptor, file in ((1, "/dev/null"), (2, said)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    if mounts:
        assert not ctypes.CDLL(None).unshare(_NEW_MOUNTS)
        for command in ("mount --make-rprivate /", *mounts):
            subprocess.run(command, shell=True, check=True)
    if falling:
        time.time = FallingClock()
    sys.argv = ["tocom", *options]
    try:
        cli.main()
    finally:
        for command in afterwards:
            subprocess.run(command, shell=True, check=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, small_family: Path) -> Path:
    return Path(shutil.copy(small_family / "model.safetensors", tmp_path_factory.mktemp("given")))


def arguments(checkpoint: Path, out: Path, degrees: str = "4") -> list[str]:
    model = [f"--model-arg={name}={value}" for name, value in ARGS.items()]
    return ["compile", "--model", NAME, *model, "--checkpoint", str(checkpoint), "--degrees", degrees,
            "--backend", "onnxruntime", "--out", str(out)]  # fmt: skip


@dataclass(frozen=True)
class Command:
    """`tocom`, running."""

    process: multiprocessing.process.BaseProcess
    said: Path

    def ended(self) -> tuple[int, str]:
        """Status and stderr; it must not hang."""
        self.process.join(200)
        assert self.process.exitcode is not None, "it hangs"
        err = self.said.read_text()
        assert "Traceback" not in err, err
        return self.process.exitcode, err


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Starts commands, none of which outlives the test."""
    running: list[Command] = []

    def begin(
        options: Sequence[str], mounts: Sequence[str] = (), afterwards: Sequence[str] = (), falling: bool = False
    ) -> Command:
        said = tmp_path / f"stderr-{len(running)}"
        process = PROCESSES.Process(target=_tocom, args=(options, said, mounts, afterwards, falling))
        process.start()
        running.append(Command(process, said))
        return running[-1]

    yield begin
    for command in running:
        command.process.kill()


def require_whole(folder: Path, degrees: tuple[int, ...]) -> Family:
    """Everything that is listed is as it was compiled and runs, and nothing temporary is left."""
    family = Family.read(folder)
    assert tuple(entry.degree for entry in family.engines) == degrees
    for entry in family.engines:
        family.check_files(folder, entry)
        assert entry.validation["passed"]
        with open_engine(folder / entry.engine, entry.backend) as runner:
            assert np.isfinite(runner.infer(np.zeros((2, *family.input.size), np.float32))).all()
    assert not list(folder.glob(".*.tmp"))
    return family


@pytest.mark.timing
def test_two_compiles_into_one_folder_at_once(start: Start, checkpoint: Path, tmp_path: Path) -> None:
    """Two processes, started together: one writes, the other one is refused, and both commands can be repeated."""
    out = tmp_path / "out"
    both = [start(arguments(checkpoint, out, degrees)) for degrees in ("4", "6")]
    ends = [command.ended() for command in both]
    statuses = sorted(status for status, _ in ends)
    assert statuses in ([0, 2], [0, 0])  # the second one may come when the first one is done
    degrees = tuple(degree for degree, (status, _) in zip((4, 6), ends, strict=True) if status == 0)
    for status, err in ends:
        if status:
            assert "another compile" in err.splitlines()[-1]
    require_whole(out, (0, *degrees))
    for degree in {4, 6} - {*degrees}:
        assert start(arguments(checkpoint, out, str(degree))).ended()[0] == 0
    require_whole(out, (0, 4, 6))


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")


@pytest.fixture
def family(small_family: Path, tmp_path: Path) -> Iterator[Path]:
    copy = Path(shutil.copytree(small_family / "family", tmp_path / "family"))
    yield copy
    copy.chmod(0o755)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes where it is not permitted to")
def test_a_folder_that_is_read_only(start: Start, checkpoint: Path, family: Path) -> None:
    before = contents(family)
    family.chmod(0o555)
    status, err = start(arguments(checkpoint, family, "4,6")).ended()
    assert status == 2 and "denied" in err.splitlines()[-1].lower()
    assert contents(family) == before


@needs_root
def test_a_disk_that_is_read_only(start: Start, checkpoint: Path, family: Path) -> None:
    """Compiling is refused; what was compiled before is inspected and runs."""
    before = contents(family)
    read_only = [f"mount --bind '{family}' '{family}'", f"mount -o remount,bind,ro '{family}'"]
    status, err = start(arguments(checkpoint, family, "4,6"), read_only).ended()
    assert status == 2 and "Read-only file system" in err.splitlines()[-1], err
    assert str(family) in err.splitlines()[-1]
    status, err = start(["inspect", str(family)], read_only).ended()
    assert status == 0, err
    assert contents(family) == before


@needs_root
@pytest.mark.parametrize("kib", [pytest.param(size, marks=pytest.mark.full) for size in (8, 80, 160)])
def test_a_disk_that_is_full(start: Start, checkpoint: Path, tmp_path: Path, kib: int) -> None:
    """A real file system that is too small for the family: refused, and nothing half-written stays on it."""
    disk, seen = tmp_path / "disk", tmp_path / "seen"
    disk.mkdir()
    mounts = [f"mount -t tmpfs -o size={kib}k none '{disk}'"]
    status, err = start(arguments(checkpoint, disk / "out"), mounts, [f"cp -a '{disk}' '{seen}'"]).ended()
    assert status == 2 and "No space left" in err.splitlines()[-1], err
    left = [file.name for file in (seen / "out").iterdir()]
    assert not [name for name in left if name.endswith(".tmp")], left
    if "family.json" in left:
        require_whole(seen / "out", (0,))
    out = shutil.copytree(seen / "out", tmp_path / "larger")
    assert start(arguments(checkpoint, out)).ended()[0] == 0  # with room, the same command goes on
    require_whole(out, (0, 4))


def _durations(node: object) -> list[float]:
    """Every number of a manifest that is a time."""
    manifest = json.loads(json.dumps(node))
    times = [each for entry in manifest["engines"] for batch in entry["latency_ms"].values() for each in batch.values()]
    return [*times, *(entry["build"].get("seconds", 0.0) for entry in manifest["engines"])]


@pytest.mark.timing
def test_a_clock_that_goes_backwards(start: Start, checkpoint: Path, family: Path) -> None:
    """Files from the future, and a wall clock that falls by an hour at every look: a compile goes on all the same."""
    future = 4_000_000_000  # the year 2096
    for file in [*family.iterdir(), checkpoint]:
        os.utime(file, (future, future))
    engines = contents(family)
    status, err = start(arguments(checkpoint, family, "4,6"), falling=True).ended()
    assert status == 0, err
    assert "r=0: reused" in err and "r=4: reused" in err and "r=6: done" in err
    found = require_whole(family, (0, 4, 6))
    assert all(contents(family)[name] == content for name, content in engines.items() if name.endswith(".onnx"))
    times = _durations(found.to_json())
    assert times and min(times) >= 0
    status, err = start(arguments(checkpoint, family, "4,6")).ended()  # and again, with the right time
    assert status == 0 and err.count("reused") == 3


def test_the_falling_clock_falls() -> None:
    clock = FallingClock()
    first, second = clock(), clock()
    assert second < first - 3000
