"""Our quantization beside NNCF's: the same networks, the same images, the same engine library.

python -m bench.peer_quantizers

NNCF quantizes OpenVINO's model of our float32 graph with its preset for transformers (SmoothQuant and bias correction
included), at degree 0 and at merging degrees, where it sees the merge as the standard operators of the function body.
Both run on OpenVINO, the rest in bfloat16 where the processor has it. The networks are the shipped example and those of
`make experiment`.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import onnx
import openvino
import torch
import typer
from torch import Tensor, nn

from bench.experiment.protocol import PRESETS
from bench.experiment.stages import Bench as Experiment
from bench.experiment.tasks import TASKS
from bench.markdown import table
from tocom.calib.quantize.calibrate import OBSERVED, Method, calibrate
from tocom.checkpoint import load_model
from tocom.compensator import Compensator
from tocom.export.artifacts import FusedCheckpoint
from tocom.export.engine.build import build
from tocom.export.graph.fuse import fuse
from tocom.export.graph.inline import inline
from tocom.export.graph.insert_qdq import quantized_graph
from tocom.export.graph.lower import Lowering
from tocom.export.graph.trace import INPUT
from tocom.export.graph.weight_store import WeightStore
from tocom.runtime.backends import BACKENDS
from tocom.runtime.engines.base import open_engine
from tocom.runtime.engines.openvino_engine import precision_hint
from tocom.runtime.files import write_atomically
from tocom.vit import ReducedViT, schedule_for

ROOT = Path(__file__).resolve().parent.parent
DEGREES = (0, 8, 16)
SCALE = 0.1
_BATCH = 64


@dataclass(frozen=True)
class Row:
    """One network at one degree; top-1 in percent.

    Attributes:
        network: Which.
        degree: Target degree.
        plain: PyTorch in float32.
        ours: Our int8 engine.
        theirs: NNCF's.
        error: Standard error of ours - theirs, over the same sheets.
    """

    network: str
    degree: int
    plain: float
    ours: float
    theirs: float
    error: float


def networks(folder: Path) -> Iterator[tuple[str, str, nn.Module, Compensator]]:
    """Name, task, float network and compensator of everything that is trained: the example, the experiment's."""
    example = ROOT / "examples" / "digits"
    yield "example", "board", load_model(str(example)).model, Compensator.load(example / "compensator.safetensors")
    experiment = Experiment(PRESETS["small"], folder, "cpu")
    for task in PRESETS["small"].tasks:
        for seed in PRESETS["small"].seeds:
            name = f"{task}-0-{seed}"
            if (folder / f"{name}.safetensors").exists():
                yield name, task, experiment.network(f"{name}.safetensors"), experiment.compensator("constant")


def at_degree(model: nn.Module, compensator: Compensator, degree: int) -> FusedCheckpoint:
    """The weights of a degree."""
    compensation = compensator.between(0, degree, SCALE) if degree else None
    weights = model.state_dict() if compensation is None else fuse(model.state_dict(), compensation)
    return FusedCheckpoint(weights, "network", degree, 0, SCALE, "", "", compensation)


def with_weights(model: nn.Module, fused: FusedCheckpoint, degree: int) -> ReducedViT:
    """The float reference of a degree."""
    own = copy.deepcopy(model)
    own.load_state_dict(dict(fused.weights))
    return ReducedViT(own.eval().requires_grad_(False), degree)


def by_nncf(graph: Path, pixels: Tensor) -> openvino.CompiledModel:
    """A float32 graph, quantized by NNCF's preset for transformers."""
    import nncf

    plain = graph.with_suffix(".plain.onnx")
    plain.write_bytes(inline(onnx.load(graph, load_external_data=False)).SerializeToString())
    images = nncf.Dataset([image[None].numpy() for image in pixels], lambda image: {INPUT: image})
    model = nncf.quantize(
        openvino.Core().read_model(plain),
        images,
        preset=nncf.QuantizationPreset.PERFORMANCE,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(pixels),
    )
    return openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision_hint("int8")})


def hits(infer, pixels: Tensor, labels: Tensor) -> np.ndarray:
    """Which sheets are classified right, [B] bool."""
    parts = [infer(pixels[start : start + _BATCH].numpy()) for start in range(0, len(pixels), _BATCH)]
    return np.concatenate(parts).argmax(axis=1) == labels.numpy()


