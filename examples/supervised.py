"""Plain supervised training, as the example's and the experiment's networks are made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


def fit(
    network: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    *,
    steps: int,
    lr: float,
    on_step: Callable[[int, float], None] = lambda _step, _loss: None,
) -> None:
    """Trains a network in place: AdamW, warm-up and cosine, smoothed labels, clipped gradients.

    Args:
        network: Images [B, 3, H, W] -> logits [B, classes]; also a `tocom.vit.ReducedViT`, to train at a degree.
        batches: Normalized images and their classes, at least `steps` batches.
        steps: Optimizer steps.
        lr: Peak learning rate.
        on_step: Called after every step with the steps done and the loss.
    """
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05)
    warmup = max(1, min(200, steps // 10))
    network.train()
    for step, (pixels, classes) in zip(range(steps), batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = nn.functional.cross_entropy(network(pixels), classes, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        on_step(step + 1, loss.item())
    network.eval()
