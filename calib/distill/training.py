"""The training loop of self-distillation: step after step, saved now and then, stopped in good order."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

import torch
from torch import nn

from tocom.calib.distill.cluster import Cluster
from tocom.calib.distill.draws import degrees_at, drawn_for_weights
from tocom.calib.distill.options import DistillOptions
from tocom.calib.distill.pairs import BatchSource, Division, ImagePairs, LoadedPairs, load
from tocom.calib.distill.self_distillation import SelfDistillation
from tocom.calib.distill.training_log import StepRecord, TrainingLog
from tocom.calib.distill.training_state import TrainingFolder, TrainingState
from tocom.compensator import Compensator, CompensatorInfo
from tocom.runtime.errors import InputError


@dataclass(frozen=True)
class TrainingOverview:
    """What will be trained.

    Attributes:
        options: How.
        info: For which backbone.
        parameters: Numbers that are trained.
        frozen: Numbers of the backbone.
        division: The step's total batch.
        device: Type of the device, "cpu" or "cuda".
        steps_done: Where an earlier call left off.
    """

    options: DistillOptions
    info: CompensatorInfo
    parameters: int
    frozen: int
    division: Division
    device: str
    steps_done: int


@dataclass(frozen=True)
class Listeners:
    """Who is told what, in process 0."""

    on_start: Callable[[TrainingOverview], None] | None = None
    on_step: Callable[[int, float], None] | None = None
    on_unreadable: Callable[[tuple[str, ...]], None] | None = None


class StopRequests:
    """Turns SIGINT and SIGTERM into a request to stop at the end of the step; the second one ends at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, _frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(number, self._before[number])


