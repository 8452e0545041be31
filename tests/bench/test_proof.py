"""The campaign of healthy models: that it runs, goes on where it stopped, and says so where a gate does not hold."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from bench.proof import campaign
from bench.proof.models import ENGINES, KINDS, draw, model_of
from bench.proof.page import write_page
from bench.proof.state import State
from tocom.export.proof.gates import GATES
from tocom.runtime.errors import InputError


def run(folder, models=2):
    told = []
    state = State.load(folder / "models.jsonl")
    records = campaign.run(state, models=models, seed=0, progress=lambda done, alarms: told.append((done, len(alarms))))
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
    assert told == [(1, 0)] and records[0]["passed"] and records[0]["decisions"] >= 0
    monkeypatch.setattr(campaign, "check", lambda drawn: pytest.fail("proven twice"))
    again, _ = run(tmp_path, models=1)
    assert again == json.loads(json.dumps(records))
    assert write_page(tmp_path / "proof.md", again, command="here") == []
    page = (tmp_path / "proof.md").read_text()
    assert "1 models, 0 false alarms" in page and "## The alarms" not in page
    assert (tmp_path / "proof.png").stat().st_size < 150_000


def test_a_state_of_other_models_is_refused(tmp_path):
    (tmp_path / "models.jsonl").write_text('{"code": "other"}\n')
    with pytest.raises(InputError, match="--fresh"):
        State.load(tmp_path / "models.jsonl")


def test_an_alarm_is_kept_and_explained(tmp_path, monkeypatch):
    monkeypatch.setitem(GATES, "fp32", replace(GATES["fp32"], part=1e-3))
    records, told = run(tmp_path, models=1)
    assert told == [(1, 1)] and "embedding" in records[0]["faults"][0]
    assert records[0]["own"]["embedding"] > 0
    assert len(write_page(tmp_path / "proof.md", records, command="here")) == 1
    assert "## The alarms" in (tmp_path / "proof.md").read_text()


@pytest.mark.parametrize(("passed", "status"), [pytest.param(True, 0, marks=pytest.mark.full), (False, 1)])
def test_the_exit_status_tells_of_alarms(tmp_path, passed, status):
    state = State.load(tmp_path / "models-0.jsonl")
    drawn = json.loads(json.dumps(draw(0, 0).__dict__))
    state.add({"drawn": drawn, "passed": passed, "faults": [] if passed else ["injected"], "seconds": 0.0})
    command = [sys.executable, "-m", "bench.proof", "--models", "1", "--work", tmp_path, "--out", tmp_path / "proof.md"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert ("injected" in done.stderr) == (not passed)


@pytest.mark.full
def test_a_small_campaign_of_every_engine(tmp_path):
    records, _ = run(tmp_path, models=6)
    assert {(record["drawn"]["backend"], record["drawn"]["precision"]) for record in records} == set(ENGINES)
    assert all(record["passed"] for record in records)
