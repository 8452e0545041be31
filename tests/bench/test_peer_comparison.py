"""bench.peer_comparison: a fault is the same on both sides, and the page counts what it says it counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

pytest.importorskip("polygraphy", reason="Polygraphy is not installed: pip install tocom[polygraphy]")

from bench.peer_comparison.faults import FAULTS
from bench.peer_comparison.page import draw, fewest_errors, hidden, page, rank_share
from tocom.vit import ReducedViT

FAMILY, DEGREE, BLOCK = "deit_tiny", 8, 1
IN_CODE = [name for name, fault in FAULTS.items() if fault.edit is not None]


def logits_of(graph, folder, pixels):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options)
    return session.run(["logits"], {"pixel_values": pixels})[0]


@pytest.mark.parametrize("name", IN_CODE)
def test_a_fault_is_the_same_on_both_sides(name, exported, make_vit, noise):
    fault, engine, model = replace(FAULTS[name], block=BLOCK), exported(FAMILY, DEGREE), make_vit(FAMILY)
    pixels = noise(40, *model.patch_embed.img_size, seed=3)
    graph = onnx.load(engine.file, load_external_data=False)
    right = logits_of(graph, engine.file.parent, pixels)
    fault.edit(graph, fault.block)
    ours = logits_of(graph, engine.file.parent, pixels)
    with torch.no_grad():
        plain = fault.plain_module(model, DEGREE)(torch.from_numpy(pixels)).numpy()
    errors = np.abs(ours - plain).max(axis=1)
    assert np.quantile(errors, 0.9) < 1e-4  # one or two may decide otherwise at a tie
    assert np.abs(ours - right).max() > 1e-3


@pytest.mark.parametrize("name", [name for name in FAULTS if name not in IN_CODE])
def test_a_fault_in_a_module_is_in_a_copy(name, make_tiny, noise):
    fault = replace(FAULTS[name], block=BLOCK)
    model = make_tiny("deit_tiny_patch16_224", num_heads=6)  # whose scale has more than three digits
    pixels = torch.from_numpy(noise(2, *model.patch_embed.img_size))
    before = ReducedViT(model, DEGREE)(pixels)
    assert not torch.equal(fault.plain_module(model, DEGREE)(pixels), before)
    assert torch.equal(ReducedViT(model, DEGREE)(pixels), before)


def case(fault, error, gate, *, passed=True, engine="openvino fp32"):
    theirs = dict.fromkeys(("max", "mean", "median", "quantile", "cosine"), error) | {"default": error < 1e-5}
    ours = {"passed": passed, "first": None if passed else [2, "mlp"], "flips": 3, "unexplained": 0, "part_u": 2.0,
            "gate": gate}  # fmt: skip
    return {"fault": fault, "engine": engine, "set": 0, "theirs": theirs, "ours": ours}


CASES = [
    case("healthy", 1e-6, 0.2),
    case("healthy", 2e-2, 0.3),
    case("tanh", 1e-3, 50.0, passed=False),
    case("v 1.1", 5e-1, 9.0, passed=False),
]


def test_the_page_counts_errors_of_every_tolerance(tmp_path):
    drawn = {"flipped": [7], "chosen": [1, 0]}
    layers = [["healthy", 7, [2, "ArgMax"]], ["healthy", None, None], ["tanh", None, [2, "Gelu"]]]
    text = page(CASES, layers, drawn, 8, 4, 100, "picture.png")
    assert "fails 1 of 2 healthy cases and passes 0 of 2 faulty ones; the proof fails 0 and passes 0." in text
    assert "| openvino fp32 | largest error | 0.75 | 1 of 2 | 1 of 2 |" in text
    assert "within what healthy cases come to in every statistic at once: GELU by tanh in block 2" in text
    assert "| healthy, a flip (sheet 7) | block 2, ArgMax |" in text and "| healthy | none: passes |" in text
    draw(CASES, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size < 120_000


def test_counting():
    assert rank_share([1, 2], [3, 4]) == 1 and rank_share([3], [3]) == 0.5
    assert fewest_errors([1, 2], [3, 4]) == (0, 0)
    assert sum(fewest_errors([1, 5, 6], [2, 3, 7])) == 2
    assert hidden(CASES, "openvino fp32") == ["tanh"]
