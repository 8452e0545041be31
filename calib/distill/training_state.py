"""A training run's folder: the state it goes on from, for whom it is, and that one process alone works in it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from tocom.runtime.errors import InputError, one_line
from tocom.runtime.files import write_atomically

_FORMAT = 1


@dataclass(frozen=True)
class TrainingState:
    """Everything a run needs to go on after a step as if it had never stopped.

    Attributes:
        step: Steps done.
        compensator: State dict.
        optimizer: State dict.
        scaler: State dict of the gradient scaler; empty without one.
        unreadable: Names of the images that could not be read so far.
    """

    step: int
    compensator: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    scaler: Mapping[str, Any]
    unreadable: tuple[str, ...] = ()


class TrainingFolder:
    """The folder of one run, locked while this object lives.

    Args:
        folder: Made if it does not exist.
        identity: What decides the result, name -> value; a state with another identity is refused.
        restart: Whether to forget what is there.

    Raises:
        InputError: If another process works in the folder.
        OSError: If the folder cannot be made.
    """

    def __init__(self, folder: Path, identity: Mapping[str, object], *, restart: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.file = folder, folder / "state.pt"
        self.identity = {name: repr(value) for name, value in {"state_format": _FORMAT, **identity}.items()}
        # a soft lock would outlive its process
        self._lock = FileLock(folder / ".lock", blocking=False, fallback_to_soft=False, thread_local=False)
        try:
            self._lock.acquire()
        except Timeout:
            raise InputError(f"one training works in a folder at a time, but another does in {folder}.") from None
        if restart:
            for old in (self.file, folder / "log.csv", *folder.glob("events.out.tfevents.*")):
                old.unlink(missing_ok=True)

    def read(self) -> TrainingState | None:
        """The saved state; None where a run has not come to one.

        Raises:
            InputError: If it is of a run with other options, or cannot be read.
        """
        if not self.file.exists():
            return None
        try:
            content = torch.load(self.file, map_location="cpu", weights_only=True)
            identity, state = content["identity"], content["state"]
            state = TrainingState(**{**state, "unreadable": tuple(state["unreadable"])})
        except Exception as error:  # a damaged archive or pickle fails in nearly any way
            raise InputError(f"the training state {self.file} cannot be read ({one_line(error)[:100]}). Begin anew "
                             "with --restart.") from error  # fmt: skip
        for name in {**identity, **self.identity}:
            was, asked = identity.get(name), self.identity.get(name)
            if was != asked:
                what = name.replace("_", " ")
                raise InputError(f"the training in {self.folder} was begun with {what} {was}, but {asked} is given "
                                 "now. Give the same again, or begin anew with --restart.")  # fmt: skip
        return state

    def write(self, state: TrainingState) -> None:
        """Keeps a state in place of the one before, which stays whole if that fails.

        Raises:
            OSError: If it cannot be written.
        """
        content = {"identity": self.identity, "state": dict(vars(state))}
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_atomically(self.file, buffer.getvalue())

    def close(self) -> None:
        """Lets other processes in."""
        self._lock.release()
