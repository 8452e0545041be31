"""The stages, each of which leaves one file in the work folder and is not repeated where the file exists."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from bench.experiment.evaluation import TEST_SEED, at_degree, evaluate, hits
from bench.experiment.protocol import CONSTANT, METHODS, Protocol
from bench.experiment.tasks import PRETRAINING, TASKS, Task
from bench.harness.run import ROOT, Tell
from examples.sheets import normalize
from examples.supervised import fit
from tocom.calib.distill import DistillOptions, distill
from tocom.checkpoint import hash_tensors
from tocom.compensator import Compensator
from tocom.export.family.compile import compile_family
from tocom.export.source.options import CompileOptions
from tocom.runtime.degrees.latency import measure
from tocom.runtime.engines.base import open_engine
from tocom.runtime.errors import InputError
from tocom.runtime.files import write_atomically

ARCHITECTURE = "vit_tiny_patch16_224"
EXAMPLE = ROOT / "examples" / "digits"
BATCH = 64


@dataclass(frozen=True)
class Bench:
    """Where and on what the experiment runs."""

    protocol: Protocol
    work: Path
    device: str

    def network(self, file: str) -> nn.Module:
        """A network with the weights of a stage, frozen."""
        model = self.untrained()
        model.load_state_dict(load_file(self.work / file))
        return model.eval().requires_grad_(False)

    def untrained(self) -> nn.Module:
        """The network before any training."""
        return timm.create_model(ARCHITECTURE, num_classes=10, **self.protocol.model).to(self.device)

    def compensator(self, method: str) -> Compensator:
        """The compensator of a method."""
        return Compensator.load(self.work / f"compensator-{method}.safetensors")

    def batches(self, task: Task, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless training batches of a task."""
        stream = task.open("train", seed)
        while True:
            pixels, classes = stream.batch(BATCH)
            yield normalize(pixels).to(self.device), classes.to(self.device)

    def keep(self, name: str, content: bytes, began: float) -> None:
        """Writes a stage's file, and how long it took."""
        seconds = json.dumps({"seconds": round(time.monotonic() - began, 1), "threads": torch.get_num_threads()})
        write_atomically(self.work / f"{name}.time.json", seconds.encode())
        write_atomically(self.work / name, content)


class _InkBatches:
    """The backbone's training sheets for distillation: every batch follows from its place in the run."""

    identity = "training sheets of ink, from seed 20000000"

    def __init__(self, device: str) -> None:
        self.device = device

    def batch(self, first_pair: int, pairs: int) -> Tensor:
        """Sheets number 2 * first_pair and on, normalized, [2 * pairs, 3, 32, 32]."""
        pixels, _ = PRETRAINING.open("train", 20_000_000 + first_pair).batch(2 * pairs)
        return normalize(pixels).to(self.device)


def pretrain(bench: Bench, name: str, tell: Tell) -> None:
    """The backbone, trained without token reduction on `ink`."""
    began, steps = time.monotonic(), bench.protocol.pretraining_steps
    torch.manual_seed(0)
    model = bench.untrained()
    fit(model, bench.batches(PRETRAINING, 10), steps=steps, lr=1e-3,
        on_step=lambda step, loss: tell(f"backbone, loss {loss:.3f}", step))  # fmt: skip
    bench.keep(name, save(model.state_dict()), began)


def distill_method(bench: Bench, name: str, method: str) -> None:
    """A method's compensator, distilled on the backbone's training sheets."""
    began, protocol = time.monotonic(), bench.protocol
    backbone = bench.network("backbone.safetensors")
    options = DistillOptions(
        steps=protocol.distill_steps,
        batch=BATCH,
        lr=protocol.distill_lr,
        schedule=METHODS[method].schedule,
        reduction=METHODS[method].reduction,
    )
    compensator = distill(
        backbone,
        _InkBatches(bench.device),
        backbone=ARCHITECTURE,
        backbone_sha256=hash_tensors(backbone.state_dict()),
        options=options,
        state_folder=bench.work / f"{name}.training",
    )
    bench.keep(name, compensator.cpu().to_safetensors(), began)


def finetune(bench: Bench, name: str, task: str, source: int, seed: int) -> None:
    """A downstream checkpoint: the backbone with a new head, fine-tuned at a source degree."""
    began, steps = time.monotonic(), bench.protocol.finetune_steps
    torch.manual_seed(seed)
    model = bench.untrained()
    model.load_state_dict(load_file(bench.work / "backbone.safetensors"))
    model.reset_classifier(10)
    model.to(bench.device)
    fit(at_degree(model, source, CONSTANT), bench.batches(TASKS[task], 1000 + seed), steps=steps, lr=3e-4)
    bench.keep(name, save(model.state_dict()), began)


