"""`tocom cascade` and `tocom frontier` on a family whose low degree is slow and right, and the high one neither."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import tocom.runtime.degrees.local_latency
import tocom.runtime.infer
from tocom.calib.cascade_trial import Row, Trial
from tocom.export.cli import __main__ as cli
from tocom.export.cli.cascade import better_single
from tocom.runtime.degrees.cascade import Cascade
from tocom.runtime.degrees.local_latency import this_machine
from tocom.runtime.files import sha256_file
from tocom.runtime.manifest import EngineEntry, Family, InputSpec

SIDE = 16
COLOURS = ("red", "green", "blue")


def save_graph(file: Path, rows: int, work: int) -> None:
    """Logits are the mean of each channel, over some rows of the image only, after products that change nothing."""
    wide = 3 * SIDE * rows
    tensors = [
        numpy_helper.from_array(np.eye(wide, dtype=np.float32), "one"),
        numpy_helper.from_array(np.array([0], np.int64), "start"),
        numpy_helper.from_array(np.array([rows], np.int64), "stop"),
        numpy_helper.from_array(np.array([2], np.int64), "axis"),
        numpy_helper.from_array(np.array([0, 3, SIDE * rows], np.int64), "channels"),
        numpy_helper.from_array(np.array([2], np.int64), "last"),
        numpy_helper.from_array(np.float32(40), "gain"),
    ]
    nodes = [
        helper.make_node("Slice", ["pixel_values", "start", "stop", "axis"], ["cut"]),
        helper.make_node("Flatten", ["cut"], ["flat.0"]),
        *(helper.make_node("MatMul", [f"flat.{at}", "one"], [f"flat.{at + 1}"]) for at in range(work)),
        helper.make_node("Reshape", [f"flat.{work}", "channels"], ["split"]),
        helper.make_node("ReduceMean", ["split", "last"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "gain"], ["logits"]),
    ]
    inputs = [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])]
    graph = helper.make_graph(nodes, "colours", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    file.write_bytes(model.SerializeToString())


def make_family(folder: Path, **graphs: tuple[int, int]) -> Path:
    """Degrees by name, "r8": (rows that are looked at, products)."""
    folder.mkdir()
    entries = []
    for name, (rows, work) in graphs.items():
        save_graph(folder / f"{name}.onnx", rows, work)
        degree = int(name[1:])
        latency = {str(batch): {"p50": 0.2 * batch * (1 + work), "p99": 5.0 * batch} for batch in (1, 8)}
        entries.append(EngineEntry(
            degree, None, (degree,), (65, 65 - degree), 1.0 + work, "onnxruntime", "fp32", f"{name}.onnx",
            f"{name}.onnx", {f"{name}.onnx": sha256_file(folder / f"{name}.onnx")}, f"recipe of {name}", {}, latency,
            {"top1": rows / SIDE, "images": 300}, machine=this_machine(),
        ))  # fmt: skip
    spec = InputSpec((3, SIDE, SIDE), (0.0,) * 3, (1.0,) * 3, "bicubic", 1.0, "center")
    Family("tiny", 3, spec, 0, None, None, COLOURS, tuple(entries)).write(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise with a tint: the more of it is looked at, the easier. 110 of each colour."""
    folder, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for channel, name in enumerate(COLOURS):
        (folder / name).mkdir()
        for index in range(110):
            pixels = draw.integers(0, 226, (SIDE, SIDE, 3))
            pixels[..., channel] += 30
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Degree 0 looks at all rows and works hard; degree 8 looks at three."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tocom.runtime.degrees.local_latency, "_SECONDS", 0.2)
    return make_family(tmp_path / "family", r0=(SIDE, 60), r8=(3, 0))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tocom", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        return left.value.code, out, err

    return call


def test_a_cascade_is_found_written_run_and_drawn(run, family, images, tmp_path, capsys) -> None:
    status, out, _ = run("cascade", "--engines", family, "--images", images, "--max-drop", 2,
                         "--json", tmp_path / "found.json")  # fmt: skip
    assert status == 0 and "cascade 8, 0" in out and "wrote" in out
    found = json.loads((tmp_path / "found.json").read_text())
    plan = Cascade.read(family, Family.read(family))
    assert plan.to_json() == found["plan"] and plan.degrees == (8, 0)
    trial = found["trial"]
    low, high = trial["singles"]
    cascade = trial["cascade"]
    assert found["calibrated_on"] == trial["images"] == 165
    assert high["accuracy"] < cascade["accuracy"] and cascade["accuracy"] > low["accuracy"] - 0.05
    assert high["ms"] < cascade["ms"] < low["ms"] and 0 < cascade["shares"][1] < 1
    assert cascade["gmacs"] == pytest.approx(1.0 + cascade["shares"][1] * 61.0)
    assert plan.found["accuracy"] == cascade["accuracy"] and plan.found["batch"] == 8
    assert (low["degrees"], trial["best_single_by_ms"]) == ([0], 8)

    assert tocom.runtime.infer.main(["--engines", str(family), "--cascade", str(images)]) == 0
    assert "cascade of degrees 8, 0" in capsys.readouterr().err

    for suffix in ("png", "svg"):
        picture = tmp_path / f"frontier.{suffix}"
        status, out, _ = run("frontier", "--engines", family, "--batch", "8,1", "--out", picture)
        assert status == 0 and out.count("8, 0") == 1 and "points from degree 0" in " ".join(out.split())
        assert picture.read_bytes().startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    Image.open(tmp_path / "frontier.png").verify()
    again = picture.read_bytes()
    run("frontier", "--engines", family, "--batch", "8,1", "--out", picture)
    assert picture.read_bytes() == again


