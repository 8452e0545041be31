"""Tests runtime/degrees/cascade.py: running against a loop over single images, and the plan's file against damage."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tocom.runtime.degrees.cascade import Cascade, Stage, confidence, run, shares
from tocom.runtime.errors import InputError
from tocom.runtime.manifest import Family

TWO = Cascade((Stage(8, 1.5, 0.9, "made by a test"), Stage(2, 0.8, 0.0, "made by a test")), {"accuracy": 0.75})


def softmax_of_one(row: np.ndarray, temperature: float) -> list[float]:
    """Written out, in Python's floats."""
    powers = [math.exp((float(value) - float(max(row))) / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def one_by_one(plan: Cascade, table: dict[int, np.ndarray]) -> list[tuple[int, list[float]]]:
    """Degree and logits of every image, each taken by itself."""
    answers = []
    for image in range(len(table[plan.stages[0].degree])):
        for stage in plan.stages:
            row = table[stage.degree][image]
            if stage is plan.stages[-1] or max(softmax_of_one(row, stage.temperature)) >= stage.threshold:
                answers.append((stage.degree, row.tolist()))
                break
    return answers


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    images=st.integers(1, 9), classes=st.integers(1, 5), seed=st.integers(0, 10**6),
    degrees=st.lists(st.sampled_from([0, 4, 8, 12, 16]), min_size=1, max_size=4, unique=True),
    thresholds=st.lists(st.sampled_from([0.0, 0.3, 0.5, 0.8, 0.99, 1.0]), min_size=4, max_size=4),
    temperature=st.sampled_from([0.3, 1.0, 4.0]),
)  # fmt: skip
def test_a_batch_is_answered_as_its_images_one_by_one(images, classes, seed, degrees, thresholds, temperature):
    degrees = sorted(degrees, reverse=True)
    thresholds = [*thresholds[: len(degrees) - 1], 0.0]
    plan = Cascade([Stage(*each) for each in zip(degrees, [temperature] * 4, thresholds, strict=False)])
    draws = np.random.default_rng(seed)
    table = {degree: draws.normal(0, 3, (images, classes)).astype(np.float32) for degree in degrees}
    calls: list[tuple[int, int]] = []

    def infer(pixel_values, degree):
        calls.append((degree, len(pixel_values)))
        return table[degree][pixel_values[:, 0, 0, 0].astype(int)]

    pixel_values = np.broadcast_to(np.arange(images, dtype=np.float32)[:, None, None, None], (images, 3, 2, 2))
    answer = run(plan, infer, pixel_values)
    expected = one_by_one(plan, table)
    assert list(zip(answer.degrees.tolist(), answer.logits.tolist(), strict=True)) == expected
    assert answer.logits.dtype == np.float32 and answer.degrees.dtype == np.int64
    reached = [sum(degree <= at for degree, _ in expected) for at in degrees]
    assert calls == [each for each in zip(degrees, reached, strict=True) if each[1]]  # one call a stage, if any
    assert shares(plan, answer.degrees) == tuple(count / images for count in reached)
    for row, sure in zip(answer.logits, answer.confidences, strict=True):
        assert sure == pytest.approx(max(softmax_of_one(row, temperature)), abs=1e-12)


def test_extreme_logits_have_a_confidence():
    logits = np.array([[3e38, -3e38], [0, 0], [-3e38, -3e38]], np.float32)
    assert confidence(logits, 0.05).tolist() == [1.0, 0.5, 0.5]


def test_what_is_not_a_number_goes_on():
    def infer(pixel_values, degree):
        return np.full((len(pixel_values), 3), np.nan if degree == 8 else 1.0, np.float32)

    assert run(TWO, infer, np.zeros((2, 3, 2, 2), np.float32)).degrees.tolist() == [2, 2]


def test_no_image_is_no_call():
    answer = run(TWO, lambda *_: pytest.fail("called"), np.zeros((0, 3, 2, 2), np.float32))
    assert len(answer.logits) == len(answer.degrees) == 0 and shares(TWO, answer.degrees) == (0.0, 0.0)


def test_what_is_written_is_read_back(family_folder):
    family = Family.read(family_folder)
    file = TWO.write(family_folder)
    assert file.name == "cascade.json" and Cascade.read(family_folder, family) == TWO
    before = file.read_bytes()
    Cascade.read(family_folder, family).write(family_folder)
    assert file.read_bytes() == before and TWO.degrees == (8, 2)


def test_a_plan_of_other_engines_is_refused(family_folder):
    family = Family.read(family_folder)
    TWO.write(family_folder)
    anew = family.with_entry(replace(family.entry(8), recipe="another"))
    with pytest.raises(InputError, match=r"cascade.json: the engine of degree 8 was compiled anew since: find"):
        Cascade.read(family_folder, anew)
    with pytest.raises(InputError, match=r"cascade.json: degree must be one the family was compiled for \(2\), got 8"):
        Cascade.read(family_folder, replace(family, engines=family.engines[:1]))


def test_no_plan_says_how_to_find_one(family_folder):
    with pytest.raises(InputError, match=r"no cascade.json in .*: find one with `tocom cascade --engines"):
        Cascade.read(family_folder, Family.read(family_folder))
    for folder in ("\0", family_folder / "missing"):
        with pytest.raises(InputError):
            Cascade.read(folder, Family.read(family_folder))


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ((), r"one or more, in falling order of degree, got degrees \[\]"),
        ((Stage(2, 1, 0.5), Stage(8, 1, 0)), r"falling order of degree, got degrees \[2, 8\]"),
        ((Stage(8, 1, 0.5), Stage(8, 1, 0)), "falling order"),
        ((Stage(8, 0, 0.5), Stage(2, 1, 0)), "temperature of degree 8 must be above 0, got 0"),
        ((Stage(8, math.nan, 0.5), Stage(2, 1, 0)), "temperature of degree 8"),
        ((Stage(8, 1, 1.5), Stage(2, 1, 0)), "threshold of degree 8 must be in 0..1, got 1.5"),
        ((Stage(8, 1, math.nan), Stage(2, 1, 0)), "threshold of degree 8"),
        ((Stage(8, 1, 0.5), Stage(2, 1, 0.5)), "its threshold must be 0, got 0.5"),
    ],
)
def test_plans_that_make_no_sense_are_refused(stages, words):
    with pytest.raises(InputError, match=words):
        Cascade(stages)