class Training:
    """One run.

    Args:
        model: The backbone; frozen, and on the device while `run` runs.
        info: Of the compensator.
        source: The images.
        options: How to train.
        cluster: The processes that share the steps.

    Attributes:
        compensator: What is trained.
        division: How the processes share a step.
    """

    def __init__(
        self,
        model: nn.Module,
        info: CompensatorInfo,
        source: BatchSource | ImagePairs,
        options: DistillOptions,
        cluster: Cluster,
    ) -> None:
        with drawn_for_weights(options.seed):
            self.compensator = Compensator(info).train()
        self.division = Division(options.batch, options.accumulate, cluster.processes, cluster.rank)
        self._model, self._source = model.eval().requires_grad_(False), source
        self._options, self._cluster = options, cluster
        self._loss = SelfDistillation(
            model, self.compensator, temperature=options.temperature, seed=options.seed, dropout=options.dropout
        )
        self._adamw = torch.optim.AdamW(self.compensator.parameters(), lr=options.lr, weight_decay=options.weight_decay)
        self._step = 0
        self._unreadable: dict[str, None] = {}  # names in the order they were met
        self._folder: TrainingFolder | None = None
        self._log: TrainingLog | None = None

    def run(self, folder: Path | None, identity: Mapping[str, object], restart: bool, listeners: Listeners) -> None:
        """Trains to the last step, from the first or from a saved one.

        Args:
            folder: Where state and log are kept; None keeps nothing.
            identity: What decides the result.
            restart: Whether to begin anew in a folder that holds a state.
            listeners: Who is told what.

        Raises:
            InputError: If the folder is of another run, or images cannot be read.
            GateError: If a loss is not finite.
            KeyboardInterrupt: After SIGINT or SIGTERM, when the state has been saved.
        """
        cluster, home = self._cluster, next(self._model.parameters()).device
        listeners = listeners if cluster.rank == 0 else Listeners()
        self._model.to(cluster.device)
        try:
            module, optimizer = cluster.fabric.setup(self._loss, self._adamw)
            self._take_up(folder, identity, restart)
            if listeners.on_start:
                listeners.on_start(self._overview())
            if listeners.on_unreadable and self._unreadable:
                listeners.on_unreadable(tuple(self._unreadable))
            if self._step < self._options.steps:
                if isinstance(self._source, ImagePairs):
                    cluster.first_does(self._source.require_readable)
                self._train(module, optimizer, listeners)
        finally:
            self._close()
            self._model.to(home)
        self.compensator.cpu().eval()

    def _take_up(self, folder: Path | None, identity: Mapping[str, object], restart: bool) -> None:
        """Opens the folder, and puts the saved state in place."""
        if folder is None:
            return

        def opened() -> TrainingState | None:
            self._folder = TrainingFolder(folder, identity, restart=restart)
            state = self._folder.read()
            done = state.step if state else 0
            if done < self._options.steps:
                self._log = TrainingLog(folder, done)
            return state

        state = self._cluster.first_does(opened)
        if state is not None:
            self._step, self._unreadable = state.step, dict.fromkeys(state.unreadable)
            self.compensator.load_state_dict(state.compensator)
            self._adamw.load_state_dict(state.optimizer)
            self._cluster.scaler.load_state_dict(state.scaler)

    def _overview(self) -> TrainingOverview:
        return TrainingOverview(
            options=self._options,
            info=self.compensator.info,
            parameters=sum(weight.numel() for weight in self.compensator.parameters()),
            frozen=sum(weight.numel() for weight in self._model.parameters()),
            division=self.division,
            device=self._cluster.device.type,
            steps_done=self._step,
        )

    def _train(self, module: nn.Module, optimizer: torch.optim.Optimizer, listeners: Listeners) -> None:
        options = self._options
        batches = load(
            self._source,
            self.division.pairs(self._step, options.steps),
            workers=options.workers,
            pin_memory=self._cluster.device.type == "cuda",
        )
        with StopRequests() as stop:
            try:
                while self._step < options.steps:
                    with self._cluster.explained(options.batch):
                        stopping = self._one_step(module, optimizer, batches, stop, listeners)
                    if stopping or self._step % options.save_every == 0 or self._step == options.steps:
                        self._save()
                    if stopping and self._step < options.steps:
                        raise KeyboardInterrupt if self._cluster.rank == 0 else SystemExit(130)
            except (RuntimeError, InputError):
                # a request to stop may end the loaders of images before this process sees it
                if stop.requested and self._folder is not None:
                    self._folder.write(self._state())
                    raise KeyboardInterrupt from None
                raise
            finally:
                batches.close()

    def _one_step(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Iterator[LoadedPairs],
        stop: StopRequests,
        listeners: Listeners,
    ) -> bool:
        """One optimizer step; whether some process is asked to stop."""
        options, fabric, division, began = self._options, self._cluster.fabric, self.division, time.perf_counter()
        source, target = degrees_at(self._step, self.compensator.info.groups, options.seed)
        lr = options.lr_at(self._step, division.total)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        total, unreadable = torch.zeros((), device=self._cluster.device), ()
        for turn in range(options.accumulate):
            loaded = next(batches)
            images = loaded.images.to(self._cluster.device, non_blocking=True)
            with fabric.no_backward_sync(module, enabled=turn + 1 < options.accumulate):
                loss = module(images, source, target, self._step, division.first_image(turn)) / options.accumulate
                fabric.backward(loss)
            total = total + loss.detach()
            unreadable += loaded.unreadable
        loss, replaced, stopping = self._cluster.mean(total, len(unreadable), stop.requested)
        if not math.isfinite(loss):
            self._cluster.fail(f"the loss of step {self._step + 1} (degree {source} -> {target}) is {loss}. Training "
                               f"stopped{self._kept()}; try a lower learning rate or precision fp32.")  # fmt: skip
        if options.clip_grad is not None:
            fabric.clip_gradients(module, optimizer, max_norm=options.clip_grad, error_if_nonfinite=False)
        optimizer.step()
        optimizer.zero_grad()
        self._step += 1
        if replaced:
            self._note(self._cluster.together(unreadable), listeners)
        seconds, replaced = time.perf_counter() - began, round(replaced * division.processes)
        if self._log is not None:
            self._log.add(StepRecord(self._step, loss, lr, source, target, division.total / seconds, replaced))
        if listeners.on_step:
            listeners.on_step(self._step, loss)
        return stopping > 0

    def _note(self, unreadable: tuple[str, ...], listeners: Listeners) -> None:
        new = tuple(name for name in dict.fromkeys(unreadable) if name not in self._unreadable)
        self._unreadable.update(dict.fromkeys(new))
        if new and listeners.on_unreadable:
            listeners.on_unreadable(new)

    def _state(self) -> TrainingState:
        return TrainingState(
            step=self._step,
            compensator=self.compensator.state_dict(),
            optimizer=self._adamw.state_dict(),
            scaler=self._cluster.scaler.state_dict(),
            unreadable=tuple(self._unreadable),
        )

    def _save(self) -> None:
        if not all(bool(weight.isfinite().all()) for weight in self.compensator.parameters()):
            self._cluster.fail(f"the compensator is not finite after step {self._step}. Training stopped"
                               f"{self._kept()}; try a lower learning rate or precision fp32.")  # fmt: skip

        def write() -> None:
            if self._folder is not None and self._log is not None:
                self._log.flush()
                self._folder.write(self._state())

        self._cluster.first_does(write)

    def _kept(self) -> str:
        kept = self._folder is not None and self._folder.file.exists()
        return f", the last good state is kept in {self._folder.file}" if kept else ""

    def _close(self) -> None:
        for file in (self._log, self._folder):
            if file is not None:
                file.close()
