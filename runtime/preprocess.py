"""From image files to the network's input, number for number as timm's evaluation transform, in Pillow and numpy.

Geometry is fixed by `timm.data.transforms_imagenet_eval` and, through it, by torchvision's Resize and CenterCrop. Their
roundings differ (torchvision truncates the long edge, timm rounds it) and are kept as they are: a size that is off by
one shifts every pixel, and moves accuracy.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from .errors import InputError, one_line
from .manifest import InputSpec

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg")  # timm's default, so that folders hold the same images for both

SENT_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # of Pillow's many decoders, what a server exposes
MAX_PIXELS = 40_000_000  # of an image that is sent, unless a server says otherwise: decoded, three bytes each

# Pillow's own limit for a file, in pixels. A thin image can pass it and still explode when its short edge is enlarged.
_MAX_RESIZED_PIXELS = 178_956_970


def find_images(paths: Iterable[Path | str]) -> list[Path]:
    """Lists images: files as they are given, folders searched recursively for `IMAGE_EXTENSIONS` in sorted order.

    Raises:
        InputError: A path is missing or neither a file nor a folder, or a folder cannot be read or has no images.
    """
    images: list[Path] = []
    for path in map(Path, paths):
        try:
            if path.is_dir():
                images += _images_below(path)
            elif path.is_file():
                images.append(path)
            elif path.exists():
                raise InputError(f"an image must be a file or a folder, got {one_line(path)}")
            else:
                raise InputError(f"there is no {one_line(path)}: give image files, or folders that hold images")
        except InputError:
            raise
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise InputError(f"{one_line(path)} cannot be read: {one_line(error)}") from error
    return images


def _images_below(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise error

    images: list[Path] = []
    entered: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        # Links are followed, as timm does, but each folder is entered once: links can form circles.
        entered.add(os.path.realpath(root))
        folders[:] = [name for name in folders if os.path.realpath(Path(root, name)) not in entered]
        images += [Path(root, name) for name in files if Path(name).suffix.lower() in IMAGE_EXTENSIONS]
    if not images:
        raise InputError(
            f"a folder must hold images ({', '.join(IMAGE_EXTENSIONS)}), got none in {one_line(folder)}: "
            "name files of other types one by one"
        )
    return sorted(images)


def load_image(path: Path | str) -> Image.Image:
    """Decodes an image file to RGB. An EXIF orientation is not applied, since timm does not apply it either.

    Raises:
        InputError: The file is missing, unreadable, not an image, truncated, or larger than Pillow's safe limit.
    """
    path = Path(path)
    try:
        if not path.is_file():  # before opening: a pipe would block for ever
            raise InputError(f"an image must be a file, got {one_line(path)}, which is not one")
        with warnings.catch_warnings():
            # Advice to programmers about palettes and sizes; what cannot be decoded still raises.
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                if image.format == "EPS":  # Pillow would run it, as the program that it is, by Ghostscript
                    raise InputError(f"an image must be pixels, got PostScript in {one_line(path)}: convert it first")
                return image.convert("RGB")
    except InputError:
        raise
    except Exception as error:  # a broken file makes decoders raise nearly anything: SyntaxError, struct.error, ...
        # Pillow repeats the path in some messages; the type says enough where there are no words.
        reason = "not an image Pillow can read" if isinstance(error, Image.UnidentifiedImageError) else error
        raise InputError(f"{one_line(path)} cannot be decoded: {one_line(reason) or type(error).__name__}") from error


def decode_image(content: bytes, max_pixels: int) -> Image.Image:
    """Decodes an image that somebody sent to RGB: only formats of `SENT_FORMATS`, and only up to a size.

    Args:
        content: The encoded image.
        max_pixels: Width times height that is decoded at most.

    Raises:
        InputError: It is none of these formats, truncated, or larger.
    """
    try:
        with Image.open(io.BytesIO(content), formats=SENT_FORMATS) as image:
            if image.width * image.height > max_pixels:  # before a pixel is decoded
                raise InputError(f"an image must have {max_pixels} pixels at most, got {image.width}x{image.height}")
            return image.convert("RGB")
    except InputError:
        raise
    except Exception as error:  # as in load_image
        formats = f"not an image in one of the formats {', '.join(SENT_FORMATS)}"
        reason = formats if isinstance(error, Image.UnidentifiedImageError) else error
        raise InputError(f"the image cannot be decoded: {one_line(reason) or type(error).__name__}") from error


def preprocess(image: Image.Image, spec: InputSpec) -> np.ndarray:
    """Resizes, crops and normalizes one image.

    Args:
        image: Any mode; converted to RGB.
        spec: The network's input.

    Returns:
        float32 [3, H, W].

    Raises:
        InputError: The image is so thin that the resized one would have no pixels, or too many.
    """
    image = image if image.mode == "RGB" else image.convert("RGB")  # which copies even what is RGB
    _, height, width = spec.size
    resized_height, resized_width = _resized_size(image.height, image.width, spec)
    if min(resized_height, resized_width) < 1 or resized_height * resized_width > _MAX_RESIZED_PIXELS:
        raise InputError(
            f"an image must not be this thin: {image.width}x{image.height} would be resized to "
            f"{resized_width}x{resized_height}; crop it first"
        )
    if image.size != (resized_width, resized_height):
        image = image.resize((resized_width, resized_height), Image.Resampling[spec.interpolation.upper()])
    fill = tuple(round(255 * m) for m in spec.mean) if spec.crop_mode == "border" else (0, 0, 0)
    pixels = np.asarray(_center_crop_or_pad(image, height, width, fill), dtype=np.float32) / np.float32(255)
    normalized = (pixels - np.asarray(spec.mean, dtype=np.float32)) / np.asarray(spec.std, dtype=np.float32)
    return np.ascontiguousarray(normalized.transpose(2, 0, 1))


def _resized_size(height: int, width: int, spec: InputSpec) -> tuple[int, int]:
    """(height, width) of the image before the crop. All sizes in pixels."""
    target_height, target_width = (math.floor(side / spec.crop_pct) for side in spec.size[1:])
    if spec.crop_mode == "squash":
        return target_height, target_width
    if min(height, width) < 1:
        return 0, 0
    if spec.crop_mode == "center" and target_height == target_width:
        # torchvision's Resize: the short edge meets the target, the long one is truncated.
        if width <= height:
            return int(target_width * height / width), target_width
        return target_height, int(target_height * width / height)
    ratios = (height / target_height, width / target_width)
    ratio = max(ratios) if spec.crop_mode == "border" else min(ratios)
    return round(height / ratio), round(width / ratio)


def _center_crop_or_pad(image: Image.Image, height: int, width: int, fill: tuple[int, int, int]) -> Image.Image:
    """The middle of the image; where it is too small, `fill` around it."""
    if width > image.width or height > image.height:
        canvas = Image.new("RGB", (max(width, image.width), max(height, image.height)), fill)
        canvas.paste(image, (max(width - image.width, 0) // 2, max(height - image.height, 0) // 2))
        image = canvas
    # Python's round: halves go to the even neighbour, as in torchvision.
    top, left = round((image.height - height) / 2.0), round((image.width - width) / 2.0)
    return image.crop((left, top, left + width, top + height))
