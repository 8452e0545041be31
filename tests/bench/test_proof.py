"""The campaign of healthy models: that it runs, goes on where it stopped, and says so where a gate does not hold."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from bench.harness.run import main
from bench.harness.state import State
from bench.proof import __main__ as command
from bench.proof import campaign
from bench.proof.models import ENGINES, KINDS, draw, model_of
from bench.proof.page import write_page
from bench.proof.summary import summary
from tocom.export.proof.gates import GATES

pytestmark = pytest.mark.bench
SETUP = {"command": "here", "date": "x", "machine": "m", "libraries": "l"}


def run(folder, models=2):
    told = []
    state = State.load(folder / "state.jsonl", {})
    records = campaign.run(state, models=models, seed=0, tell=lambda text, done: told.append((done, text)))
    return records, told


def test_models_follow_from_their_numbers():
    assert draw(3, 0) == draw(3, 0) != draw(3, 1)
    drawn = [draw(number, 0) for number in range(200)]
    assert {each.kind for each in drawn} == set(KINDS)
    assert {(each.backend, each.precision) for each in drawn} == set(ENGINES)
    assert {each.reduction for each in drawn} == {"merge", "prune"}


@pytest.mark.full
def test_every_model_can_be_made():
    for number in range(300):
        drawn = draw(number, 0)
        model = model_of(drawn)
        assert drawn.schedule_of(model).tokens_in > 1


def test_the_campaign_goes_on_and_writes_what_it_found(tmp_path, monkeypatch):
    records, told = run(tmp_path, models=1)
    assert told == [(1, "0 alarms")] and records[0]["passed"] and records[0]["decisions"] >= 0
    monkeypatch.setattr(campaign, "check", lambda drawn: pytest.fail("proven twice"))
    again, _ = run(tmp_path, models=1)
    assert again == json.loads(json.dumps(records))
    found = summary(again)
    assert found["alarms"] == []
    write_page({"setup": SETUP, **found}, tmp_path / "proof.md")
    page = (tmp_path / "proof.md").read_text()
    assert "1 models, 0 false alarms" in page and "## The alarms" not in page
    assert (tmp_path / "proof.png").stat().st_size < 150_000


def test_an_alarm_is_kept_and_explained(tmp_path, monkeypatch):
    monkeypatch.setitem(GATES, "fp32", replace(GATES["fp32"], part=1e-3))
    records, told = run(tmp_path, models=1)
    assert told == [(1, "1 alarms")] and "embedding" in records[0]["faults"][0]
    write_page({"setup": SETUP, **summary(records)}, tmp_path / "proof.md")
    assert "## The alarms" in (tmp_path / "proof.md").read_text()


@pytest.mark.parametrize(("passed", "status"), [pytest.param(True, 0, marks=pytest.mark.full), (False, 1)])
def test_the_exit_status_tells_of_alarms(tmp_path, capsys, passed, status):
    state = State.load(tmp_path / "state.jsonl", {"seed": 0, "code": command._code()})
    state.keep("0", {"drawn": draw(0, 0).__dict__, "passed": passed, "faults": [] if passed else ["injected"]})
    arguments = ["--models", "1", "--work", str(tmp_path), "--out", str(tmp_path / "proof.md")]
    with pytest.raises(SystemExit) as left:
        main("proof", command.proof, arguments=arguments)
    assert left.value.code == status
    assert ("injected" in capsys.readouterr().out) == (not passed)
    assert ("injected" in (tmp_path / "proof.md").read_text()) == (not passed)


@pytest.mark.full
def test_a_small_campaign_of_every_engine(tmp_path):
    records, _ = run(tmp_path, models=6)
    assert {(record["drawn"]["backend"], record["drawn"]["precision"]) for record in records} == set(ENGINES)
    assert all(record["passed"] for record in records)
