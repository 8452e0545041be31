"""What a training run tells of every step: a table, `log.csv`, and TensorBoard events."""

from __future__ import annotations

import csv
import io
import os
import time
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from tocom.runtime.files import write_atomically

_DRAWN = ("loss", "lr", "images_per_s")


@dataclass(frozen=True)
class StepRecord:
    """One row of the log.

    Attributes:
        step: Steps done.
        loss: Mean over the step's total batch.
        lr: Learning rate of the step.
        source: Degree of the teacher.
        target: Degree of the student.
        images_per_s: Images of the total batch per second.
        unreadable: Images of the step that could not be read and were replaced.
    """

    step: int
    loss: float
    lr: float
    source: int
    target: int
    images_per_s: float
    unreadable: int


COLUMNS = tuple(field.name for field in fields(StepRecord))


class TrainingLog:
    """Writes the records of a run; whatever was told after the step it goes on from is taken back.

    Everything is written by the calling process itself, so that a full disk is an error here and not in a thread.

    Args:
        folder: Where `log.csv` and the events go.
        steps_done: The step it goes on from.

    Raises:
        OSError: If a file cannot be written.
    """

    def __init__(self, folder: Path, steps_done: int) -> None:
        table = folder / "log.csv"
        _cut(table, steps_done)
        self._table = table.open("a", buffering=1, newline="")
        self._rows = csv.writer(self._table)
        self._events = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        if steps_done:  # TensorBoard then hides what an earlier file tells of later steps
            again = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(wall_time=time.time(), step=steps_done + 1, session_log=again))

    def add(self, record: StepRecord) -> None:
        """Writes one record."""
        values = astuple(record)
        self._rows.writerow([f"{value:.1f}" if name == "images_per_s" else repr(value)
                             for name, value in zip(COLUMNS, values, strict=True)])  # fmt: skip
        for name in _DRAWN:
            drawn = summary.scalar(name, getattr(record, name))
            self._events.write_event(Event(wall_time=time.time(), step=record.step, summary=drawn))

    def flush(self) -> None:
        """Puts the events where TensorBoard can see them."""
        self._events.flush()

    def close(self) -> None:
        """Ends the files."""
        self._table.close()
        self._events.close()


def _cut(table: Path, steps_done: int) -> None:
    """Leaves the header and the rows up to a step."""
    rows = [COLUMNS]
    if table.exists():
        with table.open(newline="", errors="replace") as file:
            old = [tuple(row) for row in csv.reader(file) if len(row) == len(COLUMNS) and row[0].isdecimal()]
        rows += [row for row in old if 0 < int(row[0]) <= steps_done]
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    write_atomically(table, text.getvalue().encode())
