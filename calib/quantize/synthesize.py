"""Calibration images without data: noise that is changed until the network takes it for images.

What tells images from noise inside a ViT is how alike its patches are: in images some are alike and others are not, in
noise all are alike. So the entropy of the patches' similarities is maximized in the attention's output of every block,
together with the certainty of a class and the smoothness of the pixels (PSAQ-ViT, Li et al. 2022, arXiv 2203.02250,
section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional

from tocom.runtime.errors import InputError

_BINS = 128  # over the cosines -1..1, which a similarity's density is kept on
_BANDWIDTH = 0.05  # standard deviation of the kernel
_CLASS_WEIGHT, _ROUGHNESS_WEIGHT = 1.0, 0.05
_LEARNING_RATE = 0.1
_FLOOR = 1e-12


def synthesize(
    model: nn.Module,
    count: int,
    size: tuple[int, int, int],
    *,
    steps: int = 100,
    batch: int = 32,
    seed: int = 0,
    low: Tensor | None = None,
    high: Tensor | None = None,
    tell: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Makes images to calibrate on.

    Args:
        model: A timm VisionTransformer, in evaluation mode.
        count: Images to make.
        size: (3, H, W).
        steps: Of gradient descent on the pixels.
        batch: Images at a time.
        seed: Of the noise, and of the classes: each as often as any other, to within one.
        low: Of each channel, [3], what black is when normalized; None takes it from the model's own settings.
        high: Likewise, white.
        tell: Called with the steps done and the steps in all.

    Returns:
        Normalized pixels, float32 [count, 3, H, W], between low and high.

    Raises:
        InputError: If no image is asked for.
    """
    if count < 1:
        raise InputError(f"the number of images to synthesize must be 1 or more, got {count}.")
    black, white = _ends(model)
    low, high = (
        (default if end is None else end.float()).reshape(-1, 1, 1) for end, default in ((low, black), (high, white))
    )
    draw = torch.Generator().manual_seed(seed)
    labels = torch.cat(
        [torch.randperm(model.num_classes, generator=draw) for _ in range(-(-count // model.num_classes))]
    )[:count]
    # uniform within a half of the range: what is clamped has no gradient
    noise = low + (high - low) * (0.25 + 0.5 * torch.rand(count, *size, generator=draw))
    done = []
    rounds = -(-count // batch)
    for index, (pixels, classes) in enumerate(zip(noise.split(batch), labels.split(batch), strict=True)):
        pixels = pixels.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([pixels], lr=_LEARNING_RATE)
        for step in range(steps):
            (gradient,) = torch.autograd.grad(objective(model, pixels, classes).sum(), pixels)
            pixels.grad = gradient
            optimizer.step()
            with torch.no_grad():
                pixels.copy_(pixels.clamp(low, high))
            if tell is not None:
                tell(index * steps + step + 1, rounds * steps)
        done.append(pixels.detach())
    return torch.cat(done)


def objective(model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    """What is minimized (PSAQ-ViT, section 3.3): how uniform patches are, how unsure the class, how rough the pixels.

    Args:
        model: A timm VisionTransformer.
        pixels: Normalized images, float32 [B, 3, H, W].
        labels: The class of each, int64 [B].

    Returns:
        [B].
    """
    attended: list[Tensor] = []
    with ExitStack() as hooks:
        for block in model.blocks:
            hook = block.attn.proj.register_forward_hook(lambda _module, _inputs, output: attended.append(output))
            hooks.callback(hook.remove)
        logits = model(pixels)
    patches = [tokens[:, model.num_prefix_tokens :] for tokens in attended]
    unsure = functional.cross_entropy(logits, labels, reduction="none")
    return _CLASS_WEIGHT * unsure + _ROUGHNESS_WEIGHT * roughness(pixels) - diversity(patches)


def diversity(blocks: Sequence[Tensor]) -> Tensor:
    """Entropy of how alike the patches are, mean over blocks.

    Args:
        blocks: The patches of each block, [B, P, C].

    Returns:
        In nats, [B].
    """
    return torch.stack([entropy(similarities(patches)) for patches in blocks]).mean(dim=0)


def similarities(patches: Tensor) -> Tensor:
    """Cosines of all pairs of patches: [B, P, C] -> [B, P * (P - 1) / 2]."""
    unit = functional.normalize(patches, dim=-1)
    first, second = torch.triu_indices(patches.shape[1], patches.shape[1], 1, device=patches.device)
    return (unit @ unit.transpose(-2, -1))[:, first, second]


def entropy(cosines: Tensor) -> Tensor:
    """Differential entropy of numbers in -1..1, by a kernel density estimate (PSAQ-ViT, section 3.2).

    The kernels are not summed over all numbers at every place, which would take numbers times places of memory: every
    number is first shared out between the two places next to it, linearly, so that it has a gradient (binned density
    estimation, Wand 1994).

    Args:
        cosines: [B, M].

    Returns:
        In nats, [B].
    """
    width = 2 / (_BINS - 1)
    at = ((cosines.clamp(-1, 1) + 1) / width).clamp_max(_BINS - 1 - 1e-3)
    left = at.detach().floor()
    share = at - left
    counts = cosines.new_zeros(len(cosines), _BINS)
    counts = counts.scatter_add(1, left.long(), 1 - share).scatter_add(1, left.long() + 1, share)
    reach = int(4 * _BANDWIDTH / width) + 1
    offsets = torch.arange(-reach, reach + 1, device=cosines.device) * width
    kernel = torch.exp(-0.5 * (offsets / _BANDWIDTH).square())
    kernel = (kernel / (kernel.sum() * width)).to(cosines)
    # padded, so that what a kernel reaches beyond the ends is counted too
    density = functional.conv1d((counts / cosines.shape[1])[:, None], kernel[None, None], padding=2 * reach)[:, 0]
    return -(density * density.clamp_min(_FLOOR).log()).sum(dim=1) * width


def roughness(pixels: Tensor) -> Tensor:
    """Total variation, mean over the pixels: [B, 3, H, W] -> [B]."""
    down = (pixels[:, :, 1:] - pixels[:, :, :-1]).abs().mean(dim=(1, 2, 3))
    return down + (pixels[..., 1:] - pixels[..., :-1]).abs().mean(dim=(1, 2, 3))


def _ends(model: nn.Module) -> tuple[Tensor, Tensor]:
    """What black and white are, normalized by the model's own settings, [3] each."""
    config = resolve_model_data_config(model)
    mean, std = torch.tensor(config["mean"]), torch.tensor(config["std"])
    return -mean / std, (1 - mean) / std
