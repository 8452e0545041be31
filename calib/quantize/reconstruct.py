"""Learning how weights are rounded, block by block, so that blocks and network answer as they do in float.

Nearest is not best: the roundings within a product can cancel each other. Every weight may go to the grid's number
below or above it; which one is learnt by gradient descent on a rectified sigmoid (AdaRound, Nagel et al. 2020, section
3). AdaRound computes with weights in between, and drives them to the ends with a regularizer; here the network always
computes with rounded weights and the gradient passes straight through, which needs a fraction of the steps. Compared
are the block's output (BRECQ, Li et al. 2021) and, at the same time, what the float remainder of the network makes of
it (MGRQ, Yang et al. 2024, arXiv 2406.09229: extra-block global supervision). The scales of the activations are learnt
along with it (LSQ, Esser et al. 2020, section 2).

Token reduction makes two things particular. A network that decides otherwise has other tokens, which can be compared no
more: so the float network's decisions are recorded, and forced on the network that learns. And as it will decide for
itself in the end, what it decides on is compared as well.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tocom.calib.quantize.grids import Format, Grid, scale_for
from tocom.calib.quantize.network import Quantization, QuantizedLinear, QuantizedWeight, quantized_model
from tocom.reduction import MERGE, Reduction
from tocom.schedule import MergeSchedule
from tocom.vit import ReducedViT

_LOW, _HIGH = -0.1, 1.1  # what the rectified sigmoid is stretched to before it is clipped to 0..1
_UNDECIDED = 0.01  # no share begins nearer to 0 or 1, where the gradient is cut off
_SCALE_RATE = 0.1  # learning rate of an activation scale's logarithm, as a share of the roundings'
_NO_ERROR = 1e-10  # errors are not divided by less


def reconstruct(
    model: nn.Module,
    schedule: MergeSchedule,
    quantization: Quantization,
    pixels: Tensor,
    *,
    reduction: Reduction = MERGE,
    steps: int = 200,
    batch: int = 16,
    global_weight: float = 0.3,
    signal_weight: float = 3.0,
    learning_rate: float = 0.02,
    learn_activations: bool = True,
    seed: int = 0,
    tell: Callable[[int, int], None] | None = None,
) -> Quantization:
    """Learns the rounding of every quantized weight, and the scales of the activations.

    A block keeps what was learnt only where that lessens its errors. Of the networks of which the first 0 to L blocks
    are the learnt ones, the one is returned whose logits, with its own decisions, have the least KL divergence from
    the float network's on these images. So the result is never worse there than what was given.

    Args:
        model: A timm VisionTransformer that holds `quantization.state`; it is left as it is.
        schedule: Tokens removed per block.
        quantization: What to begin with.
        pixels: Normalized images, float32 [n, 3, H, W].
        reduction: How tokens are removed.
        steps: Of gradient descent, for each block.
        batch: Images per step.
        global_weight: Weight of the network's output beside the block's. 0 looks at the block alone, and spares the
            computation of all that follow it.
        signal_weight: Weight of what a block decides on, in blocks that reduce.
        learning_rate: Of Adam, for what goes into the sigmoid.
        learn_activations: Whether the scales of the activations are learnt too.
        seed: Chooses the images of every step.
        tell: Called with the steps done and the steps in all.

    Returns:
        The same with other codes, each one of the two next to its weight or as given, and other activation scales; the
        weights' scales are the same.
    """
    course = _Course(steps, batch, global_weight, signal_weight, learning_rate, learn_activations)
    work = _Reconstruction(model, schedule, reduction, quantization, pixels, course, seed)
    candidates = [quantization]
    depth = len(model.blocks)
    for block in range(depth):

        def progress(done: int, before: int = block * steps) -> None:
            if tell is not None:
                tell(before + done, depth * steps)

        learnt = work.learn(block, candidates[-1], progress)
        if learnt is not candidates[-1]:
            candidates.append(learnt)
    return min(candidates, key=work.divergence)  # the first of equals


def learnable_rounding(weight: Tensor, start: QuantizedWeight, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """The two codes that a weight may get, and where it lies between them.

    They are the grid's numbers below and above the weight. A code to begin with that is neither stays one of the two:
    the other is then its neighbour towards the weight.

    Args:
        weight: Float, [out, in].
        start: Its codes and scales.
        grid: Of the codes.

    Returns:
        Lower codes, upper codes, and the weight's share of the way from lower to upper, 0..1; [out, in] each.
    """
    levels = _levels(grid).to(weight.device)
    exact = weight / start.scale[:, None]
    at = torch.searchsorted(levels, start.codes.contiguous())
    at = torch.where(start.codes > exact, at - 1, at).clamp(0, len(levels) - 2)
    lower, upper = levels[at], levels[at + 1]
    return lower, upper, ((exact - lower) / (upper - lower)).clamp(0, 1)


def _levels(grid: Grid) -> Tensor:
    """All numbers of a grid, rising."""
    if grid.name == "FLOAT8E4M3FN":
        every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        return every[every.isfinite()].unique()
    return torch.arange(grid.lowest, grid.largest + 1, dtype=torch.float32)


class LearntLinear(nn.Module):
    """A product whose weight's rounding and whose input's scale are being learnt.

    Args:
        weight: What is rounded, float32 [out, in].
        bias: [out] or None.
        start: The codes to begin with.
        form: Format of both factors.
        scale: Of the input.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, start: QuantizedWeight, form: Format, scale: float) -> None:
        super().__init__()
        self.format = form
        self.bias = bias
        self.weight_scale = start.scale
        self.lower, self.upper, share = learnable_rounding(weight, start, form.weight)
        share = share.clamp(_UNDECIDED, 1 - _UNDECIDED)
        self.rounding = nn.Parameter(torch.logit((share - _LOW) / (_HIGH - _LOW)))
        self.scale = scale
        self.log_change = nn.Parameter(torch.zeros((), device=weight.device))  # of the scale

    def share(self) -> Tensor:
        """How far each code is on its way from lower to upper, 0..1, [out, in]."""
        return (torch.sigmoid(self.rounding) * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if self.format.activation is not None:
            x = _rounded(x, self.scale * self.log_change.exp(), self.format.activation)
        share = self.share()
        share = share + ((share >= 0.5).to(share) - share).detach()
        codes = self.lower + share * (self.upper - self.lower)
        return functional.linear(x, codes * self.weight_scale[:, None], self.bias)

    @torch.no_grad()
    def decided(self) -> tuple[QuantizedWeight, float]:
        """The weight with every code at one of its two ends, and the input's scale as float16 holds it."""
        codes = torch.where(self.share() >= 0.5, self.upper, self.lower)
        grid = self.format.activation
        if grid is None:
            return QuantizedWeight(codes, self.weight_scale), self.scale
        # a float16 scale times a grid's end is exact in float64, so that one which was not learnt stays as it was
        largest = self.scale * self.log_change.double().exp() * grid.largest
        return QuantizedWeight(codes, self.weight_scale), float(scale_for(largest, grid))


def _rounded(x: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Rounds to a grid with the gradient passing straight through; what is clipped moves the scale (LSQ, eq. 3)."""
    x = (x / scale).clamp(grid.lowest, grid.largest)
    return (x + (grid.nearest(x) - x).detach()) * scale


class _BlockByBlock(ReducedViT):
    """The reference in pieces, with every decision given."""

    def through(
        self, index: int, x: Tensor, token_size: Tensor, decisions: Mapping[int, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One block: [B, N, C] and sizes [B, N, 1] -> [B, N - r, C], [B, N - r, 1], and what it decides on."""
        x, signal = self.attend(index, x, token_size)
        if index in decisions:
            x, token_size = self.reduction.apply(x, token_size, signal, decisions[index])
        return self.feed_forward(index, x), token_size, signal

    def answer(self, start: int, x: Tensor, token_size: Tensor, decisions: Mapping[int, Any]) -> Tensor:
        """Tokens entering block `start` -> logits [B, classes]."""
        for index in range(start, len(self.model.blocks)):
            x, token_size, _ = self.through(index, x, token_size, decisions)
        return self.classify(x, token_size)


@dataclass(frozen=True)
class _Course:
    """How to learn; see `reconstruct`."""

    steps: int
    batch: int
    global_weight: float
    signal_weight: float
    learning_rate: float
    learn_activations: bool


class _Reconstruction:
    """The float network, the one that becomes it in narrow numbers, and how far the images have come in both."""

    def __init__(
        self,
        model: nn.Module,
        schedule: MergeSchedule,
        reduction: Reduction,
        quantization: Quantization,
        pixels: Tensor,
        course: _Course,
        seed: int,
    ) -> None:
        plain = copy.deepcopy(model).eval().requires_grad_(False)
        plain.load_state_dict(dict(quantization.state))
        self.float = _BlockByBlock(plain, schedule, reduction=reduction)
        self.narrow = _BlockByBlock(quantized_model(plain, quantization), schedule, reduction=reduction)
        self.course, self.pixels = course, pixels
        self.draw = torch.Generator().manual_seed(seed)
        self.logits, self.decisions = recorded(self.float, pixels, course.batch)
        self.float_x = self.x = torch.cat([self.float.embed(part) for part in pixels.split(course.batch)])
        self.token_size = self.x.new_ones(*self.x.shape[:2], 1)
        self.target = self.signal = self.float_x  # what the block that is learnt makes of them in float

    def learn(self, block: int, start: Quantization, tell: Callable[[int], None]) -> Quantization:
        """Learns one block, and takes the images through it.

        Returns:
            The quantization that it starts from where nothing was learnt that is better.
        """
        with torch.no_grad():
            self.target, _, self.signal = self._through(self.float, block, self.float_x)
        names = [name for name in start.weights if name.startswith(f"blocks.{block}.")]
        if names:
            before = self._errors(block)
            learnt = self._descend(block, names, start, before, tell)
            self._put(learnt, names)
            after = self._errors(block)
            if self._total(after, before) < self._total(before, before):
                start = learnt
            self._put(start, names)
        with torch.no_grad():
            self.x, self.token_size, _ = self._through(self.narrow, block, self.x)
        self.float_x = self.target
        return start

    @torch.no_grad()
    def divergence(self, quantization: Quantization) -> float:
        """KL(float || narrow) of the logits over all images, the network deciding for itself."""
        narrow = ReducedViT(
            quantized_model(self.float.model, quantization), self.float.schedule, reduction=self.float.reduction
        )
        logits = torch.cat([narrow(part) for part in self.pixels.split(self.course.batch)])
        error = float(divergence(self.logits, logits))
        return error if math.isfinite(error) else math.inf

    def _descend(
        self, block: int, names: Sequence[str], start: Quantization, before: Tensor, tell: Callable[[int], None]
    ) -> Quantization:
        course, model = self.course, self.narrow.model
        products = {}
        for name in names:
            bias, scale = model.get_submodule(name).bias, start.activations.get(name, 1.0)
            weight = self.float.model.get_submodule(name).weight
            products[name] = LearntLinear(weight, bias, start.weights[name], start.format, scale)
            _replace(model, name, products[name])
        learnt = products.values()
        groups = [{"params": [product.rounding for product in learnt], "lr": course.learning_rate}]
        if course.learn_activations:
            scales = [products[name].log_change for name in names if name in start.activations]
            groups.append({"params": scales, "lr": course.learning_rate * _SCALE_RATE})
        optimizer = torch.optim.Adam(groups)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, course.steps)
        for step in range(course.steps):
            chosen = torch.randperm(len(self.x), generator=self.draw)[: course.batch].to(self.x.device)
            loss = self._total(self._error(block, chosen), before)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
            tell(step + 1)
        decided = {name: product.decided() for name, product in products.items()}
        weights = {name: weight for name, (weight, _) in decided.items()}
        scales = {name: scale for name, (_, scale) in decided.items() if name in start.activations}
        return replace(start, weights={**start.weights, **weights}, activations={**start.activations, **scales})

    def _total(self, errors: Tensor, before: Tensor) -> Tensor:
        """The errors relative to those before, weighed."""
        relative = errors / before.clamp_min(_NO_ERROR)
        return relative[0] + self.course.global_weight * relative[1] + self.course.signal_weight * relative[2]

    @torch.no_grad()
    def _errors(self, block: int) -> Tensor:
        """`_error` over all images."""
        every = torch.arange(len(self.x), device=self.x.device).split(self.course.batch)
        return torch.stack([self._error(block, part) * len(part) for part in every]).sum(0) / len(self.x)

    def _error(self, block: int, chosen: Tensor) -> Tensor:
        """What a block does to some images, [3].

        Mean squared error of its output, of the last block what the head reads; KL(float || narrow) with all that
        follows in float; mean squared error of what it decides on, as far as decisions depend on it.
        """
        decisions = {index: _of_images(decision, chosen) for index, decision in self.decisions.items()}
        x, token_size, signal = self.narrow.through(block, self.x[chosen], self.token_size[chosen], decisions)
        last = block == len(self.float.model.blocks) - 1
        read = slice(self.float.read_tokens if last else None)
        local = functional.mse_loss(x[:, read], self.target[chosen][:, read])
        nothing = torch.zeros_like(local)
        whole, deciding = nothing, nothing
        if self.course.global_weight:
            whole = divergence(self.logits[chosen], self.float.answer(block + 1, x, token_size, decisions))
        if self.course.signal_weight and block in self.float.deciding_blocks:
            target_signal = functional.normalize(self.signal[chosen], dim=-1)
            deciding = functional.mse_loss(functional.normalize(signal, dim=-1), target_signal)
        return torch.stack([local, whole, deciding])

    def _through(self, network: _BlockByBlock, block: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All images through one block."""
        every = torch.arange(len(x), device=x.device).split(self.course.batch)
        done = []
        for part in every:
            decisions = {
                index: _of_images(decision, part) for index, decision in self.decisions.items() if index == block
            }
            done.append(network.through(block, x[part], self.token_size[part], decisions))
        x, token_size, signal = map(torch.cat, zip(*done, strict=True))
        return x, token_size, signal

    def _put(self, quantization: Quantization, names: Sequence[str]) -> None:
        for name in names:
            product = QuantizedLinear(
                quantization.weights[name],
                self.narrow.model.get_submodule(name).bias,
                quantization.format.activation,
                quantization.activations.get(name, 1.0),
            )
            _replace(self.narrow.model, name, product)


@torch.no_grad()
def recorded(reference: ReducedViT, pixels: Tensor, batch: int) -> tuple[Tensor, dict[int, Any]]:
    """Runs a network and keeps what it decides.

    Args:
        reference: The network.
        pixels: Normalized images, float32 [n, 3, H, W].
        batch: Images at a time.

    Returns:
        Logits [n, classes]; and block -> its `tocom.merging.Matching` or `tocom.pruning.Pruning` of all images.
    """
    decisions: dict[int, list[Any]] = {}

    def step(block: int, x: Tensor, token_size: Tensor, signal: Tensor, r: int) -> tuple[Tensor, Tensor]:
        decision = reference.reduction.decide(signal, r, reference.model)
        decisions.setdefault(block, []).append(decision)
        return reference.reduction.apply(x, token_size, signal, decision)

    logits = torch.cat([reference(part, step) for part in pixels.split(batch)])
    return logits, {
        block: _changed(parts[0], lambda *positions: torch.cat(positions), *parts) for block, parts in decisions.items()
    }


def divergence(expected: Tensor, logits: Tensor) -> Tensor:
    """KL(expected || logits) of the predictions of logits [B, classes], mean over the images."""
    return functional.kl_div(
        logits.log_softmax(dim=-1), expected.log_softmax(dim=-1), log_target=True, reduction="batchmean"
    )


def _of_images(decision: Any, chosen: Tensor) -> Any:
    return _changed(decision, lambda positions: positions[chosen], decision)


def _changed(decision: Any, change: Callable[..., Tensor], *of: Any) -> Any:
    """The decision with all positions, [B, ...] each, changed."""
    names = [field.name for field in fields(decision) if isinstance(getattr(decision, field.name), Tensor)]
    return replace(decision, **{name: change(*(getattr(part, name) for part in of)) for name in names})


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)