def assess(bench: Bench, name: str, checkpoint: str, task: str, source: int, method: str) -> None:
    """Accuracy of a checkpoint at every target degree, with and without a method's compensator."""
    began = time.monotonic()
    outcomes = evaluate(
        bench.network(checkpoint), source, TASKS[task], bench.compensator(method), METHODS[method], bench.protocol
    )
    bench.keep(name, json.dumps(outcomes).encode(), began)


def transfer(bench: Bench, name: str, seed: int, degree: int) -> None:
    """The gap between degrees, as a difference of weights, measured on one task and added on another.

    For every pair of tasks (a, b): W_b(0) + W_a(degree) - W_a(0) in all blocks, run at `degree` on b (ToCom, section
    3.2). Nothing is trained here.
    """
    began, tasks = time.monotonic(), bench.protocol.tasks
    weights = {
        (task, source): load_file(bench.work / checkpoint_name(task, source, seed), device=bench.device)
        for task in tasks
        for source in (0, degree)
    }
    table: dict[str, Any] = {}
    for onto in tasks:
        test = TASKS[onto].sheets("test", TEST_SEED, bench.protocol.test_sheets)
        row = {"none": weights[onto, 0], "own": weights[onto, degree]}
        row |= {task: _moved(weights[onto, 0], weights[task, 0], weights[task, degree]) for task in tasks}
        table[onto] = {}
        for gap, state in row.items():
            model = bench.untrained()
            model.load_state_dict(state)
            table[onto][gap] = 100 * float(hits(at_degree(model, degree, CONSTANT), *test).double().mean())
    bench.keep(name, json.dumps(table).encode(), began)


def _moved(onto: dict[str, Tensor], low: dict[str, Tensor], high: dict[str, Tensor]) -> dict[str, Tensor]:
    moved = copy.copy(onto)
    for key in onto:
        if key.startswith("blocks."):
            moved[key] = onto[key] + high[key] - low[key]
    return moved


def checkpoint_name(task: str, source: int, seed: int) -> str:
    """File of a downstream checkpoint."""
    return f"{task}-{source}-{seed}.safetensors"


def time_families(bench: Bench, name: str, methods: tuple[str, ...] = ("constant", "strided")) -> None:
    """Latency of both methods at every degree, measured side by side: what accuracy is compared at.

    It does not depend on the weights, so one checkpoint is compiled for both.
    """
    began, protocol = time.monotonic(), bench.protocol
    first = bench.work / checkpoint_name(protocol.tasks[0], 0, protocol.seeds[0])
    folder = write_model_folder(first, protocol, bench.work / "model")
    with ExitStack() as stack:
        runners = {}
        for method in methods:
            out = bench.work / "engines" / method
            compensator = bench.work / f"compensator-{method}.safetensors"
            options = CompileOptions(model=str(folder), out=out, degrees=protocol.targets, compensator=compensator,
                                     source_degree=0, schedule=METHODS[method].schedule,
                                     backend="onnxruntime")  # fmt: skip
            for entry in compile_family(options).family.engines:
                opened = open_engine(out / entry.engine, entry.backend, precision=entry.precision)
                runners[f"{method} {entry.degree}"] = stack.enter_context(opened)
        table = {}
        for batch in (1, 8, 32):
            times = measure(runners, batch=batch, seconds=20.0, min_rounds=60)
            table[str(batch)] = {key: {"p50": each.p50, "p99": each.p99} for key, each in times.items()}
    bench.keep(name, json.dumps(table).encode(), began)


def write_model_folder(weights: Path, protocol: Protocol, folder: Path) -> Path:
    """A checkpoint of the experiment as a folder in timm's hub layout."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(weights.read_bytes())
    pretrained = {"input_size": [3, 32, 32], "interpolation": "bicubic", "crop_pct": 1.0, "mean": [0.5] * 3,
                  "std": [0.5] * 3, "num_classes": 10}  # fmt: skip
    config = {"architecture": ARCHITECTURE, "num_classes": 10, "model_args": dict(protocol.model),
              "pretrained_cfg": pretrained}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def finished(name: str) -> Path:
    """A file of the finished experiment, preset small, that other campaigns measure too."""
    file = ROOT / "build" / "experiment" / "small" / name
    if not file.exists():
        raise InputError(f"the experiment's {name} is not there. Run `make experiment` first, or --only example.")
    return file
