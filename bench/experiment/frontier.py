"""Latency of the constant and the strided schedule, measured side by side: what accuracy is compared at.

Latency does not depend on the weights, so one checkpoint is compiled at every degree of both methods; the engines then
run in one interleaved measurement.
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from pathlib import Path

from bench.experiment.protocol import METHODS
from bench.experiment.stages import ARCHITECTURE, Bench, checkpoint_name
from tocom.export.family.compile import compile_family
from tocom.export.source.options import CompileOptions
from tocom.runtime.degrees.latency import measure
from tocom.runtime.engines.base import open_engine

BATCHES = (1, 8, 32)
_ROUNDS, _SECONDS = 60, 20.0


def measure_frontier(bench: Bench, name: str, methods: tuple[str, ...] = ("constant", "strided")) -> None:
    """Compiles the methods' families and measures all their degrees together, for every batch size."""
    began, protocol = time.monotonic(), bench.protocol
    folder = _model_folder(bench)
    with ExitStack() as stack:
        runners = {}
        for method in methods:
            out = bench.work / "engines" / method
            family = compile_family(
                CompileOptions(
                    model=str(folder),
                    out=out,
                    degrees=protocol.targets,
                    compensator=bench.work / f"compensator-{method}.safetensors",
                    source_degree=0,
                    schedule=METHODS[method].schedule,
                    backend="onnxruntime",
                )
            ).family
            for entry in family.engines:
                runners[f"{method} {entry.degree}"] = stack.enter_context(
                    open_engine(out / entry.engine, entry.backend, precision=entry.precision)
                )
        table = {}
        for batch in BATCHES:
            times = measure(runners, batch=batch, seconds=_SECONDS, min_rounds=_ROUNDS)
            table[str(batch)] = {key: {"p50": each.p50, "p99": each.p99} for key, each in times.items()}
    bench.keep(name, json.dumps(table).encode(), began)


def _model_folder(bench: Bench) -> Path:
    """The first downstream checkpoint in timm's hub layout."""
    folder = bench.work / "model"
    folder.mkdir(exist_ok=True)
    weights = (bench.work / checkpoint_name(bench.protocol.tasks[0], 0, bench.protocol.seeds[0])).read_bytes()
    (folder / "model.safetensors").write_bytes(weights)
    pretrained = {"input_size": [3, 32, 32], "interpolation": "bicubic", "crop_pct": 1.0, "mean": [0.5] * 3,
                  "std": [0.5] * 3, "num_classes": 10}  # fmt: skip
    config = {"architecture": ARCHITECTURE, "num_classes": 10, "model_args": dict(bench.protocol.model),
              "pretrained_cfg": pretrained}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder
