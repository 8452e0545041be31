"""Observers: what is compared. Each answers with its logits, its decisions, and the tokens between its parts.

An engine in any library and number format is one, and so is the PyTorch reference (`.reference.TorchObserver`). Any two
can be compared.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tocom.export.artifacts import Engine
from tocom.export.graph.operators import operator_of
from tocom.export.graph.trace import OUTPUT
from tocom.export.proof.debug_copy import POINT, debug_copy
from tocom.export.proof.decisions import AnyDecision, decisions_of
from tocom.export.proof.gates import gates_row
from tocom.runtime.backends import BACKENDS
from tocom.runtime.engines.base import EngineRunner, open_engine
from tocom.vit import ReducedViT


@dataclass(frozen=True)
class Observed:
    """What an observer answers to one batch.

    Attributes:
        logits: As shipped, [B, classes].
        decisions: Block -> what was decided.
        values: Name in the graph (`operators.point_name`) -> tokens [B, N, C], sizes [B, N, 1] or a signal there. Of
            the debug copy; values that it does not put out are missing.
        separate_copy: What the debug copy answered. More outputs may make it round elsewhere, and decide otherwise at a
            tie. None where the logits and decisions are the copy's own.
    """

    logits: Tensor
    decisions: Mapping[int, AnyDecision]
    values: Mapping[str, Tensor]
    separate_copy: Observed | None = None

    @property
    def debug_copy(self) -> Observed:
        """What the debug copy answered; its values are those here."""
        return self.separate_copy or self


class Observer(ABC):
    """Something that classifies images and can be looked into.

    Attributes:
        name: For people.
        precision: Row of `tocom.export.proof.gates.GATES` that it is measured by.
    """

    name: str
    precision: str

    @abstractmethod
    def observe(self, pixel_values: np.ndarray) -> Observed:
        """Runs a batch, float32 [B, 3, H, W]."""


class RunnerObserver(Observer):
    """An engine that runs, and its debug copy; they may be the same.

    Args:
        shipped: The engine.
        debug: Its debug copy, or itself.
        reference: Of the same degree, for what decisions look like.
        precision: Number format of the engine.
        backend: Its library; None takes that of what runs.
        name: For people.
        deciding: A copy that puts out decisions only, where more outputs make the debug copy decide otherwise.
    """

    def __init__(
        self,
        shipped: EngineRunner,
        debug: EngineRunner,
        reference: ReducedViT,
        precision: str,
        backend: str | None = None,
        name: str = "",
        deciding: EngineRunner | None = None,
    ) -> None:
        self._shipped, self._debug, self._reference = shipped, debug, reference
        self._deciding = deciding
        backend = backend or shipped.backend
        self.precision, self.name = gates_row(backend, precision), name or f"{backend} {precision}"

    def observe(self, pixel_values: np.ndarray) -> Observed:
        """See `Observer`."""
        copied = self.read(self._debug.infer_all(pixel_values), self._reference)
        if self._shipped is self._debug:
            return copied
        outputs = self._shipped.infer_all(pixel_values)
        names = operator_of(self._reference.reduction).decision_names
        if all(name in outputs for block in self._reference.deciding_blocks for name in names(block)):
            shipped = self.read(outputs, self._reference)  # native operators put out what they decide
            return Observed(shipped.logits, shipped.decisions, copied.values, copied)
        decisions = copied.decisions
        if self._deciding is not None:
            decisions = decisions_of(self._deciding.infer_all(pixel_values), self._reference)
        return Observed(torch.from_numpy(outputs[OUTPUT]), decisions, copied.values, copied)

    @staticmethod
    def read(outputs: Mapping[str, np.ndarray], reference: ReducedViT) -> Observed:
        """Sorts the outputs of a debug copy.

        Args:
            outputs: By name.
            reference: Of the same degree.
        """
        return Observed(
            logits=torch.from_numpy(outputs[OUTPUT]),
            decisions=decisions_of(outputs, reference),
            values={
                name: torch.from_numpy(np.asarray(value, np.float32))
                for name, value in outputs.items()
                if POINT.fullmatch(name)
            },
        )


@contextmanager
def observer_of(engine: Engine, reference: ReducedViT, *, batch: int | None = None) -> Iterator[RunnerObserver]:
    """Opens an engine and its debug copy; an engine that cannot run here is its debug copy alone.

    Args:
        engine: As listed.
        reference: Of the same degree.
        batch: Images that it is prepared for, as a server would; None for any number.
    """
    with debug_copy(engine) as debug:
        if engine.unrunnable:
            yield RunnerObserver(debug, debug, reference, engine.precision, engine.backend)
            return
        with ExitStack() as stack:
            runner = open_engine(engine.file, engine.backend, precision=engine.precision, batch=batch)
            shipped, deciding = stack.enter_context(runner), None
            if BACKENDS[engine.backend].fuses_by_outputs and engine.precision != "fp32" and not engine.native:
                deciding = stack.enter_context(debug_copy(engine, points=False))
            yield RunnerObserver(shipped, debug, reference, engine.precision, deciding=deciding)
