"""Tests runtime/engines: the checks every engine shares, and the ONNX Runtime engine."""

import importlib
import sys
from dataclasses import replace

import numpy as np
import pytest
from onnx import TensorProto, helper

from tocom.runtime import backends
from tocom.runtime.backends import BACKENDS, available
from tocom.runtime.engines.base import EngineRunner, open_engine
from tocom.runtime.engines.onnxruntime_engine import CPU, OrtRunner
from tocom.runtime.errors import InputError


@pytest.fixture
def graph(tmp_path, colour_graph):
    return colour_graph(tmp_path / "colours.onnx")


def images(batch: int, side: int = 8) -> np.ndarray:
    return np.random.default_rng(batch).standard_normal((batch, 3, side, side), dtype=np.float32)


def test_logits_equal_numpys_for_every_batch_size(graph):
    with open_engine(graph, "onnxruntime", threads=1) as runner:
        assert (runner.backend, runner.input_size, runner.classes) == ("onnxruntime", (3, 8, 8), 3)
        for batch in (1, 2, 5):
            pixel_values = images(batch)
            logits = runner.infer(pixel_values)
            assert logits.dtype == np.float32
            np.testing.assert_allclose(logits, 4 * pixel_values.mean((2, 3)), rtol=0, atol=1e-5)


def test_a_batch_in_another_memory_order_gives_the_same(graph):
    pixel_values = images(2)
    with open_engine(graph, "onnxruntime") as runner:
        expected = runner.infer(pixel_values)
        np.testing.assert_array_equal(runner.infer(np.asfortranarray(pixel_values)), expected)
        np.testing.assert_array_equal(runner.infer(np.concatenate([pixel_values] * 2)[::2][[0, 0]])[0], expected[0])


def test_infer_all_gives_every_output_by_name(tmp_path, colour_graph):
    pixel_values = images(2)
    with OrtRunner(colour_graph(tmp_path / "debug.onnx", debug=True)) as runner:
        outputs = runner.infer_all(pixel_values)
        assert list(outputs) == ["logits", "features"]
        np.testing.assert_allclose(outputs["features"], pixel_values.mean((2, 3)), rtol=0, atol=1e-5)
        np.testing.assert_array_equal(outputs["logits"], runner.infer(pixel_values))


@pytest.mark.parametrize(
    ("pixel_values", "words"),
    [
        (images(1).astype(np.float64), "array of float32, got float64"),
        (images(1).astype(">f4"), "array of float32, got >f4"),
        (images(1).tolist(), "array of float32, got list"),
        (images(1)[0], r"shape \[batch, 3, 8, 8\] with batch 1 or more, got \(3, 8, 8\)"),
        (images(1, side=9), r"got \(1, 3, 9, 9\)"),
        (images(1)[:0], r"got \(0, 3, 8, 8\)"),
    ],
)
def test_a_wrong_batch_is_refused(graph, pixel_values, words):
    with open_engine(graph, "onnxruntime") as runner:
        for infer in (runner.infer, runner.infer_all):
            with pytest.raises(InputError, match=words):
                infer(pixel_values)


def test_a_closed_engine_is_refused_and_closing_twice_is_fine(graph):
    with open_engine(graph, "onnxruntime") as runner:
        pass
    runner.close()
    with pytest.raises(InputError, match="must be open"):
        runner.infer(images(1))


def test_logits_of_another_shape_are_refused():
    class Broken(EngineRunner):
        backend, input_size, classes = "broken", (3, 8, 8), 3

        def _close(self):
            pass

        def _infer(self, pixel_values):
            return np.zeros((1, 3), np.float32)

    assert Broken().infer(images(1)).shape == (1, 3)
    with pytest.raises(InputError, match=r"logits of shape \(2, 3\), got \(1, 3\)"):
        Broken().infer(images(2))


@pytest.mark.parametrize("content", [b"", b"\x00hello", b"\n" * 100, None])
def test_a_file_that_is_no_graph_gives_one_line_and_silence(tmp_path, graph, capfd, content):
    file = tmp_path / "bad.onnx"
    file.write_bytes(graph.read_bytes()[:100] if content is None else content)
    with pytest.raises(InputError, match="bad.onnx is not a graph that ONNX Runtime loads") as caught:
        open_engine(file, "onnxruntime")
    assert str(caught.value).isprintable()
    assert capfd.readouterr() == ("", "")


def test_a_graph_that_breaks_the_contract_is_refused(tmp_path, colour_graph):
    with pytest.raises(InputError, match=r"must take one input, pixel_values .*, got x \['batch', 3, 8, 8\]"):
        OrtRunner(colour_graph(tmp_path / "a.onnx", image="x"))
    with pytest.raises(InputError, match=r"must give logits \[batch, classes\], got y"):
        OrtRunner(colour_graph(tmp_path / "b.onnx", logits="y"))


def test_a_graph_that_fails_while_running_gives_one_line(tmp_path):
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [1, 3])
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["pixel_values", "axes"], ["mean"], keepdims=0),
         helper.make_node("Reshape", ["mean", "shape"], ["logits"])],
        "one_image_only",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [shape, helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "one.onnx").write_bytes(model.SerializeToString())
    with OrtRunner(tmp_path / "one.onnx") as runner:
        assert runner.infer(images(1)).shape == (1, 3)
        with pytest.raises(InputError, match="failed on a batch of 2") as caught:
            runner.infer(images(2))
    assert str(caught.value).isprintable()


def test_a_provider_that_silently_falls_back_is_refused(graph, monkeypatch, capfd):
    with pytest.raises(InputError, match="provider must be one this build has"):
        OrtRunner(graph, provider="NoSuchProvider")
    monkeypatch.setattr("onnxruntime.InferenceSession.get_providers", lambda self: [CPU])
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider", CPU])
    with pytest.raises(InputError, match="fell back to CPUExecutionProvider|not a graph that ONNX Runtime loads"):
        OrtRunner(graph, provider="CUDAExecutionProvider")
    assert capfd.readouterr() == ("", "")


def test_open_engine_refuses_what_it_cannot_open(graph, tmp_path):
    with pytest.raises(InputError, match="backend must be one of onnxruntime, .*, tensorrt-rtx, got abacus"):
        open_engine(graph, "abacus")
    with pytest.raises(InputError, match="threads must be 1 or more, got 0"):
        open_engine(graph, "onnxruntime", threads=0)
    for path in (tmp_path, tmp_path / "missing.onnx"):
        with pytest.raises(InputError, match="an engine must be a file"):
            open_engine(path, "onnxruntime")


def test_available_says_the_version_or_how_to_install(graph, monkeypatch):
    status = available()[0]
    assert status.name == "onnxruntime" and status.usable
    assert status.detail.startswith(importlib.import_module("onnxruntime").__version__) and CPU in status.detail
    monkeypatch.delitem(sys.modules, "tocom.runtime.engines.onnxruntime_engine")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    status = available()[0]
    assert not status.usable and status.detail == "not installed: pip install onnxruntime (or 'tocom[cpu]')"
    with pytest.raises(InputError, match="cannot run here, not installed: pip install onnxruntime"):
        open_engine(graph, "onnxruntime")


def test_a_library_that_does_not_load_is_told_from_one_that_is_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_backend.py").write_text("raise ImportError('libx.so: cannot open\\nshared object')")
    monkeypatch.syspath_prepend(tmp_path)
    broken = replace(BACKENDS["onnxruntime"], name="broken", module="broken_backend")
    monkeypatch.setattr(backends, "BACKENDS", {"broken": broken})
    (status,) = available()
    assert not status.usable and status.detail == r"its library does not load: libx.so: cannot open\nshared object"
