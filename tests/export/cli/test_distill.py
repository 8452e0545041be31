"""`tocom distill` as a team would run it: killed and resumed, on two processes, with bad images and a full disk."""

from __future__ import annotations

import csv
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.processes import PROCESSES
from tests.waiting import SAFETY_S
from tocom.checkpoint import hash_tensors
from tocom.compensator import Compensator
from tocom.export.cli import __main__ as cli
from tocom.export.cli import distill

NAME = "vit_tiny_patch16_224"
ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
MODEL = ["--model", NAME, *(part for name, value in ARGS.items() for part in ("--model-arg", f"{name}={value}"))]

Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose predictions are not all alike, 24 images, and one file that is none."""
    folder = tmp_path_factory.mktemp("given")
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=5, **ARGS)
    for weight in model.parameters():
        weight.data.add_(torch.randn(weight.shape) * (0.2 if weight.ndim > 1 else 0.3))
    save_file(model.state_dict(), folder / "model.safetensors")
    draw = np.random.default_rng(0)
    (folder / "images" / "a").mkdir(parents=True)
    for index in range(24):
        pixels = draw.integers(0, 256, (40, 44, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / "a" / f"{index:02}.png")
    (folder / "images" / "torn.png").write_text("no image")
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process; returns its status and stderr."""

    def go(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["tocom", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code, capfd.readouterr().err

    return go


def distilling(given: Path, out: Path, *extra: object, steps: int = 6, batch: int = 8, lr: float = 4.0) -> list[object]:
    return ["distill", *MODEL, "--checkpoint", given / "model.safetensors", "--images", given / "images", "--out", out,
            "--steps", steps, "--batch", batch, "--lr", lr, "--warmup", 2, "--workers", 0, *extra]  # fmt: skip


def log_of(out: Path) -> list[dict[str, str]]:
    with (out.with_name(f"{out.name}.training") / "log.csv").open() as file:
        return list(csv.DictReader(file))


def apart_from_speed(rows: list[dict[str, str]]) -> list[list[str]]:
    return [[value for name, value in row.items() if name != "images_per_s"] for row in rows]


def same_weights(one: Path, other: Path) -> bool:
    return hash_tensors(Compensator.load(one).state_dict()) == hash_tensors(Compensator.load(other).state_dict())


def refused(result: tuple[int, str], *words: str, status: int = 2) -> None:
    code, err = result
    errors = [line for line in err.splitlines() if line.startswith("tocom: ")]
    assert code == status, err
    assert len(errors) == 1 and err.splitlines()[-1] == errors[0] and "Traceback" not in err, err
    assert all(word in errors[0] for word in words), (words, err)


@pytest.mark.full
@pytest.mark.timing
def test_two_processes_train_what_one_trains(given: Path, tmp_path: Path, run: Run) -> None:
    """torchrun, with augmentation, mixing and dropout: the same compensator but for rounding, and one process talks."""
    common = ("--random-erasing", 0.5, "--dropout", 0.3)
    status, err = run(*distilling(given, tmp_path / "one.safetensors", *common, batch=8))
    assert status == 0, err
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
               "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "tocom",
               *map(str, distilling(given, tmp_path / "two.safetensors", *common, batch=4))]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"wrote {tmp_path / 'two.safetensors'}"]
    assert done.stderr.count("step 6 of 6") == done.stderr.count("2 processes") == 1
    one, two = (Compensator.load(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert one.info == two.info
    assert all(float(weight.abs().max()) > 0.01 for weight in one.state_dict().values())
    for name, weight in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], weight, rtol=1e-3, atol=1e-5)
    logs = log_of(tmp_path / "one.safetensors"), log_of(tmp_path / "two.safetensors")
    for name in ("step", "lr", "source", "target", "unreadable"):
        assert [row[name] for row in logs[0]] == [row[name] for row in logs[1]]
    losses = [[float(row["loss"]) for row in log] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3, abs=1e-6) and max(losses[0]) > 1e-3


def _distill(options: list[str], said: Path, dies_after: int | None) -> None:
    """The command as its own process runs it, which may be killed behind a step."""
    if dies_after is not None:
        told = distill._Telling.step

        def step(self: object, number: int, loss: float) -> None:
            told(self, number, loss)
            if number == dies_after:
                os.kill(os.getpid(), signal.SIGKILL)

        distill._Telling.step = step
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    sys.argv = ["tocom", *options]
    cli.main()


