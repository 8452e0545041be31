"""The OpenVINO engine: what it shares with the others, its precisions and settings, and the native operator in it."""

from __future__ import annotations

import numpy as np
import pytest

import tocom.runtime.engines.openvino_engine
from tocom.runtime.backends import native_operators
from tocom.runtime.engines.base import open_engine
from tocom.runtime.errors import InputError
from tocom.runtime.native import library


@pytest.fixture
def graph(tmp_path, colour_graph):
    return colour_graph(tmp_path / "colours.onnx")


def images(batch: int, side: int = 8) -> np.ndarray:
    return np.random.default_rng(batch).standard_normal((batch, 3, side, side), dtype=np.float32)


SETTINGS = [{}, {"threads": 1}, {"batch": 4}, {"throughput": True, "threads": 2}, {"throughput": True, "batch": 4}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_logits_equal_numpys_for_every_batch_size(graph, settings):
    with open_engine(graph, "openvino", **settings) as runner:
        assert (runner.backend, runner.input_size, runner.classes) == ("openvino", (3, 8, 8), 3)
        for batch in (1, 2, 4, 9):
            logits = runner.infer(images(batch))
            assert logits.dtype == np.float32
            np.testing.assert_allclose(logits, 4 * images(batch).mean((2, 3)), rtol=0, atol=1e-5)


def test_an_answer_stays_what_it_was_after_the_next_call(graph):
    with open_engine(graph, "openvino") as runner:
        first = runner.infer(images(2))
        kept = first.copy()
        runner.infer(images(2) + 1)
        np.testing.assert_array_equal(first, kept)


def test_bfloat16_rounds_and_float32_does_not(graph):
    if "no bf16" in tocom.runtime.engines.openvino_engine.describe():
        pytest.skip("this processor has no bf16 instructions")
    with open_engine(graph, "openvino", precision="bf16") as half, open_engine(graph, "openvino") as single:
        one, other = half.infer(images(5)), single.infer(images(5))
    assert 1e-6 < np.abs(one - other).max() < 0.02


def test_a_processor_without_bfloat16_is_told(graph, monkeypatch):
    class Old:
        def get_property(self, *_):
            return ["FP32"]

    monkeypatch.setattr(tocom.runtime.engines.openvino_engine, "_core", Old)
    with pytest.raises(InputError, match="no bf16 instructions"):
        open_engine(graph, "openvino", precision="bf16")


def test_infer_all_gives_every_output_by_name(tmp_path, colour_graph):
    with open_engine(colour_graph(tmp_path / "debug.onnx", debug=True), "openvino") as runner:
        outputs = runner.infer_all(images(3))
    assert set(outputs) == {"logits", "features"}
    np.testing.assert_allclose(outputs["features"], images(3).mean((2, 3)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("content", [b"", b"\x00hello", None])
def test_a_file_that_is_no_graph_gives_one_line_and_silence(tmp_path, graph, capfd, content):
    file = tmp_path / "bad.onnx"
    file.write_bytes(graph.read_bytes()[:100] if content is None else content)
    with pytest.raises(InputError, match="bad.onnx") as caught:
        open_engine(file, "openvino")
    assert str(caught.value).isprintable()
    assert capfd.readouterr() == ("", "")


def test_a_graph_that_breaks_the_contract_is_refused(tmp_path, colour_graph):
    with pytest.raises(InputError, match=r"must take one input, pixel_values .*, got x "):
        open_engine(colour_graph(tmp_path / "a.onnx", image="x"), "openvino")
    with pytest.raises(InputError, match=r"must give logits \[batch, classes\], got y"):
        open_engine(colour_graph(tmp_path / "b.onnx", logits="y"), "openvino")


def test_without_the_native_operator_a_graph_that_needs_it_is_refused(exported, monkeypatch):
    engine = exported("deit_tiny", 8)
    monkeypatch.setattr(tocom.runtime.engines.openvino_engine, "library", lambda: None)
    assert native_operators("openvino") == frozenset()
    assert "python -m tocom.runtime.native" in tocom.runtime.engines.openvino_engine.describe()
    with pytest.raises(InputError, match="python -m tocom.runtime.native"):
        open_engine(engine.file, "openvino")


@pytest.mark.skipif(library() is None, reason="the native operator is not built (make native)")
def test_the_native_operator_tells_its_decisions_for_every_image(exported, noise):
    engine = exported("deit_tiny", 8)
    pixels = noise(5, 64, 64)
    with open_engine(engine.file, "openvino") as free, open_engine(engine.file, "openvino", batch=2) as fixed:
        one, other = free.infer_all(pixels), fixed.infer_all(pixels)
        np.testing.assert_array_equal(free.infer(pixels), one["logits"])
    assert one["block.0.src"].shape == (5, 8) and one["block.0.unm"].dtype == np.int64
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=0, atol=1e-5)
