"""One model, randomly initialized, and everything that is made of it to be checked and timed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tocom.export.artifacts import Engine, FusedCheckpoint, OnnxGraph
from tocom.export.engine.tensorrt.plan import CURRENT, PlanOptions, library_of
from tocom.export.graph.lower import Lowering, count_gmacs
from tocom.export.graph.slice_bound import slice_bound
from tocom.export.graph.weight_store import WeightStore
from tocom.runtime.errors import GateError, InputError
from tocom.vit import ReducedViT, ReduceStep, schedule_for

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Subject:
    """A model.

    Args:
        name: timm's name of it.
        work: Graphs and plans go to a folder of its name in here.
        device: Where it runs; a CUDA device but in tests.

    Attributes:
        model: In float32 on the CPU.
        size: (3, H, W) of an image.
    """

    def __init__(self, name: str, work: Path, device: str = "cuda") -> None:
        self.name, self.folder, self.device = name, work / name, device
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        try:
            self.model = timm.create_model(name).eval().requires_grad_(False)
        except RuntimeError as error:  # timm's, which lists what it knows
            raise InputError(f"a model must be one that timm knows, got {name!r}.") from error
        self.size = (3, *self.model.patch_embed.img_size)
        self._lowering = Lowering(self.model, WeightStore(self.folder))
        self._graphs: dict[tuple[int, str], OnnxGraph] = {}
        self._models: dict[torch.dtype, nn.Module] = {}

    def reference(self, degree: int) -> ReducedViT:
        """The reference of a degree in float32 on the CPU."""
        return ReducedViT(self.model, schedule_for(self.model, degree)).eval()

    def on_device(self, degree: int, dtype: torch.dtype) -> ReducedViT:
        """The reference of a degree on the device; all of a number format share their weights."""
        if dtype not in self._models:
            self._models[dtype] = copy.deepcopy(self.model).to(self.device, dtype)
        return ReducedViT(self._models[dtype], schedule_for(self.model, degree)).eval()

    def images(self, batch: int) -> Tensor:
        """Noise, float32 [B, 3, H, W] on the CPU."""
        return torch.randn(batch, *self.size, generator=torch.Generator().manual_seed(0))

    def graph(self, degree: int, precision: str) -> OnnxGraph:
        """Our graph of a degree."""
        if (degree, precision) not in self._graphs:
            made_of = FusedCheckpoint(self.model.state_dict(), self.name, degree, 0, None, "random", None)
            schedule = schedule_for(self.model, degree)
            graph = self._lowering.lower(schedule, made_of, f"{degree}-{precision}.onnx", precision)
            self._graphs[degree, precision] = graph
        return self._graphs[degree, precision]

    @contextmanager
    def graph_file(self, degree: int, precision: str, *, bound: bool) -> Iterator[Path]:
        """The file of our graph; or of its slice bound, for the moment."""
        file = self.graph(degree, precision).file
        if not bound:
            yield file
            return
        with slice_bound(file) as sliced:
            yield sliced

    def gmacs(self, degree: int) -> float:
        """Multiply-accumulates of one image in the whole network, in units of 1e9."""
        return count_gmacs(self.reference(degree))

    def deployed_gmacs(self, degree: int) -> float:
        """Those that are left where nothing is computed that no logit depends on."""
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            Deployed(self.reference(degree))(torch.zeros(1, *self.size))
        return counter.get_total_flops() / 2 / 1e9

    def block_products(self, batch: int) -> list[tuple[int, int, int]]:
        """(M, N, K) of the products with weights of one block in which nothing was merged yet."""
        tokens = batch * self.reference(0).schedule.tokens_in
        layers = [each for each in self.model.blocks[0].modules() if isinstance(each, nn.Linear)]
        return [(tokens, layer.out_features, layer.in_features) for layer in layers]


class Deployed(nn.Module):
    """A reference that computes only what logits depend on, as the graphs do.

    Args:
        reference: On any device, in any number format.
        step: How it merges; None takes the reference's own way.
    """

    def __init__(self, reference: ReducedViT, step: ReduceStep | None = None) -> None:
        super().__init__()
        self.reference, self._step = reference, step
        # dropping the last tokens looks at none of them
        self._deciding = () if step is drop_last else reference.deciding_blocks

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> logits."""
        return self.reference(pixel_values, self._step, self._project, skip_unread=True)

    def _project(self, block: int, x: Tensor, queries: int | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.reference.project(block, x, queries)
        return q, k if block in self._deciding else _UndecidingKeys(k), v


class _UndecidingKeys:
    """Attention keys that no decision is made on: what it would be made on, their mean over the heads, is left out."""

    def __init__(self, keys: Tensor) -> None:
        self._keys = keys

    def transpose(self, one: int, other: int) -> Tensor:
        """The keys themselves, for attention."""
        return self._keys.transpose(one, other)

    def mean(self, dim: int) -> None:
        """Nothing."""


def drop_last(_block: int, x: Tensor, token_size: Tensor, _signal: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The reduce step of the slice bound: drops the last r tokens unseen."""
    return x[:, :-r], token_size[:, :-r]


def plan_options(backend: str, smallest: int, batch: int) -> PlanOptions:
    """How plans are built for the GPU that is there, by its name where the library knows that."""
    library_of(backend)
    return PlanOptions(batch=(smallest, batch, batch), targets=_own_target(backend))


def ensure_runs(engine: Engine) -> None:
    """Makes sure that an engine that was built can be run here."""
    if engine.unrunnable is not None:
        foreign = engine.backend == "tensorrt-rtx" and _own_target(engine.backend) == (CURRENT,)
        told = f"it names no GPU like this one, {_capability()}: " if foreign else ""
        raise InputError(f"{told}{engine.unrunnable}")


def _own_target(backend: str) -> tuple[str, ...]:
    if backend != "tensorrt-rtx":
        return ()
    own = _capability()
    return (own,) if own.upper() in library_of(backend).ComputeCapability.__members__ else (CURRENT,)


def _capability() -> str:
    return "sm{}{}".format(*torch.cuda.get_device_capability())


def ensure_usable(who: str, why: str) -> None:
    """Makes sure that a failure did not take the device with it."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError as error:
        raise GateError(f"{who} left the GPU unusable: {why}. Leave it out by --without; with that the same command "
                        "goes on where this one stopped.") from error  # fmt: skip