@pytest.mark.timing
def test_a_killed_run_goes_on_exactly(given: Path, tmp_path: Path) -> None:
    """Every run is a process of its own, so that all of them compute alike to the last bit."""
    straight, killed, said = tmp_path / "straight.safetensors", tmp_path / "killed.safetensors", tmp_path / "said"

    def status(out: Path, dies_after: int | None = None) -> int:
        options = [str(each) for each in distilling(given, out, "--save-every", 4, steps=20)]
        process = PROCESSES.Process(target=_distill, args=(options, said, dies_after))
        process.start()
        process.join(SAFETY_S)
        return process.exitcode

    assert status(straight) == 0
    assert status(killed, dies_after=11) == -signal.SIGKILL
    assert len(log_of(killed)) == 11 and not killed.exists()
    assert status(killed) == 0 and "goes on after step 8" in said.read_text()
    assert apart_from_speed(log_of(killed)) == apart_from_speed(log_of(straight))
    assert same_weights(killed, straight)


@contextmanager
def a_full_disk() -> Iterator[None]:
    """The kernel refuses files above 4 KiB."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.timing
def test_no_space_left_keeps_the_state(given: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "c.safetensors"
    state = tmp_path / "c.safetensors.training" / "state.pt"
    stop_at = 3

    def stopping(step: int, loss: float) -> None:
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("tocom.export.cli.distill._Telling.step", lambda _self, step, loss: stopping(step, loss))
    refused(run(*distilling(given, out, steps=8)), "interrupted; run the same command again", status=130)
    stop_at, before = 0, state.read_bytes()
    with a_full_disk():
        result = run(*distilling(given, out, steps=8))
    refused(result, "too large", "state.pt")
    assert state.read_bytes() == before and not out.exists()
    assert [file.name for file in state.parent.iterdir() if file.name.endswith(".tmp")] == []
    assert run(*distilling(given, out, steps=8))[0] == 0
    assert len(log_of(out)) == 8


def test_unreadable_images_are_replaced_and_told(given: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "c.safetensors"
    status, err = run(*distilling(given, out, steps=7))
    assert status == 0
    assert "1 of 25 images could not be read and were replaced by others: torn.png" in err
    assert sum(int(row["unreadable"]) for row in log_of(out)) >= 2  # 56 images: it comes round at least twice
    assert "torn.png" in run(*distilling(given, out, steps=7))[1]  # told by the finished run as well


def test_a_finished_run_says_so_and_writes_its_output_again(given: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "c.safetensors"
    assert run(*distilling(given, out, steps=2))[0] == 0
    once = out.rename(tmp_path / "once.safetensors")
    status, err = run(*distilling(given, out, steps=2))
    assert status == 0 and "already trained" in err and same_weights(out, once)
    refused(run(*distilling(given, out, steps=2, lr=1.0)), "begun with lr 4.0, but 1.0", "--restart")
    refused(run(*distilling(given, out, "--no-flip", steps=2)), "flip True, but False")
    other = tmp_path / "images"
    other.mkdir()
    Image.new("RGB", (40, 40)).save(other / "a.png")
    refused(run(*distilling(given, out, "--images", other, steps=2)), "begun with images '25 images")
    assert run(*distilling(given, out, "--restart", steps=2, lr=1.0))[0] == 0
    assert not same_weights(out, once)


def test_bad_input(given: Path, tmp_path: Path, run: Run) -> None:
    out, torn = tmp_path / "c.safetensors", tmp_path / "torn"
    torn.mkdir()
    for index in range(3):
        (torn / f"{index}.png").write_text("no image")
    Image.new("RGB", (40, 40)).save(torn / "good.png")
    (tmp_path / "empty").mkdir()
    refused(run(*distilling(given, out, "--images", torn)), "3 of the first 4 are not", "torn")
    refused(run(*distilling(given, out, "--images", tmp_path / "empty")), "must hold images")
    refused(run(*distilling(given, out, "--images", "wds/shards:/data")), "WebDataset", "torch/NAME:ROOT")
    refused(run(*distilling(given, out, batch=7)), "even", "7")
    refused(run(*distilling(given, out, "--precision", "fp16", "--device", "cpu")), "fp16", "CUDA")
    refused(run(*distilling(given, out, "--augment", "much")), '"none", "light", "timm"', "much")
    refused(run(*distilling(given, out, "--schedule", "strided:9")), "stride")
    refused(run(*distilling(given, out, "--num-classes", 7)), "head", "[7", "[5")
    refused(run(*distilling(given, tmp_path / "nowhere" / "c.safetensors")), "folder that exists", "nowhere")
    refused(run(*distilling(given, out, "--steps", 30, lr=1e30)), "the loss of step", "is nan", status=1)
    assert not out.exists()


def test_only_the_first_of_several_processes_complains(
    given: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run(*distilling(given, tmp_path / "c.safetensors", batch=7)) == (2, "")
