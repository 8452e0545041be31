"""A plain export compared by Polygraphy alone, beside the proof: the same network, library, number format and faults.

python -m bench.peer_comparison

A straightforward token merging is exported by `torch.onnx.export`, healthy and with faults, and Polygraphy compares
what an engine library makes of it with ONNX Runtime on the healthy export in float32. The same faults are planted in
our graphs, and `validate` judges the same libraries and formats on the same sheets. The network is the shipped example.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import typer
from polygraphy.backend.onnxrt import OnnxrtRunner

from bench.peer_comparison.cases import ENGINES, Bench, compared, run, runner_of, session
from bench.peer_comparison.faults import FAULTS
from bench.peer_comparison.layers import differences, first_beyond, marked
from bench.peer_comparison.page import draw, page
from examples.sheets import Sheets, normalize
from tocom.checkpoint import load_model
from tocom.runtime.files import write_atomically

ROOT = Path(__file__).resolve().parents[2]
HEALTHY = "healthy"
SEED, SETS, SHEETS = 4, 40, 200
FLIPPED = 1e-3  # a logit that is further off in float32 follows from another decision
_IN_LAYERS = ("v 1.01", "last b-token", "last pair")
_WINDOW = 64  # sheets of which every value is kept


def sheets_of(sets: int, size: int) -> list[np.ndarray]:
    """Sheets of test handwriting, float32 [size, 3, 32, 32] each."""
    draw = Sheets("test", "board", SEED)
    drawn = torch.cat([normalize(draw.batch(2000)[0]) for _ in range(-(-sets * size // 2000))]).numpy()
    return [drawn[start : start + size] for start in range(0, sets * size, size)]


class Measurement:
    """Finds what was not found before, and keeps it in a folder.

    Args:
        degree: Tokens merged in every block.
        work: The folder.
        sets: Images.
    """

    def __init__(self, degree: int, work: Path, sets: Sequence[np.ndarray]) -> None:
        self._degree, self._work, self._sets = degree, work, sets
        self._scratch = tempfile.TemporaryDirectory()
        self._bench = Bench(load_model(str(ROOT / "examples" / "digits")).model, degree, Path(self._scratch.name))
        work.mkdir(parents=True, exist_ok=True)

    @functools.cached_property
    def healthy(self) -> Path:
        """The healthy plain export."""
        return self._bench.plain(HEALTHY, None)

    @functools.cached_property
    def reference(self) -> Any:
        """What ONNX Runtime answers with it in float32."""
        return run(OnnxrtRunner(functools.partial(session, self.healthy), name="reference"), self._sets)

    @functools.cached_property
    def flipped(self) -> list[int]:
        """Sheets about which the healthy export decides otherwise in OpenVINO, float32."""
        found = run(runner_of(self.healthy, "openvino", "fp32"), self._sets)[0][1]
        errors = [np.abs(one["logits"] - other["logits"]).max(axis=1)
                  for one, other in zip(found, self.reference[0][1], strict=True)]  # fmt: skip
        return np.flatnonzero(np.concatenate(errors) > FLIPPED).tolist()

    def chosen(self) -> list[int]:
        """Sets that are looked at: those with such sheets, and as many others, three at least."""
        size = len(self._sets[0])
        with_flips = sorted({sheet // size for sheet in self.flipped})
        others = [index for index in range(len(self._sets)) if index not in with_flips]
        return others[: max(3, len(with_flips))] + with_flips

    def drawn(self) -> dict[str, Any]:
        """How the sets were chosen."""
        return self._kept("drawn", lambda: {"flipped": self.flipped, "chosen": self.chosen()})

    def cases(self, name: str, fault: Any, backend: str, precision: str, at: Sequence[int]) -> list[dict[str, Any]]:
        """One engine on some of the sets: what Polygraphy says, and the proof."""

        def measure() -> list[dict[str, Any]]:
            sets = [self._sets[index] for index in at]
            reference = type(self.reference)()
            reference.extend([("reference", [self.reference[0][1][index] for index in at])])
            plain = self.healthy if fault is None else self._plain(name)
            theirs = compared(reference, run(runner_of(plain, backend, precision), sets))
            engine = self._bench.ours(name, fault, backend, precision, self._lowered(name))
            ours = [self._bench.proven(engine, images) for images in sets]
            return [
                {"fault": name, "engine": f"{backend} {precision}", "set": index, "theirs": one, "ours": other}
                for index, one, other in zip(at, theirs, ours, strict=True)
            ]

        found = self._kept(f"{name}-{backend}-{precision}", measure)
        return [case for case in found if case["set"] in at]

    def layers(self) -> list[list[Any]]:
        """The first value that differs too much, case by case."""

        def measure() -> list[list[Any]]:
            images = np.concatenate(self._sets)
            quiet = [index * len(self._sets[0]) for index in self.chosen()[:2]]
            graph = marked(self.healthy)
            usual = differences(graph, graph.file, images[quiet[0] : quiet[0] + _WINDOW])
            found = []
            for sheet in self.flipped:
                start = max(0, sheet - _WINDOW // 2)
                there = differences(graph, graph.file, images[start : start + _WINDOW])
                found.append([HEALTHY, sheet, first_beyond(there, usual, graph)])
            window = images[quiet[1] : quiet[1] + _WINDOW]
            found.append([HEALTHY, None, first_beyond(differences(graph, graph.file, window), usual, graph)])
            for name in _IN_LAYERS:
                there = differences(graph, marked(self._plain(name)).file, window)
                found.append([name, None, first_beyond(there, usual, graph)])
            return found

        return self._kept("layers", measure)

    @functools.cache  # noqa: B019 - one object, which lives as long as the program
    def _plain(self, name: str) -> Path:
        return self._bench.plain(name.replace(" ", "-"), FAULTS[name])

    @functools.cache  # noqa: B019
    def _lowered(self, name: str) -> Any:
        return self._bench.lowered(name, FAULTS.get(name))

    def _kept(self, name: str, measure: Any) -> Any:
        file = self._work / f"{name.replace(' ', '-')}-r{self._degree}.json"
        if not file.exists():
            print(name, file=sys.stderr, flush=True)
            write_atomically(file, json.dumps(measure(), indent=1).encode())
        return json.loads(file.read_text())


def main(
    degree: Annotated[int, typer.Option(help="Tokens merged in every block.")] = 8,
    sets: Annotated[int, typer.Option(help="Sets of sheets that are drawn.")] = SETS,
    sheets: Annotated[int, typer.Option(help="Sheets of each.")] = SHEETS,
    work: Annotated[Path, typer.Option(help="Finished cases.")] = ROOT / "build" / "bench" / "peer-comparison",
    out: Annotated[Path, typer.Option(help="Page.")] = ROOT / "bench" / "results" / "peer-comparison.md",
) -> None:
    """Measures every case that is not there yet, and writes the page and its picture."""
    torch.set_num_threads(1)
    measurement = Measurement(degree, work, sheets_of(sets, sheets))
    drawn = measurement.drawn()
    cases = []
    for backend, precision in ENGINES:
        cases += measurement.cases(HEALTHY, None, backend, precision, drawn["chosen"])
    for name, fault in FAULTS.items():
        for backend, precision in ENGINES:
            cases += measurement.cases(name, fault, backend, precision, drawn["chosen"][::2])
    layers = measurement.layers()
    picture = out.with_suffix(".png")
    draw(cases, picture)
    write_atomically(out, page(cases, layers, drawn, degree, sets, sheets, picture.name).encode())
    print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
