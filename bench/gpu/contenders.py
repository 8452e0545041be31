"""Who is timed on a GPU: our engines, each with its slice bound, and what a user would pick instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from bench.gpu.subject import DTYPES, Deployed, Subject, drop_last, ensure_runs, plan_options
from bench.gpu.timing import Timed, by_events, by_wall
from bench.plain_tome import PlainToMe
from tocom.export.engine.build import as_engine, build
from tocom.runtime.engines.base import open_engine
from tocom.runtime.engines.tensorrt.plan import TITLES
from tocom.runtime.errors import InputError
from tocom.vit import ReduceStep

COMPILE = "torch.compile"
EVENTS, WALL = "events", "wall"

Opens = Callable[[ExitStack], Timed]
"""Makes a contender ready to be timed, until the stack is closed."""


@dataclass(frozen=True)
class Contender:
    """Somebody who takes part, at one degree."""

    name: str  # who
    degree: int  # tokens that are removed in every block
    bound: bool  # whether they are the last ones, dropped unseen: the slice bound of the contender of that name
    clock: str  # how it is timed: `EVENTS` on the device, or `WALL` time until it is done
    gmacs: float  # multiply-accumulates of one image that it does, in units of 1e9
    open: Opens  # makes it ready

    @property
    def key(self) -> tuple[str, int, bool]:
        """Who it is in a group."""
        return self.name, self.degree, self.bound


@dataclass(frozen=True)
class Field:
    """Everybody at one batch size."""

    subject: Subject  # the model
    batch: int  # images per call
    precision: str  # what all compute in, one of `DTYPES`
    only: Sequence[str] = ()  # only those with one of these texts in their names; none for all
    without: Sequence[str] = ()  # not those with one of these

    def contenders(self, degrees: Sequence[int]) -> Iterator[Contender]:
        """All of them; degree 0, which comes first, before the other degrees of each."""
        for degree in degrees:
            done, whole = self.subject.deployed_gmacs(degree), self.subject.gmacs(degree)
            for bound in (False, True) if degree else (False,):
                for name, (clock, opened) in self._ours(degree, bound).items():
                    if self._is_wanted(name):
                        yield Contender(name, degree, bound, clock, done, opened)
            for name, opened in self._peers(degree).items():
                if self._is_wanted(name):
                    yield Contender(name, degree, False, EVENTS, whole, opened)

    def _is_wanted(self, name: str) -> bool:
        def holds_one_of(texts: Sequence[str]) -> bool:
            return any(text.lower() in name.lower() for text in texts)

        return (not self.only or holds_one_of(self.only)) and not holds_one_of(self.without)

    @cached_property
    def _images(self) -> np.ndarray:
        return self.subject.images(self.batch).numpy()

    @cached_property
    def _on_device(self) -> Tensor:
        return torch.from_numpy(self._images).to(self.subject.device, DTYPES[self.precision])

    @cached_property
    def _pool(self) -> object:
        return torch.cuda.graph_pool_handle()

    def _ours(self, degree: int, bound: bool) -> dict[str, tuple[str, Opens]]:
        """Our engines by name: their clock, and what opens them."""

        def network() -> nn.Module:
            reference = self.subject.on_device(degree, DTYPES[self.precision])
            return Deployed(reference, _step(self.subject.model, degree, bound))

        torch_ways = {
            f"ours, PyTorch and Triton {self.precision}": lambda _stack: self._eager(network()),
            f"ours, PyTorch and Triton {self.precision}, CUDA graph": lambda _stack: self._captured(network()),
            f"ours, {COMPILE} and Triton {self.precision}": lambda _stack: self._compiled(network()),
        }
        plans = {
            f"ours, {title} {self.precision}": lambda stack, backend=backend: self._plan(backend, degree, bound, stack)
            for backend, title in TITLES.items()
        }
        return {
            **{name: (EVENTS, opened) for name, opened in torch_ways.items()},
            f"ours, ONNX Runtime {self.precision}": (WALL, lambda stack: self._onnxruntime(degree, bound, stack)),
            **{name: (EVENTS, opened) for name, opened in plans.items()},
        }

    def _peers(self, degree: int) -> dict[str, Opens]:
        """What a user would pick instead: timm's model, and plain token merging where tokens are merged."""

        def network() -> nn.Module:
            reference = self.subject.on_device(degree, DTYPES[self.precision])
            return PlainToMe(reference) if degree else reference.model

        return {
            f"torch eager {self.precision}": lambda _stack: self._eager(network()),
            f"{COMPILE} {self.precision}": lambda _stack: self._compiled(network()),
        }

    def _eager(self, network: nn.Module) -> Timed:
        return by_events(self._call(network))

    def _call(self, network: nn.Module) -> Callable[[], Tensor]:
        return torch.inference_mode()(lambda: network(self._on_device))

    def _captured(self, network: nn.Module) -> Timed:
        """The network as a CUDA graph. All of them share their memory, since none runs beside another."""
        call, aside = self._call(network), torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):  # what is compiled or chosen at first must not be recorded
                call()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # a library that compiles kernels in another thread may do so meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            call()
        return by_events(graph.replay)

    def _compiled(self, network: nn.Module) -> Timed:
        """The network by torch.compile with CUDA graphs."""
        call = self._call(torch.compile(network, mode="reduce-overhead", dynamic=False, fullgraph=True))

        def step() -> None:
            torch.compiler.cudagraph_mark_step_begin()  # no call's output is needed when the next one begins
            call()

        return by_events(step)

    def _onnxruntime(self, degree: int, bound: bool, stack: ExitStack) -> Timed:
        """ONNX Runtime, whose calls wait."""
        try:
            from bench.gpu.ort_cuda import CudaOrtRunner
        except ImportError as error:
            raise InputError(f"ONNX Runtime does not load: {error}") from error
        with self.subject.graph_file(degree, self.precision, bound=bound) as file:
            return by_wall(stack.enter_context(CudaOrtRunner(file)).on_device(self._images))

    def _plan(self, backend: str, degree: int, bound: bool, stack: ExitStack) -> Timed:
        """A plan for the batch size."""
        options, how = plan_options(backend, 1, self.batch), {"precision": self.precision, "batch": self.batch}
        if bound:
            recipe = {"options": options.to_json()}
            with (
                self.subject.graph_file(degree, self.precision, bound=True) as sliced,
                as_engine(sliced, backend, recipe) as plan,
            ):
                runner = stack.enter_context(open_engine(plan, backend, **how))
        else:
            graph = self.subject.graph(degree, self.precision)
            engine = build(graph, backend=backend, precision=self.precision, plan=options)
            ensure_runs(engine)
            runner = stack.enter_context(open_engine(engine.file, backend, **how))
        return lambda calls: float(np.mean(runner.device_ms(self._images, calls)))


def _step(model: nn.Module, degree: int, bound: bool) -> ReduceStep | None:
    """How a network of ours removes tokens."""
    if not degree:
        return None
    if bound:
        return drop_last
    from tocom.triton_merge import triton_step

    return triton_step(model)
