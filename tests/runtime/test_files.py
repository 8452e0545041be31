"""Tests runtime/files.py: files appear whole or not at all."""

import dataclasses
import hashlib
from pathlib import Path

import pytest

from tocom.export.artifacts import Engine, FusedCheckpoint, OnnxGraph, Report
from tocom.runtime.files import sha256_file, write_atomically


def test_sha256_file_equals_hashlib(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_writes_bytes_and_what_a_writer_writes(tmp_path):
    assert write_atomically(tmp_path / "a", b"one") == tmp_path / "a"
    write_atomically(str(tmp_path / "b"), lambda file: file.write(b"two"))
    assert [(file.name, file.read_bytes()) for file in sorted(tmp_path.iterdir())] == [("a", b"one"), ("b", b"two")]


def test_until_the_rename_the_old_content_stays(tmp_path):
    target = write_atomically(tmp_path / "a", b"old")

    def writer(file):
        file.write(b"new")
        assert target.read_bytes() == b"old"
        assert Path(file.name).parent == tmp_path and Path(file.name).name.startswith(".a.")

    write_atomically(target, writer)
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize("failure", [ValueError("no"), KeyboardInterrupt(), OSError("disk full")])
def test_a_failure_leaves_neither_a_temporary_nor_a_change(tmp_path, failure):
    target = write_atomically(tmp_path / "a", b"old")

    def writer(file):
        file.write(b"half")
        raise failure

    with pytest.raises(type(failure)):
        write_atomically(target, writer)
    assert [file.name for file in tmp_path.iterdir()] == ["a"] and target.read_bytes() == b"old"


def test_a_failing_rename_is_cleaned_up_too(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_atomically(tmp_path / "folder", b"cannot replace a folder")
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_artifacts_know_what_they_came_from_and_reports_are_truthy():
    fused = FusedCheckpoint({}, "tiny", 8, 0, 0.1, "c", None)
    engine = Engine(Path("m"), "onnxruntime", "fp32", {}, OnnxGraph(Path("m"), {}, (65, 57), 0.5, fused))
    assert engine.graph.fused is fused
    assert Report(engine, True, {}) and not Report(engine, False, {})
    with pytest.raises(dataclasses.FrozenInstanceError):
        engine.precision = "int8"
