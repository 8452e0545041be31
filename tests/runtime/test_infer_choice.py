"""Tests which engines runtime/infer.py runs: a budget, an accuracy, a cascade, and what excludes what."""

import json
import re
from dataclasses import replace

import pytest
from PIL import Image

from tocom.runtime import infer
from tocom.runtime.degrees.cascade import Cascade, Stage
from tocom.runtime.degrees.local_latency import this_machine
from tocom.runtime.manifest import Family


@pytest.fixture
def timed(family_folder):
    """The family with times of this machine: degree 2 takes 10 ms and is right on 90%, degree 8 takes 5 ms and 80%."""
    family = Family.read(family_folder)
    for degree, p50, top1 in ((2, 10.0, 0.9), (8, 5.0, 0.8)):
        latency = {"1": {"p50": p50, "p99": 12.0}, "4": {"p50": 3 * p50, "p99": 40.0}}
        family = family.with_entry(
            replace(family.entry(degree), machine=this_machine(), latency_ms=latency, accuracy={"top1": top1})
        )
    family.write(family_folder)
    return family_folder


@pytest.fixture
def run(timed, photos, capsys):
    def call(*arguments):
        status = infer.main(["--engines", str(timed), *map(str, arguments), str(photos)])
        out, err = capsys.readouterr()
        return status, out.splitlines(), err.splitlines()

    return call


@pytest.mark.parametrize(
    ("arguments", "degree", "why"),
    [
        (("--budget-ms", 11), 2, "chose degree 2, the most accurate that takes 11 ms or less at batch 1: 10 ms"),
        (("--budget-ms", 9), 8, "chose degree 8, the most accurate that takes 9 ms or less at batch 1: 5 ms"),
        (("--budget-ms", 16, "--batch", 4), 8, "at batch 4: 15 ms"),
        (("--min-accuracy", 0.8, "--batch", 1), 8, "the fastest that has an accuracy of 0.8 or more at batch 1: 5 ms"),
        (("--min-accuracy", 0.85, "--batch", 1), 2, "the fastest that has an accuracy of 0.85 or more"),
        (("--budget-ms", 50, "--min-accuracy", 0.7), 2, "takes 50 ms or less and has an accuracy of 0.7 or more"),
    ],
)  # fmt: skip
def test_the_degree_that_fits_is_chosen_and_told(run, arguments, degree, why):
    status, out, err = run(*arguments, "--json")
    assert status == 0 and len(out) == 6 and {json.loads(line)["degree"] for line in out} == {degree}
    assert len(err) == 2 and why in err[0] and f"degree {degree}," in err[1]


def test_nothing_fits(run):
    status, out, err = run("--budget-ms", 1)
    assert (status, out) == (1, [])
    assert err == ["infer: no degree takes 1 ms or less: the nearest is degree 8 with 5 ms and an accuracy of 0.8"]
    assert run("--min-accuracy", 0.99)[0] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--degree", 2, "--budget-ms", 5), "--degree and --budget-ms exclude each other"),
        (("--degree", 2, "--min-accuracy", 0.5), "--degree and --min-accuracy exclude each other"),
        (("--degree", 2, "--cascade"), "--degree and --cascade exclude each other"),
        (("--budget-ms", 5, "--cascade"), "--budget-ms and --cascade exclude each other"),
        (("--budget-ms", "soon"), "invalid float value"),
        (("--budget-ms", "nan"), "more than 0 ms, got nan"),
        (("--min-accuracy", 90), "a share in 0..1, got 90"),
        (("--budget-ms", 5, "--threads", 1), "leave out --threads"),
        (("--cascade",), "there is no cascade.json"),
    ],
)
def test_what_cannot_be_asked_for_is_one_line(run, arguments, words):
    status, out, err = run(*arguments)
    assert (status, out, len(err)) == (2, [], 1) and words in err[0]


def test_a_cascade_tells_who_answered(timed, run):
    # degree 8 is 0.576 sure of each image, degree 2 0.965: see the colour graph
    Cascade((Stage(8, 1.0, 0.5), Stage(2, 1.0, 0.0))).write(timed)
    status, out, err = run("--cascade", "--json")
    assert status == 0 and {json.loads(line)["degree"] for line in out} == {8}
    assert "below a confidence of 0.500 at degree 8" in err[0] and "cascade of degrees 8, 2," in err[1]
    Cascade((Stage(8, 1.0, 0.6), Stage(2, 1.0, 0.0))).write(timed)
    status, out, err = run("--cascade", "--json", "--batch", 4)
    assert {json.loads(line)["degree"] for line in out} == {2} and "100.00% correct" in err[1]
    predictions = {json.loads(line)["predictions"][0]["probability"] for line in out}
    assert max(predictions) == pytest.approx(0.965, abs=1e-3)


def test_a_cascade_whose_stages_both_answer(timed, run, photos):
    for file in photos.glob("red/*.png"):  # paler, so that only these go on
        Image.new("RGB", (10, 12), (255, 200, 200)).save(file)
    Cascade((Stage(8, 1.0, 0.5), Stage(2, 1.0, 0.0))).write(timed)
    status, out, err = run("--cascade", "--json", "--batch", 5)
    degrees = {line: json.loads(line)["degree"] for line in out}
    assert status == 0 and sorted(degrees.values()) == [2, 2, 8, 8, 8, 8]
    assert all((degree == 2) == ("/red/" in line) for line, degree in degrees.items())
    assert re.search(r"33.3% at degree 2, 66.7% at degree 8, 100.00% correct", err[1])


def test_a_damaged_engine_of_a_cascade_is_refused(timed, run):
    Cascade((Stage(8, 1.0, 0.5), Stage(2, 1.0, 0.0))).write(timed)
    (timed / "r02/model.onnx").write_bytes(b"something else")
    status, out, err = run("--cascade")
    assert (status, out, len(err)) == (2, [], 1) and "r02/model.onnx must have sha256" in err[0]
