"""The processes and the device a training runs on: one process, or as many as torchrun started."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from lightning_fabric import Fabric
from torch import distributed

from tocom.runtime.errors import GateError, InputError

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
DEVICES = ("auto", "cpu", "cuda")
_PEER_GONE = ("gloo", "NCCL", "Connection")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Cluster:
    """What this process is part of.

    Attributes:
        fabric: Carries the precision, and gradients between the processes.
    """

    fabric: Fabric

    @classmethod
    def join(cls, device: str, precision: str) -> Cluster:
        """Meets the other processes, where torchrun started several.

        Args:
            device: One of `DEVICES`.
            precision: One of `PRECISIONS`.

        Raises:
            InputError: If there is no such device or precision here.
        """
        if device not in DEVICES or precision not in PRECISIONS:
            raise InputError(f"the device must be one of {', '.join(DEVICES)} and the precision one of "
                             f"{', '.join(PRECISIONS)}, got {device!r} and {precision!r}.")  # fmt: skip
        with_cuda = torch.cuda.is_available()
        if device == "cuda" and not with_cuda:
            raise InputError("device cuda is asked for, but torch finds no CUDA device here. Use --device cpu.")
        accelerator = "cuda" if with_cuda and device != "cpu" else "cpu"
        if precision == "fp16" and accelerator == "cpu":
            raise InputError("precision fp16 needs a CUDA device, got the CPU. Use --precision bf16 or fp32.")
        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
        processes = int(os.environ.get("WORLD_SIZE", 1))
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        fabric = Fabric(
            accelerator=accelerator,
            devices=here,
            num_nodes=processes // here,
            strategy="ddp" if processes > 1 else "auto",
            precision=PRECISIONS[precision],
        )
        fabric.launch()
        return cls(fabric)

    @property
    def rank(self) -> int:
        """Number of this process; 0 alone prints and writes."""
        return self.fabric.global_rank

    @property
    def processes(self) -> int:
        """How many processes take part."""
        return self.fabric.world_size

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.fabric.device

    @property
    def scaler(self) -> Any:
        """What has the `state_dict` of the gradient scaler; empty without one."""
        return self.fabric.strategy.precision

    def mean(self, *numbers: torch.Tensor | float) -> list[float]:
        """Means over the processes; not finite where one of them is not."""
        mine = torch.stack([torch.as_tensor(number, dtype=torch.float64, device=self.device) for number in numbers])
        return self.fabric.all_reduce(mine, reduce_op="mean").tolist()

    def together(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The names of all processes, in their order."""
        if self.processes == 1:
            return names
        gathered: list[tuple[str, ...]] = [()] * self.processes
        distributed.all_gather_object(gathered, names)
        return sum(gathered, ())

    def first_does(self, work: Callable[[], Result]) -> Result:
        """Process 0 works, all get the result.

        Raises:
            InputError: What the work raised.
            OSError: Likewise.
            SystemExit: On the other processes, with status 2, when the work failed.
        """
        result, problem = None, None
        if self.rank == 0:
            try:
                result = work()
            except (InputError, OSError) as error:
                problem = error
        if self.processes > 1:
            result, failed = self.fabric.broadcast((result, problem is not None))
            if failed and self.rank:
                raise SystemExit(2)
        if problem is not None:
            raise problem
        return result

    def fail(self, message: str) -> None:
        """Ends the run for a reason that every process knows.

        Raises:
            GateError: On process 0.
            SystemExit: On the others, with status 1.
        """
        raise GateError(message) if self.rank == 0 else SystemExit(1)

    def leave(self) -> None:
        """Parts from the other processes."""
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()

    @contextmanager
    def explained(self, batch: int) -> Iterator[None]:
        """Says in one line what ends a step from outside.

        Raises:
            InputError: If the device's memory does not hold the batch.
            GateError: If another process is gone.
            RuntimeError: Anything else.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise InputError(f"a batch of {batch} does not fit the memory of the device. Lower --batch and raise "
                             "--accumulate as much: the training stays the same.") from error  # fmt: skip
        except RuntimeError as error:
            if self.processes > 1 and any(word in str(error) for word in _PEER_GONE):
                raise GateError(f"another process of the run is gone ({' '.join(str(error).split())[:120]}); run the "
                                "same command again to go on from the last saved state.") from error  # fmt: skip
            raise
