"""Reading weights files: every layout that is supported, and a one-line refusal of everything else."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from tocom.runtime.errors import InputError
from tocom.tensorfile import read_tensors

TENSORS = {"head.weight": torch.arange(12.0).reshape(3, 4), "head.bias": torch.tensor([0.5, -1.0, 2.0])}


def assert_same(found, expected=TENSORS) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def refused(file) -> str:
    with pytest.raises(InputError) as caught:
        read_tensors(file)
    message = str(caught.value)
    assert "\n" not in message
    assert str(file) in message
    return message


LAYOUTS = {
    "bare": TENSORS,
    "ordered": OrderedDict(TENSORS),
    "under model": {"model": TENSORS, "epoch": 7},
    "under state_dict": {"state_dict": TENSORS, "arch": "vit"},
    "data parallel": {f"module.{name}": tensor for name, tensor in TENSORS.items()},
    "data parallel under model": {"model": {f"module.{name}": tensor for name, tensor in TENSORS.items()}},
    "parameters": {name: torch.nn.Parameter(tensor) for name, tensor in TENSORS.items()},
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_pth_layout_reads_the_same(tmp_path, layout, zipped):
    file = tmp_path / "weights.pth"
    torch.save(LAYOUTS[layout], file, _use_new_zipfile_serialization=zipped)
    tensors, metadata = read_tensors(file)
    assert_same(tensors)
    assert metadata == {}


def test_safetensors_come_with_their_metadata(tmp_path):
    save_file(TENSORS, tmp_path / "weights.safetensors", {"format": "pt", "note": "yes"})
    tensors, metadata = read_tensors(tmp_path / "weights.safetensors")
    assert_same(tensors)
    assert metadata == {"format": "pt", "note": "yes"}


def test_a_prefix_that_only_some_names_have_is_part_of_their_names(tmp_path):
    mixed = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    torch.save(mixed, tmp_path / "weights.pth")
    assert_same(read_tensors(tmp_path / "weights.pth")[0], mixed)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_missing_empty_or_foreign_file_is_refused(tmp_path, suffix):
    file = tmp_path / f"weights{suffix}"
    assert "must exist" in refused(file)
    file.write_bytes(b"")
    assert "must not be empty" in refused(file)
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    refused(file)
    file.write_text("version https://example.org/spec/v1\nsize 12\n")
    refused(file)
    file.unlink()
    file.mkdir()
    assert "(a folder)" in refused(file)


def test_a_file_of_the_other_format_is_refused(tmp_path):
    (tmp_path / "zip.safetensors").write_bytes(saved(TENSORS))
    refused(tmp_path / "zip.safetensors")
    (tmp_path / "flat.pth").write_bytes(save(TENSORS))
    refused(tmp_path / "flat.pth")


def saved(content, **how) -> bytes:
    import io

    stream = io.BytesIO()
    torch.save(content, stream, **how)
    return stream.getvalue()


CONTENTS = {
    "whole.safetensors": save(TENSORS),
    "zipped.pth": saved(TENSORS),
    "legacy.pth": saved(TENSORS, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_every_truncation_is_refused(tmp_path, name):
    file, content = tmp_path / name, CONTENTS[name]
    file.write_bytes(content)
    assert_same(read_tensors(file)[0])
    lengths = {*range(1, 80), *range(len(content) - 80, len(content)), *range(1, len(content), len(content) // 60)}
    for length in sorted(lengths & set(range(1, len(content)))):
        file.write_bytes(content[:length])
        refused(file)


@pytest.mark.parametrize("name", CONTENTS)
@settings(
    max_examples=250, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(changes=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_file_with_changed_bytes_is_refused_or_read(tmp_path, name, changes):
    content = bytearray(CONTENTS[name])
    for where, value in changes:
        content[where % len(content)] = value
    file = tmp_path / name
    file.write_bytes(content)
    try:
        tensors, _ = read_tensors(file)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert all(isinstance(tensor, torch.Tensor) and tensor.isfinite().all() for tensor in tensors.values())


class RunsCode:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("how", ["zip", "legacy", "plain pickle"])
def test_a_pickle_that_would_run_code_does_not(tmp_path, how):
    witness, file = tmp_path / "it-ran", tmp_path / "weights.pth"
    content = {"model": TENSORS, "callback": RunsCode(witness)}
    if how == "plain pickle":
        file.write_bytes(pickle.dumps({"callback": RunsCode(witness)}))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=how == "zip")
    message = refused(file)
    assert "wants to run code" in message
    assert "weights_only" not in message  # no advice on how to switch the check off
    assert not witness.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_numbers_that_are_not_finite_are_refused(tmp_path, suffix, value):
    file = tmp_path / f"weights{suffix}"
    bad = {**TENSORS, "norm.bias": torch.tensor([1.0, value])}
    save_file(bad, file) if suffix == ".safetensors" else torch.save(bad, file)
    assert "tensor norm.bias holds NaN or infinity" in refused(file)


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_every_number_format_reads(tmp_path, suffix, dtype):
    file = tmp_path / f"weights{suffix}"
    tensors = {"x": torch.ones(3).to(dtype)}
    save_file(tensors, file) if suffix == ".safetensors" else torch.save(tensors, file)
    assert read_tensors(file)[0]["x"].dtype == dtype


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({}, "must be a state dict"),
        ([torch.zeros(1)], "got list"),
        (torch.zeros(3), "got Tensor"),
        (7, "got int"),
        ({"a": torch.zeros(1), "b": 7}, "'b' is int"),
        ({"a": "text"}, "'a' is str"),
        ({3: torch.zeros(1)}, "3 is Tensor"),
        ({"model": {"a": torch.zeros(1), "b": [1]}}, "'b' is list"),
        ({"model": {}}, "must be a state dict"),
        ({"sparse": torch.eye(3).to_sparse()}, "'sparse'"),
        ({"meta": torch.zeros(3, device="meta")}, "'meta'"),
        ({"complex": torch.zeros(3, dtype=torch.complex64)}, "'complex'"),
    ],
)
def test_what_is_no_state_dict_of_plain_tensors_is_refused(tmp_path, content, named):
    file = tmp_path / "weights.pth"
    torch.save(content, file)
    assert named in refused(file)
