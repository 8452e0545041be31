"""Which images to calibrate on: typical ones, and no two alike.

A calibration set stands for all images. Dense places of the feature space must be in it, because most images lie there,
and so must every kind of image, because ranges have to cover it (EDA-DM, Liu et al. 2024, arXiv 2401.04585: calibration
samples are chosen by density and diversity of their features).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tocom.calib.quantize.network import looking
from tocom.runtime.errors import InputError
from tocom.vit import ReducedViT

_NEIGHBOURS = 8  # that an image's density is measured with, and the density of its surroundings
_AMONG = 4096  # images, at most, that are looked at for neighbours
_ROWS = 1024  # images whose distances are computed at a time


@torch.no_grad()
def features_of(reference: ReducedViT, pixels: Tensor, batch: int = 32) -> Tensor:
    """What the classifier reads of every image, at unit length.

    Args:
        reference: The network.
        pixels: Normalized images, float32 [n, 3, H, W].
        batch: Images at a time.

    Returns:
        float32 [n, C].
    """
    features: list[Tensor] = []
    with looking({"head": reference.model.head}, lambda _name, x: features.append(x)):
        for part in pixels.split(batch):
            reference(part)
    return functional.normalize(torch.cat(features).float(), dim=-1)


def choose(features: Tensor, count: int, seed: int = 0) -> list[int]:
    """Chooses images, one after another: the one that is typical and far from all chosen so far.

    An image is typical if it has as many near neighbours as its neighbours have; so the middle of a group counts alike
    whether the group is dense or wide. First comes the most typical one; then always the one with the largest product
    of typicality and distance to the nearest that was chosen. The farther away a lone image is, the less typical it is,
    so that it does not come before the groups are covered; while a far group of a few images does.

    Args:
        features: Of every image, [n, d].
        count: Images to choose; all of them if there are no more.
        seed: Draws the images among which neighbours are looked for, where there are more than 4096.

    Returns:
        Their positions, rising.

    Raises:
        InputError: If none is asked for, or features are not finite.
    """
    if count < 1:
        raise InputError(f"the number of calibration images must be 1 or more, got {count}.")
    bad = (~features.isfinite().all(dim=1)).nonzero().flatten()
    if len(bad):
        raise InputError(f"the features of images must be finite numbers, got others for image {int(bad[0])}.")
    if count >= len(features):
        return list(range(len(features)))
    features = features.double()
    worth = typicality(features, seed)
    chosen = [int(worth.argmax())]
    nearest = _distances_to(features, chosen[0])
    taken = torch.zeros(len(features), dtype=torch.bool, device=features.device)
    taken[chosen[0]] = True
    while len(chosen) < count:
        following = int((worth * nearest).masked_fill(taken, -1).argmax())
        chosen.append(following)
        taken[following] = True
        nearest = torch.minimum(nearest, _distances_to(features, following))
    return sorted(chosen)


def typicality(features: Tensor, seed: int = 0) -> Tensor:
    """How near every image's neighbours are to it, compared with how near theirs are to them; 0..1.

    The inverse of the local outlier factor (Breunig et al. 2000, here with plain distances), clipped to 1.

    Args:
        features: [n, d].
        seed: See `choose`.

    Returns:
        [n].
    """
    drawn = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))[:_AMONG].sort().values
    among = features[drawn.to(features.device)]
    distance, neighbours = _neighbours(features, among, drawn)
    mean_distance = distance.mean(dim=1)  # of every image to its neighbours
    around = mean_distance[drawn.to(mean_distance.device)][neighbours].mean(dim=1)
    return (
        (around / mean_distance.clamp_min(torch.finfo(mean_distance.dtype).tiny))
        .where(mean_distance > 0, torch.ones_like(mean_distance))
        .clamp_max(1)
    )


def _neighbours(features: Tensor, among: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Distances to the nearest other images [n, k], rising, and which of `among` they are [n, k]."""
    k = min(_NEIGHBOURS, len(among) - 1)
    nearest = []
    for start in range(0, len(features), _ROWS):
        rows = features[start : start + _ROWS]
        distance = torch.cdist(rows, among, compute_mode="donot_use_mm_for_euclid_dist")
        itself = torch.arange(start, start + len(rows))[:, None] == drawn
        nearest.append(distance.masked_fill(itself.to(distance.device), torch.inf).topk(k, largest=False))
    return torch.cat([part.values for part in nearest]), torch.cat([part.indices for part in nearest])


def _distances_to(features: Tensor, position: int) -> Tensor:
    return (features - features[position]).norm(dim=1)
