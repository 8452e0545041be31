"""What a request of the Open Inference Protocol must be."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tocom.runtime.errors import InputError
from tocom.runtime.manifest import Family, InputSpec
from tocom.serving.protocol.open_inference import Tensor, metadata, read_degree_request, read_input
from tocom.serving.service.request import DegreeRequest

SPEC = InputSpec((3, 2, 4), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bicubic", 1.0, "center")
FAMILY = Family("tiny", 5, SPEC, 0, None, None, None, ())
PIXELS = np.arange(48, dtype=np.float32).reshape(2, 3, 2, 4)


def test_pixels_flat_or_nested() -> None:
    for data in (PIXELS.ravel().tolist(), PIXELS.tolist()):
        found = read_input([Tensor("pixel_values", "FP32", [2, 3, 2, 4], data)], FAMILY)
        assert found.dtype == np.float32
        assert np.array_equal(found, PIXELS)


def test_images_as_bytes_or_base64() -> None:
    contents = [b"one", b"\xff\x00"]
    as_text = [base64.b64encode(content).decode() for content in contents]
    assert read_input([Tensor("image", "BYTES", [2], contents)], FAMILY) == contents
    assert read_input([Tensor("image", "BYTES", [2, 1], as_text, "base64")], FAMILY) == contents


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ([], "one input"),
        ([Tensor("image", "BYTES", [1], [b"x"])] * 2, "one input"),
        ([Tensor("pixels\n", "FP32", [2, 3, 2, 4], PIXELS.tolist())], r"got pixels\\n"),
        ([Tensor("pixel_values", "FP64", [2, 3, 2, 4], PIXELS.tolist())], "FP64"),
        ([Tensor("pixel_values", "FP32", [2, 3, 4, 2], PIXELS.tolist())], r"\[2, 3, 4, 2\]"),
        ([Tensor("pixel_values", "FP32", [0, 3, 2, 4], [])], r"\[0, 3, 2, 4\]"),
        ([Tensor("pixel_values", "FP32", [3, 3, 2, 4], PIXELS.tolist())], "48 numbers"),
        ([Tensor("pixel_values", "FP32", [2**62, 3, 2, 4], PIXELS.tolist())], "48 numbers"),
        ([Tensor("pixel_values", "FP32", [-1, 3, 2, 4], PIXELS.tolist())], "0 or more"),
        ([Tensor("pixel_values", "FP32", [2, 3, 2, 4], [[1.0], [2.0, 3.0]])], "no array of numbers"),
        ([Tensor("pixel_values", "FP32", [2, 3, 2, 4], ["a"] * 48)], "no array of numbers"),
        ([Tensor("pixel_values", "FP32", [2, 3, 2, 4], {"a": 1})], "no array of numbers"),
        ([Tensor("image", "BYTES", [2], [b"x"])], "1 elements"),
        ([Tensor("image", "BYTES", [0], [])], "0 elements"),
        ([Tensor("image", "BYTES", [1], "text")], "one encoded image each"),
        ([Tensor("image", "FP32", [1], [1.0])], "FP32"),
        ([Tensor("image", "BYTES", [1], ["no base64!"], "base64")], "must be base64"),
        ([Tensor("image", "BYTES", [1], ["é"], "base64")], "must be base64"),
        ([Tensor("image", "BYTES", [1], [7])], "int"),
    ],
)
def test_bad_input_is_told_in_one_line(tensors: list[Tensor], says: str) -> None:
    with pytest.raises(InputError, match=says) as refused:
        read_input(tensors, FAMILY)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


def test_want() -> None:
    assert read_degree_request(None) == read_degree_request({}) == DegreeRequest()
    assert read_degree_request({"degree": 8, "other": "x"}) == DegreeRequest(degree=8)
    assert read_degree_request({"min_degree": "4", "max_degree": 12}) == DegreeRequest(min_degree=4, max_degree=12)


def test_want_in_time_or_accuracy() -> None:
    assert read_degree_request({"budget_ms": 5, "min_accuracy": "0.9"}) == DegreeRequest(budget_ms=5, min_accuracy=0.9)
    for value in (-1, "x", True, float("nan"), float("inf"), [1], "1e3", "nan"):
        with pytest.raises(InputError, match="must be a number"):
            read_degree_request({"budget_ms": value})


@pytest.mark.parametrize("value", [-1, 1.5, "x", "-3", "1e3", True, [8], {"a": 1}, "9" * 400])
def test_a_degree_that_is_none(value: object) -> None:
    with pytest.raises(InputError, match="whole number") as refused:
        read_degree_request({"degree": value})
    assert len(str(refused.value)) < 200


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)


@given(
    name=st.sampled_from(["pixel_values", "image"]) | st.text(max_size=10),
    datatype=st.sampled_from(["FP32", "BYTES", "INT8"]),
    shape=st.lists(st.integers(-2, 2**70), max_size=10) | st.just([2, 3, 2, 4]),
    data=_VALUES,
    content_type=st.none() | st.just("base64") | st.text(max_size=5),
)
@settings(deadline=None, max_examples=200)
def test_anything_is_read_or_refused(
    name: str, datatype: str, shape: list[int], data: object, content_type: str | None
) -> None:
    try:
        found = read_input([Tensor(name, datatype, shape, data, content_type)], FAMILY)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert len(found) >= 1


def test_metadata_names_the_tensors() -> None:
    told = metadata(FAMILY)
    assert told["inputs"][0] == {"name": "pixel_values", "datatype": "FP32", "shape": [-1, 3, 2, 4]}
    assert told["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 5]}]
