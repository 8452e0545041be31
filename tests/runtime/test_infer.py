"""Tests runtime/infer.py: the command as a user meets it, with its output, its refusals and its exit status."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tocom.runtime import infer, predictor
from tocom.runtime.files import write_atomically
from tocom.runtime.manifest import Family

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(family_folder, capsys):
    """Runs the command on the family; returns its status and the lines of stdout and stderr."""

    def call(*arguments, engines=family_folder):
        status = infer.main(["--engines", str(engines), *map(str, arguments)])
        out, err = capsys.readouterr()
        return status, out.splitlines(), err.splitlines()

    return call


def test_prints_one_aligned_line_per_image_and_the_share_correct(run, photos):
    status, out, err = run(photos)
    assert status == 0
    rows = [re.split(" {2,}", line) for line in out]
    assert [row[0] for row in rows] == [str(file) for file in sorted(photos.rglob("*.png"))]
    assert [row[1] for row in rows] == ["blue", "blue", "green", "green", "red", "red"]
    expected = np.exp(4) / (np.exp(4) + 2)  # logits 4, 0, 0
    assert [row[2] for row in rows] == [f"{expected:.4f}"] * 6
    assert len({line.index("0.9") for line in out}) == 1
    assert len(err) == 1
    assert re.fullmatch(r"infer: 6 images, degree 2, [\d.]+ images/s, 100.00% correct \(6 of 6, .*\)", err[0])


def test_degree_chooses_the_engine(run, photos):
    status, out, _ = run("--degree", 8, photos / "red")
    assert status == 0 and out[0].endswith(f"{np.e / (np.e + 2):.4f}")
    status, out, err = run("--degree", 4, photos)
    assert (status, out) == (2, []) and len(err) == 1 and "(2, 8)" in err[0] and err[0].startswith("infer: ")


def test_json_gives_one_object_per_line(run, photos):
    status, out, _ = run("--json", "--top-k", 2, photos / "green/0.png")
    assert status == 0
    (result,) = map(json.loads, out)
    first, second = result["predictions"]
    assert list(result) == ["file", "degree", "predictions"]
    assert result["file"] == str(photos / "green/0.png") and result["degree"] == 2
    assert (first["class"], first["name"]) == (1, "green") and (second["class"], second["name"]) == (0, "red")
    np.testing.assert_allclose(first["probability"], np.exp(4) / (np.exp(4) + 2), rtol=1e-6, atol=0)


def test_top_k_is_capped_at_the_classes(run, photos):
    _, out, _ = run("--json", "--top-k", 99, photos / "green/0.png")
    predictions = json.loads(out[0])["predictions"]
    assert len(predictions) == 3
    np.testing.assert_allclose(sum(p["probability"] for p in predictions), 1, rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 4, 6, 100])
def test_the_batch_size_does_not_change_the_result(run, photos, batch):
    _, expected, _ = run("--json", photos)
    assert run("--json", "--batch", batch, photos)[:2] == (0, expected)


def test_a_bad_image_in_the_middle_loses_nothing(run, photos):
    (photos / "green/00.png").write_bytes(b"not an image")
    status, out, err = run("--batch", 2, photos, photos / "missing.png")
    assert status == 2 and len(out) == 6
    assert len(err) == 3 and "00.png" in err[0] and "missing.png" in err[1]
    assert "6 images" in err[2] and "100.00% correct" in err[2] and err[2].endswith("2 failed")


def test_only_bad_images(run, tmp_path):
    status, out, err = run(tmp_path / "a.png", tmp_path / "b.png")
    assert (status, out) == (2, []) and len(err) == 3 and "0 images" in err[2]


def test_paths_come_from_stdin(run, photos, monkeypatch):
    lines = f"{photos / 'red/0.png'}\n\n{photos / 'nothing.png'}\r\n{photos / 'blue'}\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    status, out, err = run("-")
    assert status == 2 and [re.split(" {2,}", line)[1] for line in out] == ["red", "blue", "blue"]
    assert "nothing.png" in err[0] and len(err) == 2


def test_class_names_from_a_file(run, photos, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("rot\ngrün\nblau\n", encoding="utf-8")
    status, out, err = run("--classes", names, photos / "green")
    assert status == 0 and re.split(" {2,}", out[0])[1] == "grün"
    assert "correct" not in err[-1]  # "green" is no name of these
    names.write_text("rot\n")
    status, out, err = run("--classes", names, photos)
    assert (status, out) == (2, []) and "3 classes" in err[0] and "got 1 lines" in err[0]
    for unreadable in (tmp_path / "missing.txt", tmp_path, photos / "red/0.png"):
        status, out, err = run("--classes", unreadable, photos)
        assert (status, out, len(err)) == (2, [], 1)


def rename(photos, names):
    for old, new in names.items():
        (photos / old).rename(photos / new)


def test_folders_named_like_class_indices_are_labels_too(run, photos):
    rename(photos, {"red": "0", "green": "1", "blue": "x"})
    assert "correct" not in run(photos)[2][-1]
    rename(photos, {"x": "1x"})
    assert "correct" not in run(photos)[2][-1]
    rename(photos, {"1": "2", "1x": "1"})  # green and blue swapped: two of six remain right
    assert "33.33% correct (2 of 6" in run(photos)[2][-1]


def test_folders_that_are_names_are_not_read_as_indices(run, photos, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("2\n0\n1\n")  # class 0 is called "2"
    rename(photos, {"red": "2", "green": "0", "blue": "1"})
    assert "100.00% correct" in run("--classes", names, photos)[2][-1]


def test_without_names_the_index_is_shown(run, photos, family_folder):
    manifest = json.loads((family_folder / "family.json").read_text())
    manifest["class_names"] = None
    write_atomically(family_folder / "family.json", json.dumps(manifest).encode())
    assert re.split(" {2,}", run(photos / "blue/0.png")[1][0])[1] == "2"
    prediction = json.loads(run("--json", photos / "blue/0.png")[1][0])["predictions"][0]
    assert prediction["class"] == 2 and prediction["name"] is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["--top-k", "0"], ["--top-k", "x"], ["--batch", "0"], ["--threads", "-1"], ["--degree", "two"], ["--nonsense"],
        ["--degree"],
    ],
)  # fmt: skip
def test_bad_usage_gives_one_line(run, photos, arguments):
    status, out, err = run(photos, *arguments)
    assert (status, out, len(err)) == (2, [], 1) and err[0].startswith("infer: ")


def test_missing_arguments_give_one_line(capsys):
    for arguments in ([], ["image.png"], ["--engines", "x"]):
        assert infer.main(arguments) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as caught:
        infer.main(["--help"])
    assert caught.value.code == 0 and "examples:" in capsys.readouterr().out


def test_a_family_that_is_not_usable_gives_one_line(run, photos, family_folder, colour_graph, entry_of, tmp_path):
    assert "tocom compile" in run(photos, engines=tmp_path)[2][0]
    family = Family.read(family_folder)
    colour_graph(family_folder / "r02/model.onnx", side=9)
    status, out, err = run(photos)
    assert (status, out, len(err)) == (2, [], 1) and "it has changed" in err[0]
    family.with_entry(entry_of(family_folder, 2)).write(family_folder)
    status, out, err = run(photos)
    assert (status, out, len(err)) == (2, [], 1) and "got (3, 9, 9)" in err[0]
    family.with_entry(entry_of(family_folder, 2, backend="abacus")).write(family_folder)
    assert "backend must be one of" in run(photos)[2][0]


def test_logits_that_are_not_finite_are_refused(run, photos, family_folder, colour_graph, entry_of):
    colour_graph(family_folder / "r02/model.onnx", gain=float("nan"))
    Family.read(family_folder).with_entry(entry_of(family_folder, 2)).write(family_folder)
    status, out, err = run(photos / "red/0.png")
    assert (status, out) == (2, []) and "logits must be finite" in err[0]


def test_softmax_survives_huge_logits(run, photos, family_folder, colour_graph, entry_of):
    colour_graph(family_folder / "r02/model.onnx", gain=1e30)
    Family.read(family_folder).with_entry(entry_of(family_folder, 2)).write(family_folder)
    _, out, _ = run("--json", "--top-k", 3, photos / "red/0.png")
    assert [p["probability"] for p in json.loads(out[0])["predictions"]] == [1.0, 0.0, 0.0]


def test_an_interrupt_is_not_a_traceback(run, photos, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(predictor, "load_image", interrupt)
    assert run(photos)[0] == 130


def script(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, ROOT / "runtime/infer.py", *map(str, arguments)],
        stdout=options.pop("stdout", subprocess.PIPE), stderr=subprocess.PIPE, **options,
    )  # fmt: skip


@pytest.mark.timing
def test_runs_as_a_script_from_anywhere(family_folder, photos, tmp_path):
    odd = photos / "red" / os.fsdecode(b"od\xffd\n.png")
    (photos / "red/0.png").rename(odd)
    with script("--engines", family_folder, photos / "red", cwd=tmp_path) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert len(out.splitlines()) == 2 and len(err.splitlines()) == 1
    assert rb"od\udcffd\n.png" in out


@pytest.mark.timing
def test_a_reader_that_leaves_early_is_no_error(family_folder, photos):
    reader, writer = os.pipe()
    os.close(reader)  # before there is anything to read
    with os.fdopen(writer, "wb") as out, script("--engines", family_folder, photos, stdout=out) as process:
        _, err = process.communicate(timeout=60)
    assert err == b"" and process.returncode == 128 + signal.SIGPIPE


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
@pytest.mark.timing
def test_a_full_disk_gives_one_line(family_folder, photos):
    with Path("/dev/full").open("wb") as full, script("--engines", family_folder, photos, stdout=full) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and len(err.splitlines()) == 1 and b"No space left" in err