def test_a_single_degree_that_does_better_is_not_kept_back() -> None:
    low = Row("degree 0", (0,), 0.95, 0.01, 2.0, 0.1, 2.0, (1.0,), -0.02, 0.005)
    cascade = Row("cascade", (8, 0), 0.93, 0.01, 2.1, 0.1, 1.5, (1.0, 0.3), 0.0, 0.0)
    assert better_single(Trial(cascade, (low,), 100, 8)) == (
        "degree 0 takes no longer and was right more often on these images, by 2.00 ±0.50 points"
    )
    assert better_single(Trial(cascade, (replace(low, gain=0.01),), 100, 8)) is None
    assert better_single(Trial(cascade, (replace(low, ms=2.2),), 100, 8)) is None


def test_where_no_cascade_pays_none_is_left(run, tmp_path, images, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tocom.runtime.degrees.local_latency, "_SECONDS", 0.2)
    family = make_family(tmp_path / "family", r0=(SIDE, 60), r8=(SIDE, 0))  # equal, and faster
    (family / "cascade.json").write_text("an earlier one")
    status, out, _ = run("cascade", "--engines", family, "--images", images, "--max-drop", 2)
    assert status == 0 and "no cascade" in out and "degree 8" in out and "written" in out
    assert not (family / "cascade.json").exists()


def test_an_accuracy_that_nothing_reaches(run, family, images) -> None:
    status, out, err = run("cascade", "--engines", family, "--images", images, "--accuracy", 1.0)
    assert (status, out) == (1, "") and err.startswith("tocom: neither a cascade nor a single degree")
    assert len(err.splitlines()) == 1 and not (family / "cascade.json").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--max-drop", "0.5"), "takes 800 images or more, got 330"),
        (("--limit", "90"), "images or more, got 90"),
        (("--accuracy", "0.9", "--max-drop", "1"), "--accuracy and --max-drop exclude each other"),
        (("--accuracy", "90"), "a share above 0, up to 1, got 90"),
        (("--max-drop", "-1"), "must be in 0..100, got -1"),
        (("--max-drop", "nan"), "must be in 0..100, got nan"),
        (("--batch", "0"), "--batch"),
        (("--json", "/nowhere/found.json"), "a folder that is there"),
    ],
)
def test_bad_options_are_one_line(run, family, images, options, words) -> None:
    status, out, err = run("cascade", "--engines", family, "--images", images, *options)
    assert (status, out, len(err.splitlines())) == (2, "", 1) and words in err


def test_bad_images_and_families_are_one_line(run, family, images, tmp_path) -> None:
    def refused(engines: Path, folder: Path) -> str:
        status, out, err = run("cascade", "--engines", engines, "--images", folder, "--max-drop", 2)
        assert (status, out, len(err.splitlines())) == (2, "", 1), err
        return err

    assert "no family.json" in refused(tmp_path, images)
    assert "there is no" in refused(family, tmp_path / "missing")
    (tmp_path / "strange").symlink_to(images / "red")
    assert "one folder per class" in refused(family, tmp_path / "strange")
    one = tmp_path / "one" / "red"
    one.mkdir(parents=True)
    for index in range(220):
        (one / f"{index}.png").symlink_to(images / "red" / f"{index % 110}.png")
    assert "two classes or more, got one: class 0" in refused(family, tmp_path / "one")
    (one / "0.png").unlink()
    (one / "0.png").write_bytes(b"no image")
    (tmp_path / "one" / "blue").symlink_to(images / "blue")
    assert "0.png" in refused(family, tmp_path / "one")
    single = replace(Family.read(family), engines=Family.read(family).engines[:1])
    single.write(family)
    assert "two degrees or more, got 1" in refused(family, images)


def test_the_frontier_without_accuracies(run, family, tmp_path) -> None:
    manifest = Family.read(family)
    for entry in manifest.engines:
        manifest = manifest.with_entry(replace(entry, accuracy={}))
    manifest.write(family)
    status, out, _ = run("frontier", "--engines", family)
    assert status == 0 and "batch 1" in out and "batch 8" in out and "No accuracies in family.json" in out
    status, _, err = run("frontier", "--engines", family, "--out", tmp_path / "frontier.png")
    assert status == 2 and "needs the accuracy of every degree" in err and not (tmp_path / "frontier.png").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--batch", "1,x"), "whole numbers of 1 or more separated by commas"),
        (("--batch", "0"), "whole numbers of 1 or more"),
        (("--out", "frontier.gif"), ".png or .svg"),
        (("--out", "/nowhere/frontier.png"), "a folder that is there"),
    ],
)
def test_bad_options_of_the_frontier_are_one_line(run, family, options, words) -> None:
    status, out, err = run("frontier", "--engines", family, *options)
    assert (status, out, len(err.splitlines())) == (2, "", 1) and words in err


def test_the_frontier_of_a_broken_cascade_is_refused(run, family) -> None:
    (family / "cascade.json").write_text("{")
    status, _, err = run("frontier", "--engines", family)
    assert status == 2 and "cascade.json" in err