def compare(name: str, task: str, model: nn.Module, compensator: Compensator, sheets: int) -> list[Row]:
    """One network at every degree."""
    calibration_sheets, _ = TASKS[task].sheets("train", 5, 128)
    pixels, labels = TASKS[task].sheets("test", 4, sheets)
    references = {degree: with_weights(model, at_degree(model, compensator, degree), degree) for degree in DEGREES}
    calibration = calibrate([references[degree] for degree in OBSERVED], calibration_sheets, Method())
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        lowering = Lowering(model, WeightStore(folder))
        for degree in DEGREES:
            fused = at_degree(model, compensator, degree)
            plain = lowering.lower(schedule_for(model, degree), fused, f"{degree}.onnx")
            quantization = calibration.quantization(references[degree].model)
            store = WeightStore(folder)
            graph = quantized_graph(plain, model, quantization, store, f"int8-{degree}.onnx", BACKENDS["openvino"].qdq)
            engine = build(graph, backend="openvino", precision="int8")
            with open_engine(engine.file, "openvino", precision="int8") as runner:
                ours = hits(runner.infer, pixels, labels)
            compiled = by_nncf(plain.file, calibration_sheets)
            theirs = hits(lambda images, compiled=compiled: compiled({INPUT: images})[0], pixels, labels)
            reference = references[degree]
            with torch.inference_mode():
                exact = hits(lambda images, run=reference: run(torch.from_numpy(images)).numpy(), pixels, labels)
            difference = ours.astype(float) - theirs.astype(float)
            rows.append(Row(name, degree, *(100 * float(each.mean()) for each in (exact, ours, theirs)),
                            100 * float(difference.std() / len(difference) ** 0.5)))  # fmt: skip
    return rows


def page(rows: list[Row], sheets: int) -> str:
    """The page."""
    lines = [(row.network, str(row.degree), f"{row.plain:.2f}", f"{row.ours - row.plain:+.2f}",
              f"{row.theirs - row.plain:+.2f}", f"{row.ours - row.theirs:+.2f} ± {row.error:.2f}")
             for row in rows]  # fmt: skip
    means = []
    for degree in DEGREES:
        of = [row for row in rows if row.degree == degree]
        difference = np.array([row.ours - row.theirs for row in of])
        error = float(np.sqrt(sum(row.error**2 for row in of)) / len(of))
        means.append(("mean", str(degree), f"{np.mean([row.plain for row in of]):.2f}",
                      f"{np.mean([row.ours - row.plain for row in of]):+.2f}",
                      f"{np.mean([row.theirs - row.plain for row in of]):+.2f}",
                      f"{difference.mean():+.2f} ± {error:.2f}"))  # fmt: skip
    columns = ("network", "r", "float32", "ours int8", "NNCF int8", "ours - NNCF")
    return (
        "# Our quantization beside NNCF's\n\nWritten by `python -m bench.peer_quantizers` "
        f"([bench/peer_quantizers.py](../peer_quantizers.py)), {date.today().isoformat()}: nncf {version('nncf')}, "
        f"openvino {version('openvino')}.\n\nTop-1 in percent on {sheets} test sheets; the columns in int8 are "
        "differences to float32 in PyTorch. Both quantizers saw the same 128 training sheets and run on OpenVINO, the "
        "rest in bfloat16 where the processor has it. Ours by its default (plain ranges, shared by all degrees); "
        "NNCF's preset for transformers, on the graph of the degree with the merge as standard operators. ±: standard "
        f"error over the sheets, which both saw.\n\n{table(columns, lines + means, text=('network',))}\n"
    )


def main(
    sheets: Annotated[int, typer.Option(help="Test sheets.")] = 4096,
    experiment: Annotated[Path, typer.Option(help="Finished `make experiment`.")] = ROOT
    / "build"
    / "experiment"
    / "small",
    work: Annotated[Path, typer.Option(help="Finished networks.")] = ROOT / "build" / "bench" / "peer-quantizers",
    out: Annotated[Path, typer.Option(help="Page.")] = ROOT / "bench" / "results" / "quantize-peer.md",
) -> None:
    """Compares every network that is not there yet, and writes the page."""
    work.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, task, model, compensator in networks(experiment):
        file = work / f"{name}-{sheets}.json"
        if not file.exists():
            print(name, file=sys.stderr, flush=True)
            found = compare(name, task, model, compensator, sheets)
            write_atomically(file, json.dumps([asdict(row) for row in found], indent=1).encode())
        rows += [Row(**row) for row in json.loads(file.read_text())]
    write_atomically(out, page(rows, sheets).encode())
    print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
