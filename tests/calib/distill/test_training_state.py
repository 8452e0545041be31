"""The state of a run and its log: kept whole, refused to strangers, cut to where the run goes on."""

from __future__ import annotations

import struct

import pytest
import torch
from tensorboardX.proto.event_pb2 import Event, SessionLog

from tocom.calib.distill.training_log import COLUMNS, StepRecord, TrainingLog
from tocom.calib.distill.training_state import TrainingFolder, TrainingState
from tocom.runtime.errors import InputError

IDENTITY = {"lr": 0.001, "schedule": "constant", "clip_grad": None}


def state(step: int = 3) -> TrainingState:
    weights = {"a": torch.arange(4.0)}
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(4)}}, "param_groups": [{"lr": 0.1}]}
    return TrainingState(step, weights, optimizer, {"scale": 1024.0}, ("a.png", "b\u00e9.png"))


def test_a_state_is_read_as_it_was_written(tmp_path):
    with_state = TrainingFolder(tmp_path / "run", IDENTITY)
    assert with_state.read() is None
    with_state.write(state())
    with_state.close()
    read = TrainingFolder(tmp_path / "run", dict(IDENTITY)).read()
    assert (read.step, read.scaler, read.unreadable) == (3, {"scale": 1024.0}, ("a.png", "b\u00e9.png"))
    assert torch.equal(read.compensator["a"], torch.arange(4.0))
    assert torch.equal(read.optimizer["state"][0]["exp_avg"], torch.ones(4))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": 0.002}, "begun with lr 0.001, but 0.002"),
        ({"clip_grad": 1.0}, "begun with clip grad None, but 1.0"),
        ({"schedule": "strided:3"}, "begun with schedule 'constant', but 'strided:3'"),
        ({"new_option": 1}, "begun with new option None, but 1"),
    ],
)
def test_another_runs_state_is_refused(tmp_path, change, words):
    first = TrainingFolder(tmp_path, IDENTITY)
    first.write(state())
    first.close()
    other = TrainingFolder(tmp_path, {**IDENTITY, **change})
    with pytest.raises(InputError, match=f"{words} is given now. .* --restart"):
        other.read()
    other.close()
    anew = TrainingFolder(tmp_path, {**IDENTITY, **change}, restart=True)
    assert anew.read() is None


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04"])
def test_a_damaged_state_is_refused(tmp_path, content):
    folder = TrainingFolder(tmp_path, IDENTITY)
    folder.file.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read .* --restart") as caught:
        folder.read()
    assert "\n" not in str(caught.value)


def test_one_process_works_in_a_folder(tmp_path):
    first = TrainingFolder(tmp_path, IDENTITY)
    with pytest.raises(InputError, match="one training works in a folder at a time"):
        TrainingFolder(tmp_path, IDENTITY)
    first.close()
    TrainingFolder(tmp_path, IDENTITY).close()


def record(step: int, loss: float = 0.1) -> StepRecord:
    return StepRecord(step, loss, 1e-3, 4, 12, 100.0, 0)


def events(folder) -> list[Event]:
    """Of all files in the order of their making, without checking the records' sums."""
    found = []
    for file in sorted(folder.glob("events.out.tfevents.*"), key=lambda file: file.stat().st_mtime_ns):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[12 + length + 4 :]
    return found


def test_the_log_is_cut_to_where_the_run_goes_on(tmp_path):
    log = TrainingLog(tmp_path, 0)
    for step in range(1, 6):
        log.add(record(step, step / 3))
    log.close()
    with (tmp_path / "log.csv").open("a") as file:
        file.write("6,0.1,0.0")  # what a kill leaves of a row
    again = TrainingLog(tmp_path, 3)
    again.add(record(4, 9.0))
    again.close()
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert lines[0] == ",".join(COLUMNS) == "step,loss,lr,source,target,images_per_s,unreadable"
    assert [line.split(",")[:2] for line in lines[1:]] == [
        ["1", repr(1 / 3)], ["2", repr(2 / 3)], ["3", "1.0"], ["4", "9.0"]
    ]  # fmt: skip


def test_tensorboard_hides_what_is_done_again(tmp_path):
    log = TrainingLog(tmp_path, 0)
    for step in range(1, 6):
        log.add(record(step, step / 2))
    log.close()
    drawn = [(event.step, value.simple_value) for event in events(tmp_path) for value in event.summary.value
             if value.tag == "loss"]  # fmt: skip
    assert drawn == [(step, step / 2) for step in range(1, 6)]
    for file in tmp_path.glob("events*"):
        file.rename(tmp_path / "events.out.tfevents.0")
    TrainingLog(tmp_path, 3).close()
    purged = [event.step for event in events(tmp_path) if event.session_log.status == SessionLog.START]
    assert purged == [4]
