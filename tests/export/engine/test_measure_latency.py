"""the slice bound is the network that drops tokens unseen, and a degree pays if it is faster."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import tocom.export.engine.measure_latency
from tocom.export.engine.measure_latency import measured
from tocom.export.graph.lower import reference_model
from tocom.export.graph.slice_bound import slice_bound
from tocom.reduction import MERGE, PRUNE
from tocom.runtime.degrees.latency import Latency
from tocom.runtime.engines.base import open_engine
from tocom.runtime.manifest import EngineEntry
from tocom.vit import schedule_for


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("family", "reduction"),
    [("deit_tiny", MERGE), pytest.param("map", MERGE, marks=pytest.mark.full), ("deit_tiny", PRUNE)],
)
def test_the_slice_bound_drops_the_last_tokens_of_every_block(
    exported, make_vit, fused_of, noise, backend, family, reduction
):
    model, engine = make_vit(family), exported(family, 16 if family == "map" else 8, reduction)
    degree = engine.graph.fused.degree
    reference = reference_model(model, schedule_for(model, degree), fused_of(model, degree), reduction)
    pixels = noise(3, *model.patch_embed.img_size)
    with torch.no_grad():
        expected = reference(torch.from_numpy(pixels), lambda _block, x, size, _signal, r: (x[:, :-r], size[:, :-r]))
    with slice_bound(engine.file) as file, open_engine(file, backend) as runner:
        np.testing.assert_allclose(runner.infer(pixels), expected.numpy(), rtol=0, atol=1e-4)
    assert not file.exists()


def entry(degree: int) -> EngineEntry:
    schedule = (degree, degree)
    return EngineEntry(degree, None, schedule, (65, 65 - degree, 65 - 2 * degree), 0.5, "onnxruntime", "fp32", "g.onnx",
                       "g.onnx", {}, "", {}, {}, {})  # fmt: skip


def test_a_degree_pays_where_it_saves_more_than_noise(tmp_path, monkeypatch):
    times = {1: {"0": 10.0, "8": 9.9, "16": 9.0}, 8: {"0": 10.0, "8": 9.7, "16": 11.0}}

    def invented(entries, folder, batch, _rivals):
        own = {name: Latency(time, 2 * time, 12) for name, time in times[batch].items()}
        return own | {f"slice bound of {name}": Latency(time - 1, time, 12) for name, time in times[batch].items()
                      if name != "0"}  # fmt: skip

    monkeypatch.setattr(tocom.export.engine.measure_latency, "_times", invented)
    low, middle, high = measured([entry(0), entry(8), entry(16)], tmp_path)
    assert (low.pays, middle.pays, high.pays) == (
        {"1": True, "8": True}, {"1": False, "8": True}, {"1": True, "8": False},
    )  # fmt: skip
    assert middle.latency_ms["1"] == {"p50": 9.9, "p99": 19.8, "slice_bound": 8.9}
    assert low.latency_ms["8"] == {"p50": 10.0, "p99": 20.0}
    assert EngineEntry.from_json(replace(middle, sha256={"g.onnx": "a" * 64}).to_json()).pays == middle.pays


def test_a_large_family_is_measured_in_groups_that_a_slow_minute_does_not_set_apart(tmp_path, monkeypatch):
    groups = []

    def invented(entries, folder, batch, _rivals):
        groups.append([entry.degree for entry in entries])
        slow = len(groups)  # every group takes longer than the one before
        return {str(entry.degree): Latency(slow * (20.0 - entry.degree), slow * 30.0, 12) for entry in entries}

    monkeypatch.setattr(tocom.export.engine.measure_latency, "_times", invented)
    found = measured([entry(degree) for degree in range(10)], tmp_path, batches=(1,))
    assert groups == [[0, 1, 2, 3, 4], [0, 5, 6, 7, 8], [0, 9]]
    assert [each.latency_ms["1"]["p50"] for each in found] == [2 * (20.0 - degree) for degree in range(10)]
    assert found[0].pays == {"1": True} and found[9].pays == {"1": True}


def test_every_engine_and_every_bound_is_measured(exported, in_own_folder):
    engine = in_own_folder(exported("deit_tiny", 8))
    merged = replace(entry(8), onnx="model.onnx", engine="model.onnx")
    baseline = replace(entry(0), onnx="model.onnx", engine="model.onnx")
    found = measured([baseline, merged], engine.file.parent, batches=(2,))
    assert [set(each.latency_ms["2"]) for each in found] == [{"p50", "p99"}, {"p50", "p99", "slice_bound"}]
    assert not list(engine.file.parent.glob(".*"))
