"""Two pictures of one image -> for each block a panel of each, side by side comparable; and panels as PNG files."""

from __future__ import annotations

import colorsys
import io

import numpy as np
from PIL import Image

from tocom.export.proof.report.pictures import MergePicture, differing, group_indices

DIFFERING = (225, 29, 46)
_SMALLEST_PATCH = 8  # pixels
_FADED = np.array((128, 128, 128))  # stands out from light and dark pages alike
_APART = np.array([(255, 214, 51), (40, 196, 232), (76, 217, 100), (160, 107, 255), (61, 112, 255), (240, 240, 240)])
_COLOURS = 64  # of a PNG file: photographs need no more at this size


def panels(one: MergePicture, other: MergePicture, block: int, side: int = 280) -> tuple[np.ndarray, np.ndarray]:
    """The pictures of one block, of both.

    A patch that is still a token of its own shows its pixels. Merged: every group is filled by its mean colour and
    outlined, in the same colour wherever it lies and on both sides. Pruned: what was fused is faded. Patches that
    differ are outlined in red; where they were merged, each group of them is filled by a colour of its own, so that it
    shows which went together.

    Args:
        one: Of which.
        other: Likewise, of the same image.
        block: One that both have.
        side: Pixels of the longer side, about.

    Returns:
        Two of [height, width, 3] uint8.
    """
    marked = differing(one, other, block)
    assert marked is not None  # both have the block
    ours, theirs = (group_indices(picture.groups[block]) for picture in (one, other))
    fills = _fills(np.where(marked, ours, -1), np.where(marked, theirs, -1))
    return _panel(one, ours, marked, fills[0], side), _panel(other, theirs, marked, fills[1], side)


def _fills(first: np.ndarray, second: np.ndarray) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """A colour for every group of both: the second's is that of the first's with which it shares most patches.

    Args:
        first: Index of the group of every patch; -1 for patches that need none.
        second: Likewise.
    """
    in_order = dict.fromkeys(first[first >= 0].tolist())  # by their first patches, which stay from block to block
    ours = {group: rank for rank, group in enumerate(in_order)}
    pairs, shared = np.unique(np.stack([first.ravel(), second.ravel()]), axis=1, return_counts=True)
    theirs: dict[int, int] = {}
    for pair in np.argsort(-shared, kind="stable"):
        one, other = pairs[:, pair].tolist()
        if other >= 0 and other not in theirs and ours[one] not in theirs.values():
            theirs[other] = ours[one]
    for other in np.unique(second[second >= 0]).tolist():
        theirs.setdefault(other, len({*ours.values(), *theirs.values()}))
    colours = [{group: _APART[rank % len(_APART)] for group, rank in ranks.items()} for ranks in (ours, theirs)]
    return colours[0], colours[1]


def _panel(
    picture: MergePicture, groups: np.ndarray, marked: np.ndarray, fills: dict[int, np.ndarray], side: int
) -> np.ndarray:
    """One of `panels`; `fills` has the colour of every group that differs."""
    patch = max(_SMALLEST_PATCH, round(side / max(groups.shape)))

    def wide(values: np.ndarray) -> np.ndarray:
        return values.repeat(patch, axis=0).repeat(patch, axis=1)

    size = groups.shape[1] * patch, groups.shape[0] * patch
    pixels = np.asarray(Image.fromarray(picture.image).resize(size, Image.Resampling.BICUBIC)).astype(float)
    together, areas, red = wide((np.bincount(groups.ravel()) > 1)[groups]), wide(groups), wide(marked)
    if picture.reduction == "prune":
        pixels[together] = 0.2 * pixels[together] + 0.8 * _FADED
        areas = np.where(together, 0, 1 + areas)  # one area, however many fusions it comes from
    else:
        counts = np.bincount(areas.ravel())[:, None]
        sums = [np.bincount(areas.ravel(), pixels[..., channel].ravel()) for channel in range(3)]
        means = np.stack(sums, axis=1) / counts
        pixels[together] = means[areas][together]
        outlines = np.array([_outline(int(first)) for first in np.unique(groups, return_index=True)[1]])
        inside = together & _border(areas, max(1, patch // 16))
        pixels[inside] = outlines[areas][inside]
        filled = np.array([fills.get(group, means[group]) for group in range(len(means))])
        pixels[red & together] = (0.4 * means + 0.6 * filled)[areas][red & together]
    pixels[_border(areas, 1) & ~together] *= 0.8
    pixels[red & _border(np.where(red, areas, -1), max(2, patch // 9))] = DIFFERING
    return pixels.round().astype(np.uint8)


def _border(areas: np.ndarray, width: int) -> np.ndarray:
    """Pixels within so many of another area or the edge; areas are wider than that."""
    around = np.pad(areas, width, constant_values=-2)
    rows, columns = areas.shape
    shifts = [(y, x) for y in (0, width, 2 * width) for x in (0, width, 2 * width)]
    return np.logical_or.reduce([around[y : y + rows, x : x + columns] != areas for y, x in shifts])


def _outline(patch: int) -> tuple[float, ...]:
    """The colour of the group whose first patch this is: neighbours far apart, none of them red."""
    hue = 0.1 + 0.78 * (patch * 0.618034 % 1)
    return tuple(255 * share for share in colorsys.hsv_to_rgb(hue, 0.55, 0.85))


def png(pixels: np.ndarray) -> bytes:
    """A picture [height, width, 3] uint8 as a small PNG file: few colours, of which red stays what it is."""
    few = Image.fromarray(pixels).quantize(_COLOURS - 1, dither=Image.Dither.NONE)
    palette = np.zeros((_COLOURS, 3), np.uint8)
    palette.flat[: len(few.getpalette() or ())] = few.getpalette()
    palette[-1] = DIFFERING
    codes = np.where((pixels == DIFFERING).all(axis=-1), _COLOURS - 1, np.asarray(few)).astype(np.uint8)
    written, file = Image.fromarray(codes, "P"), io.BytesIO()
    written.putpalette(palette.tobytes())
    written.save(file, "png", optimize=True)
    return file.getvalue()