def test_a_plan_that_could_not_be_read_back_is_not_written(family_folder):
    with pytest.raises(InputError, match="NaN is not a JSON number"):
        Cascade(TWO.stages, {"accuracy": math.nan}).write(family_folder)
    assert not (family_folder / "cascade.json").exists()


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "not JSON"),
        (b"\x80", "cannot be read"),
        (b"[1]", "the file must be an object"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"format": 2}', "format must be 1 or lower"),
        (b'{"format": 1}', "the key stages is missing"),
        (b'{"format": 1, "stages": [{"degree": 8}]}', r"the key stages\[0\].temperature is missing"),
    ],
)
def test_a_broken_file_gives_one_line(family_folder, raw, words):
    (family_folder / "cascade.json").write_bytes(raw)
    with pytest.raises(InputError, match=words) as caught:
        Cascade.read(family_folder, Family.read(family_folder))
    assert str(caught.value).isprintable() and "cascade.json" in str(caught.value)


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.lists(st.integers())


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(stage=st.integers(0, 1), key=st.sampled_from(["degree", "temperature", "threshold", "recipe"]), value=VALUES)
def test_any_replaced_value_gives_a_plan_or_one_line(family_folder, stage, key, value):
    data = copy.deepcopy(TWO.to_json())
    data["stages"][stage][key] = value
    (family_folder / "cascade.json").write_text(json.dumps(data))
    try:
        assert Cascade.read(family_folder, Family.read(family_folder)).stages
    except InputError as error:
        assert str(error).isprintable() and len(str(error)) < 1000
