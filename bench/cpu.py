"""Engines on a CPU, ours beside what a user would pick instead; randomly initialized weights, real sizes.

python -m bench.cpu --models deit_small_patch16_224,deit_base_patch16_224 --batches 1,8 --degrees 4,8,12,16

For every model, batch size and degree all contenders, each also without merging, take turns in one process: ratios
within a group are comparable, times of different groups are not. A finished group is kept, so the same command goes on
after a kill. The peers are the same token merging in PyTorch (tocom.vit, the reference), run by torch itself and
exported by torch.onnx.export without this project's operator, and the untouched timm model where nothing is merged.
"""

from __future__ import annotations

import copy
import functools
import gc
import json
import os
import platform
import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's threads would spin on the cores of whose turn it is

import matplotlib
import numpy as np
import openvino
import timm
import torch
import typer
from torch import Tensor, nn

from bench.markdown import spread, table
from bench.plain_tome import PlainToMe
from tocom.calib.quantize.calibrate import OBSERVED, Calibration, Method, calibrate
from tocom.export.artifacts import FusedCheckpoint, OnnxGraph
from tocom.export.engine.build import build, graph_precision
from tocom.export.graph.insert_qdq import quantized_graph
from tocom.export.graph.lower import Lowering, count_gmacs
from tocom.export.graph.slice_bound import slice_bound
from tocom.export.graph.trace import INPUT, OUTPUT
from tocom.export.graph.weight_store import WeightStore
from tocom.export.source.images import default_images
from tocom.runtime.backends import QdqForm
from tocom.runtime.degrees.latency import Latency, measure
from tocom.runtime.engines.base import EngineRunner, open_engine
from tocom.runtime.files import write_atomically
from tocom.schedule import ScheduleFamily
from tocom.vit import ReducedViT, schedule_for

matplotlib.use("Agg")

from matplotlib import pyplot

