"""bench.budgets: rivals are the best there are, errors are the textbook's, the page says what was found."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bench.budgets import __main__ as command
from bench.budgets.measure import FULL, QUICK, answers, best_mixture, best_single, calibration_error
from bench.budgets.page import write_page
from bench.budgets.subjects import Subject
from bench.budgets.tables import Gain, cascades, task_of
from bench.harness.run import Places, main
from tocom.runtime.degrees.cascade import Cascade, Stage
from tocom.runtime.errors import InputError

pytestmark = pytest.mark.bench


def drawn(seed: int, images: int = 200) -> dict[int, np.ndarray]:
    draws = np.random.default_rng(seed)
    return {degree: draws.random(images) < 0.9 - degree / 50 for degree in (0, 4, 8, 16)}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), costs=st.lists(st.integers(1, 9), min_size=4, max_size=4), at=st.integers(1, 10))
def test_rivals_are_the_best_of_all(seed, costs, at):
    right, cost = drawn(seed), dict(zip((0, 4, 8, 16), map(float, costs), strict=True))
    single, mixture = best_single(right, cost, at), best_mixture(right, cost, at)
    within = [each.mean() for degree, each in right.items() if cost[degree] <= at]
    if not within:
        assert single is None and mixture is None
        return
    assert single.accuracy == max(within) and single.cost <= at
    # every pair of degrees at every share on a fine grid that costs no more
    best = max(within)
    for one in right:
        for other in right:
            for share in np.linspace(0, 1, 201):
                if share * cost[one] + (1 - share) * cost[other] <= at + 1e-12:
                    best = max(best, share * right[one].mean() + (1 - share) * right[other].mean())
    assert best - 1e-9 <= mixture.accuracy <= best + 0.01 and mixture.cost <= at


def test_gains_are_the_textbooks():
    right = drawn(0)
    rival = best_mixture(right, {0: 4.0, 4: 3.0, 8: 2.0, 16: 1.0}, 2.5)
    of = drawn(1)[0]
    gain, error = rival.gain(of)
    paired = 100 * (of.astype(float) - rival.right)
    assert (gain, error) == pytest.approx((paired.mean(), stats.sem(paired, ddof=0)))
    mean = Gain.of([(1.0, 0.3), (-0.5, 0.4)])
    assert (mean.mean, mean.error, mean.worst, mean.worst_error) == pytest.approx((0.25, 0.25, -0.5, 0.4))
    assert str(mean) == "+0.25 ±0.25" and Gain.of([]) is None


def test_the_calibration_error_is_the_papers():
    sureness = np.array([0.95, 0.95, 0.95, 0.95, 0.41])
    right = np.array([True, True, True, False, True])
    # two bins: four images at 0.95 of which 75% are right, one at 0.41 that is right
    assert calibration_error(sureness, right) == pytest.approx(100 * (4 / 5 * 0.20 + 1 / 5 * 0.59))
    assert calibration_error(np.ones(3), np.ones(3, bool)) == 0


def test_answers_carry_out_a_cascade():
    logits = {8: np.array([[9, 0], [1, 0], [0, 1]], np.float32), 0: np.array([[0, 1], [0, 1], [0, 1]], np.float32)}
    plan = Cascade((Stage(8, 1.0, 0.9), Stage(0, 1.0, 0.0)))
    right, reached = answers(plan, logits, np.array([0, 1, 0]))
    assert right.tolist() == [True, True, False] and reached == (1.0, pytest.approx(2 / 3))


def held(gain: float, cost: float = 0.02, drop: float = 1.0, **more: object) -> dict[str, object]:
    rivals = {"single": {"name": "degree 16", "cost": 0.01, "accuracy": 90.0, "gain": gain + 1, "gain_error": 0.2},
              "mixture": {"name": "lots", "cost": cost, "accuracy": 91.0, "gain": gain, "gain_error": 0.2}}  # fmt: skip
    return {"drop": drop, "cascade": [16, 0], "thresholds": [0.9], "shares": [1.0, 0.25], "cost": cost,
            "accuracy": 93.0, "error": 0.3, "lost": 0.7, "lost_error": 0.1, "rivals": rivals, "pays": True,
            "single": 0, "single_cost": 0.04, **more}  # fmt: skip


@pytest.fixture
def results():
    """Made up: two fine-tunings of a task and the example, which has no times yet."""
    single = {"scale": 0.1, "gmacs": 0.04, "accuracy": 94.0, "error": 0.2, "temperature": 0.7,
              "calibration_error": [5.0, 1.0]}  # fmt: skip
    singles = {"0": single, "16": single | {"gmacs": 0.01, "accuracy": 90.0}}
    promises = [{"drop": 1.0, "draws": 2, "alike": [0.5, 1.5], "test": [0.7]}]
    timed = held(-0.9, cost=0.5, batch=8, single_cost=0.6, measured={"0": 0.8, "16": 0.4})
    times = {"machine": "a machine", "backend": "openvino", "load": 0.0, "rows": [timed]}
    none = [held(0.0, cost=0.06, pays=False)]
    equal = [held(0.3) | {"degree": 8, "its_cost": 0.03, "its_accuracy": 92.0, "gain": 0.6, "gain_error": 0.2}]
    subject = {"singles": singles, "promises": promises, "equal": equal}
    setup = {"command": "it", "date": "2026-01-01", "machine": "a machine", "libraries": "openvino 2026",
             "seeds": [0, 1], "drops": [1.0], "val_sheets": 10, "test_sheets": 20, "draw_sheets": 5}  # fmt: skip
    return {"setup": setup, "subjects": {
        "example": subject | {"gmacs": none},
        "board-0": subject | {"gmacs": [held(0.5)], "times": times},
        "board-1": subject | {"gmacs": [held(1.5)], "times": times},
    }}  # fmt: skip


def test_the_page_says_what_was_found(results, tmp_path):
    write_page(results, tmp_path / "budgets.md")
    page = re.sub(r" *\| *", " | ", (tmp_path / "budgets.md").read_text())
    assert ("| `board` | 1 | 2 of 2 | 16, 0 | 25% | 0.0200 | 50% | 0 | 0.0400 | 93.00 | +0.70 ±0.07 | +2.00 ±0.14 | "
            "+1.00 ±0.14 |" in page)  # fmt: skip
    assert ("| `board` | 8 | 0.0300 | 92.00 | 16, 0 | 25% | 0.0200 | 93.00 | +0.60 ±0.14 | +0.60 ±0.20 | +0.30 ±0.14 |"
            in page)  # fmt: skip
    assert "at least as accurate as the degree in 2 of 2 rows (tasks x degrees), by +0.60 points on average" in page
    assert "| example | 1 | 0 of 1 | none |  | 0.0600 | 150% | 0 | 0.0400 |" in page and "Batch 8" in page
    assert "| `board` | 1 | 2 of 2 | 16, 0 | 25% | 0.500 | 62% | 0 | 0.600 |" in page
    assert "by multiply-accumulates: cascades pay in 2 of 3 cases." in page
    assert "those are at least as accurate in 1 of 1 rows, by +1.00 points on average" in page
    behind = "at least as accurate in 0 of 1 rows, by -0.90 points on average"
    assert behind in page and "and behind by more than 2 standard errors in 1; the least is -0.90" in page
    assert "| `board` | 1 | 4 of 4 | 1.00 | 50% | 0.70 | 0% |" in page
    assert (tmp_path / "budgets-gmacs.png").read_bytes().startswith(b"\x89PNG")


def test_tasks_are_put_together(results):
    assert [task_of(name) for name in ("example", "board-0", "letters-2")] == ["example", "board", "letters"]
    empty, board = cascades(results, "gmacs")
    assert (empty.task, empty.rows, len(empty.others)) == ("example", (), 1)
    assert (board.task, len(board.rows), board.chains, board.sent_on) == ("board", 2, "16, 0", 0.25)
    results["subjects"]["board-1"]["gmacs"][0]["cascade"] = [16, 8, 0]
    assert list(cascades(results, "gmacs"))[1].chains == "16, 0 (1x) / 16, 8, 0 (1x)"


def test_subjects_and_cases(tmp_path):
    subjects = command.subjects_of(FULL)
    assert next(iter(subjects)) == "example" and len(subjects) == 10 and "missing-2" in subjects
    cases = list(command.cases_of(list(subjects.values()), FULL, Places(tmp_path, tmp_path / "page.md")))
    timed = [name for name in cases if name.startswith("times of ")]
    assert timed == [f"times of {name}" for name in ("example", "board-0", "letters-0", "missing-0")] == cases[-4:]
    assert list(command.subjects_of(QUICK)) == ["example", "board-0"]
    assert Subject("letters-2", "letters").seed == 2 and Subject("example", "board").seed is None


def test_fewer_sheets_are_the_first_of_more():
    more, fewer = (Subject("example", "board").sheets("val", count) for count in (300, 40))
    assert np.array_equal(more[0][:40], fewer[0]) and np.array_equal(more[1][:40], fewer[1])
    assert more[0].dtype == np.float32 and more[0].shape == (300, 3, 32, 32)


def test_refusals(tmp_path, monkeypatch, capsys):
    for arguments, words in ((["--only", "nothing"], "--only must be some of example, board-0"),
                         (["--report-only"], "nothing finished lies in")):  # fmt: skip
        with pytest.raises(SystemExit) as left:
            main("budgets", command.budgets, arguments=["--quick", "--work", str(tmp_path), *arguments])
        assert left.value.code == 2 and words in capsys.readouterr().err
    monkeypatch.setattr("bench.experiment.stages.ROOT", tmp_path)
    with pytest.raises(InputError, match="Run `make experiment` first"):
        Subject("board-0", "board").compile(tmp_path, 8)


@pytest.mark.full
def test_a_quick_run_and_its_second_start(tmp_path, capsys):
    arguments = ["--quick", "--only", "example", "--work", str(tmp_path), "--out", str(tmp_path / "budgets.md")]
    for told in ("times of example took", ""):
        with pytest.raises(SystemExit) as left:
            main("budgets", command.budgets, arguments=arguments)
        assert left.value.code == 0 and told in capsys.readouterr().err
    kept = json.loads((tmp_path / "budgets.json").read_text())["subjects"]["example"]
    assert set(kept) == {"singles", "equal", "gmacs", "promises", "times"}