ROOT = Path(__file__).resolve().parent.parent
STRIDED = "strided:3"
OURS = (
    ("onnxruntime", "fp32"),
    ("onnxruntime", "int8"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("openvino", "int8"),
)
_COMPARED = ("ours, OpenVINO bf16", "ours, ONNX Runtime fp32")  # what int8 is to be faster than
_CALIBRATION_IMAGES = 16
_NAMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


@dataclass(frozen=True)
class Row:
    """One contender of a group, as measured.

    Attributes:
        contender: Who.
        schedule: How its tokens are removed; "-" without merging.
        ms: Median of one call.
        low: 25th percentile.
        high: 75th percentile.
        speed_up: Over the same contender without merging.
        bound: Speed-up of its slice bound, likewise; None for peers.
        tax: Time beyond its slice bound, as a share of it, 25th, 50th and 75th percentile; None for peers.
        gain: Time of the plain export on the same library in the same precision over this one's, likewise.
        ideal: Speed-up by multiplications.
        rounds: Calls that were measured; 0 where it was not written down.
        over_half: Time of ours on OpenVINO in bf16, with the same schedule, over this one's, likewise; None for itself.
        over_float: Likewise of ours on ONNX Runtime in float32.
    """

    contender: str
    schedule: str
    ms: float
    low: float
    high: float
    speed_up: float
    bound: float | None
    tax: tuple[float, float, float] | None
    gain: tuple[float, float, float] | None
    ideal: float
    rounds: int = 0
    over_half: tuple[float, float, float] | None = None
    over_float: tuple[float, float, float] | None = None


class TorchRunner(EngineRunner):
    """A torch module as an engine."""

    backend = "torch"

    def __init__(self, model: nn.Module, classes: int, size: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.model, self.classes, self.input_size, self._dtype = model, classes, size, dtype

    @torch.inference_mode()
    def _infer(self, pixel_values: np.ndarray) -> np.ndarray:
        return self.model(torch.from_numpy(pixel_values).to(self._dtype)).float().numpy()

    def _close(self) -> None:
        del self.model


class OpenVinoPeer(EngineRunner):
    """A file as OpenVINO itself runs it, compiled for one batch size; nothing of this project in between."""

    backend = "openvino"

    def __init__(self, file: Path, precision: str, batch: int, classes: int, size: tuple[int, int, int]) -> None:
        self.classes, self.input_size = classes, size
        core = openvino.Core()
        model = core.read_model(file)
        model.reshape([batch, *size])
        hints = {"INFERENCE_PRECISION_HINT": {"fp32": "f32"}.get(precision, precision), "PERFORMANCE_HINT": "LATENCY"}
        self._request = core.compile_model(model, "CPU", hints).create_infer_request()

    def _infer(self, pixel_values: np.ndarray) -> np.ndarray:
        self._request.infer({INPUT: pixel_values}, share_inputs=True)
        return self._request.get_output_tensor(0).data.copy()

    def _close(self) -> None:
        del self._request


class Bench:
    """One model, with what was lowered and exported of it."""

    def __init__(self, name: str, work: Path) -> None:
        self.name, self.folder = name, work / name
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        self.model = timm.create_model(name).eval().requires_grad_(False)
        self.store = WeightStore(self.folder)
        self.lowering = Lowering(self.model, self.store)

    def reduced(self, degree: int, schedule: str = "constant") -> ReducedViT:
        """The PyTorch reference at a degree."""
        return ReducedViT(self.model, schedule_for(self.model, degree, ScheduleFamily(schedule))).eval()

    def graph(self, degree: int, schedule: str, form: str = "fp32") -> OnnxGraph:
        """Our graph of a degree, in a form of `tocom.export.engine.build.graph_precision`."""
        made_of = FusedCheckpoint(self.model.state_dict(), self.name, degree, 0, None, "random", None)
        planned = schedule_for(self.model, degree, ScheduleFamily(schedule))
        name = f"{degree}-{schedule.replace(':', '')}-{form}.onnx"
        graph = self.lowering.lower(planned, made_of, name)
        if form != "fp32":
            quantization = self.calibration.quantization(self.model)
            unsigned = QdqForm(unsigned=form.endswith("unsigned"))
            graph = quantized_graph(graph, self.model, quantization, self.store, f"quantized-{name}", unsigned)
        gc.collect()
        return graph

    @functools.cached_property
    def calibration(self) -> Calibration:
        """Ranges over the degrees that a family looks at, on patterns."""
        return calibrate([self.reduced(degree) for degree in OBSERVED], self.patterns(), Method())

    def patterns(self) -> Tensor:
        """Images to calibrate on."""
        size = (3, *self.model.patch_embed.img_size)
        return torch.cat([torch.from_numpy(each) for each in default_images(size, _CALIBRATION_IMAGES // 2)])

    def peer_quantized(self, degree: int) -> Path:
        """The plain export, quantized by NNCF's preset for transformers on OpenVINO's model."""
        file = self.folder / f"nncf-{degree}.xml"
        if not file.exists():
            import nncf

            images = nncf.Dataset([image[None].numpy() for image in self.patterns()], lambda image: {INPUT: image})
            model = nncf.quantize(
                openvino.Core().read_model(self.plain_export(degree)),
                images,
                preset=nncf.QuantizationPreset.PERFORMANCE,
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=_CALIBRATION_IMAGES,
            )
            openvino.save_model(model, file, compress_to_fp16=False)
        return file

    def plain_export(self, degree: int) -> Path:
        """What torch.onnx.export makes of the reference, without our operator; of the timm model at degree 0."""
        file = self.folder / f"plain-{degree}.onnx"
        if not file.exists():
            network = PlainToMe(self.reduced(degree)) if degree else self.model
            sample = torch.zeros(2, 3, *self.model.patch_embed.img_size)
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                program = torch.onnx.export(
                    network, (sample,), dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False,
                    dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=1 << 16)},), opset_version=20,
                )  # fmt: skip
            program.save(file, external_data=True)
            gc.collect()
        return file


def run_group(bench: Bench, batch: int, degree: int, seconds: float, only: str = "") -> list[Row]:
    """Times the contenders whose names hold a text at one batch size and degree, in turn."""
    with ExitStack() as stack:
        runners: dict[tuple[str, str], EngineRunner] = {}

        def add(contender: str, schedule: str, runner: EngineRunner) -> None:
            runners[contender, schedule] = stack.enter_context(runner)

        for backend, precision in OURS:
            name = f"ours, {_NAMES[backend]} {precision}"
            form = graph_precision(backend, precision)
            planned = {"-": 0, "constant": degree, **({} if precision == "int8" else {STRIDED: degree})}
            for schedule, at in planned.items() if re.search(only, name) else ():
                graph = bench.graph(at, "constant" if schedule == "-" else schedule, form)
                engine = build(graph, backend=backend, precision=precision)
                add(name, schedule, open_engine(engine.file, backend, precision=precision, batch=batch))
                if schedule != "-":
                    with slice_bound(graph.file) as file:
                        bound = open_engine(file, backend, precision=precision, batch=batch)
                    add(name, f"{schedule} bound", bound)
        for schedule, at in (("-", 0), ("constant", degree)):
            for name, make in _peers(bench, batch, at).items():
                if re.search(only, name):
                    add(name, schedule, make())
        names = {f"{contender}|{schedule}": (contender, schedule) for contender, schedule in runners}
        times = measure({key: runners[name] for key, name in names.items()}, batch, seconds=seconds, min_rounds=15)
    found = {names[key]: each for key, each in times.items()}
    macs = {"-": count_gmacs(bench.reduced(0))}
    macs |= {schedule: count_gmacs(bench.reduced(degree, schedule)) for schedule in ("constant", STRIDED)}
    rows = []
    for (contender, schedule), each in found.items():
        if schedule.endswith("bound"):
            continue
        base, bound = found[contender, "-"], found.get((contender, f"{schedule} bound"))
        peer = found.get((contender.replace("ours", "plain export"), "-" if schedule == "-" else "constant"))
        gain = None if peer in (None, each) else peer.ratio_to(each)
        rows.append(Row(
            contender, schedule, each.p50, each.p25, each.p75, base.ratio_to(each)[1],
            None if bound is None else base.ratio_to(bound)[1],
            None if bound is None else tuple(ratio - 1 for ratio in each.ratio_to(bound)),
            gain, macs["-"] / macs[schedule], each.rounds, *_compared(found, contender, schedule),
        ))  # fmt: skip
    return rows


def _compared(
    found: Mapping[tuple[str, str], Latency], contender: str, schedule: str
) -> tuple[tuple[float, float, float] | None, ...]:
    others = [found.get((name, schedule)) if name != contender else None for name in _COMPARED]
    return tuple(None if each is None else each.ratio_to(found[contender, schedule]) for each in others)


def _peers(bench: Bench, batch: int, degree: int) -> dict[str, Callable[[], EngineRunner]]:
    """What a user would pick instead, by name."""
    network = PlainToMe(bench.reduced(degree)) if degree else bench.model
    classes, size = bench.model.num_classes, (3, *bench.model.patch_embed.img_size)

    def compiled() -> EngineRunner:
        half = copy.deepcopy(network).to(torch.bfloat16)
        return TorchRunner(torch.compile(half, dynamic=False), classes, size, torch.bfloat16)

    def by_openvino(precision: str) -> EngineRunner:
        return OpenVinoPeer(bench.plain_export(degree), precision, batch, classes, size)

    return {
        "torch eager fp32": lambda: TorchRunner(network, classes, size, torch.float32),
        "torch.compile bf16": compiled,
        "plain export, ONNX Runtime fp32": lambda: open_engine(bench.plain_export(degree), "onnxruntime", batch=batch),
        "plain export, OpenVINO fp32": lambda: by_openvino("fp32"),
        "plain export, OpenVINO bf16": lambda: by_openvino("bf16"),
        "plain export, OpenVINO int8": lambda: OpenVinoPeer(bench.peer_quantized(degree), "bf16", batch, classes, size),
    }


def main(
    models: Annotated[str, typer.Option(help="timm names.")] = "deit_small_patch16_224,deit_base_patch16_224",
    batches: Annotated[str, typer.Option(help="Images per call.")] = "1,8",
    degrees: Annotated[str, typer.Option(help="Degrees beside 0.")] = "4,8,12,16",
    seconds: Annotated[float, typer.Option(help="Seconds to measure each group for, at least 15 rounds.")] = 60.0,
    work: Annotated[Path, typer.Option(help="Graphs and finished groups.")] = ROOT / "build" / "bench" / "cpu",
    out: Annotated[Path, typer.Option(help="Page; its plots lie beside it.")] = ROOT / "bench" / "results" / "cpu.md",
    finished: Annotated[bool, typer.Option("--finished", help="Measure nothing; write what is there.")] = False,
    only: Annotated[str, typer.Option(help="Only contenders whose names match: fewer, so more rounds.")] = "",
) -> None:
    """Measures every group that is not there yet, and writes the page and the plots."""
    groups: dict[tuple[str, int], dict[int, list[Row]]] = {}
    for name in models.split(","):
        bench = None
        for batch in map(int, batches.split(",")):
            for degree in map(int, degrees.split(",")):
                file = work / f"{name}-{batch}-{degree}{f'-{_letters(only)}' if only else ''}.json"
                if finished and not file.exists():
                    continue
                if not file.exists():
                    began = time.monotonic()
                    print(f"{name}, batch {batch}, r = {degree} ...", file=sys.stderr, flush=True)
                    bench = bench or Bench(name, work)
                    rows = run_group(bench, batch, degree, seconds, only)
                    torch.compiler.reset()
                    write_atomically(file, json.dumps([asdict(row) for row in rows], indent=1).encode())
                    print(f"  {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
                rows = [Row(**row) for row in json.loads(file.read_text())]
                groups.setdefault((name, batch), {})[degree] = rows
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, _page(groups, out, only).encode())
    print(f"wrote {out}")


def _letters(text: str) -> str:
    return re.sub(r"\W+", "-", text)


def _page(groups: Mapping[tuple[str, int], Mapping[int, list[Row]]], out: Path, only: str) -> str:
    who = f'of those whose names match "{only}" all contenders' if only else "all contenders"
    parts = [f"# Engines on a CPU\n\nWritten by `make bench` ([bench/cpu.py](../cpu.py)), {date.today().isoformat()}: "
             f"{_processor()}, {len(os.sched_getaffinity(0))} cores, no GPU; {_versions()}.\n\nRandomly initialized "
             f"weights, real sizes. For each model, batch size and degree {who} took turns in one process: "
             "ratios within a block of rows are comparable. ms: median of one call, and its quartiles. All ratios are "
             "medians of ratios round by round. Speed-up: over the same contender without merging. Ideal: by "
             "multiplications. Tax: beyond the same engine that drops the last r tokens unseen. Over plain export: the "
             "plain export's time on the same library in the same precision, over this one's; in int8 NNCF's "
             "(preset for transformers, on OpenVINO's model). Over ours bf16, fp32: the time of our engine on "
             "OpenVINO in bf16, and on ONNX Runtime in float32, at the same degree, over this one's. In parentheses: "
             "quartiles."]  # fmt: skip
    for (name, batch), degrees in groups.items():
        picture = out.with_name(f"{out.stem}-{name.split('_patch')[0]}-{batch}.png")
        _draw(f"{name}, batch {batch}", degrees, picture)
        parts.append(
            f"## {name}, batch {batch}\n\n![latency against degree]({picture.name})\n\n" + _table(batch, degrees)
        )
    return "\n\n".join(parts) + "\n"


def _table(batch: int, degrees: Mapping[int, list[Row]]) -> str:
    columns = ("r", "contender", "schedule", "rounds", "ms", "quartiles", "images/s", "speed-up", "of ideal", "tax",
               "over plain export", "over ours bf16", "over ours fp32")  # fmt: skip
    lines = []
    for degree, rows in degrees.items():
        for row in sorted(rows, key=lambda row: (row.schedule == "-", row.ms)):
            merged, gains = row.schedule != "-", (row.gain, row.over_half, row.over_float)
            lines.append((str(degree if merged else 0), row.contender, row.schedule, str(row.rounds or ""),
                          f"{row.ms:.1f}", f"{row.low:.1f} - {row.high:.1f}", f"{1000 * batch / row.ms:.0f}",
                          f"{row.speed_up:.2f}x" if merged else "", f"{row.speed_up / row.ideal:.0%}" if merged else "",
                          spread(row.tax, "{:+.1%}"), *(spread(each, "{:.2f}x") for each in gains)))  # fmt: skip
    return table(columns, lines, text=("contender", "schedule"))


def _draw(title: str, degrees: Mapping[int, list[Row]], file: Path) -> None:
    """Latency against degree, each as a share of its own time without merging, with slice bounds and the ideal."""
    with pyplot.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False}):
        figure, axis = pyplot.subplots(figsize=(7, 4))
        for contender in dict.fromkeys(row.contender for rows in degrees.values() for row in rows):
            for schedule in ("constant", STRIDED):
                points = [(degree, row) for degree, rows in degrees.items() for row in rows
                          if (row.contender, row.schedule) == (contender, schedule)]  # fmt: skip
                if not points:
                    continue
                style = "-" if contender.startswith("ours") else ":"
                label = contender if schedule == "constant" else f"{contender}, {schedule}"
                xs = [0, *(degree for degree, _ in points)]
                (line,) = axis.plot(xs, [1, *(1 / row.speed_up for _, row in points)], style, marker="o", markersize=3,
                                    label=label)  # fmt: skip
                if points[0][1].bound is not None:
                    bounds = [1, *(1 / row.bound for _, row in points)]
                    axis.plot(xs, bounds, "--", color=line.get_color(), linewidth=0.8, alpha=0.6)
        ideal = [1, *(1 / next(row.ideal for row in rows if row.schedule == "constant") for rows in degrees.values())]
        axis.plot([0, *degrees], ideal, color="black", linewidth=1, label="by multiplications")
        axis.set(title=f"{title} (dashed: slice bounds)", xlabel="degree r", ylabel="time / own time at r = 0")
        axis.legend(fontsize=6, loc="lower left")
        figure.tight_layout()
        figure.savefig(file, dpi=110, metadata={"Software": None})
        pyplot.close(figure)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    flags = next((line for line in lines if line.startswith("flags")), "")
    known = [name for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if f" {name}" in flags]
    return f"{found or platform.machine()} ({', '.join(known)})"


def _versions() -> str:
    names = ("torch", "timm", "onnxruntime-gpu", "openvino", "nncf")
    return ", ".join(f"{name} {version(name)}" for name in names) + f", Python {platform.python_version()}"


if __name__ == "__main__":
    typer.run(main)
