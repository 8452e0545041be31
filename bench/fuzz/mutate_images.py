"""Image files as they come from anywhere: every mode and format, odd sizes, and bombs."""

from __future__ import annotations

import io
import random
import struct
import warnings
import zlib
from typing import Any

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

from bench.fuzz.case import Mutate
from bench.fuzz.mutate_bytes import BYTES

_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I", "CMYK", "YCbCr", "HSV", "LAB", "F", "PA", "La", "RGBa",
          "RGBX")  # fmt: skip
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "TGA", "ICO", "DDS", "PCX", "SGI", "JPEG2000", "AVIF",
            "MPO", "IM", "SPIDER", "XBM", "MSP", "ICNS", "QOI", "EPS", "PDF")  # fmt: skip
_SIZES = ((1, 1), (1, 5000), (5000, 1), (2, 3), (3, 20_000), (20_000, 2), (7, 7), (33, 31), (640, 427), (1, 60_000))


def _pixels(draw: random.Random, mode: str = "RGB", size: tuple[int, int] = (40, 48)) -> Image.Image:
    numbers = np.random.default_rng(draw.randrange(2**32)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(numbers)
    if mode == "I;16":
        return Image.fromarray(numbers[..., 0].astype(np.uint16) * 257)
    for step in ("RGBA", "LA", "L"):  # not every mode is reached from RGB at once
        try:
            return image.convert(mode)
        except ValueError:
            image = image.convert(step)
    return image


def _saved(image: Image.Image, form: str, **settings: Any) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image.save(file, form, **settings)
    return file.getvalue()


def modes_and_formats(draw: random.Random, _: bytes) -> bytes:
    """A whole image in any mode, in any format that has it."""
    for _attempt in range(30):
        try:
            return _saved(_pixels(draw, draw.choice(_MODES)), draw.choice(_FORMATS))
        except (OSError, KeyError, ValueError, AttributeError, TypeError, struct.error):
            continue  # a format that has no such mode, or that is not there
    return _saved(_pixels(draw), "PNG")


def odd_sizes(draw: random.Random, _: bytes) -> bytes:
    """A whole image with a side of one pixel, or a very long one."""
    size = draw.choice(_SIZES)
    return _saved(_pixels(draw, draw.choice(("L", "RGB", "1")), size), draw.choice(("PNG", "BMP", "PPM", "TIFF")))


def settings(draw: random.Random, _: bytes) -> bytes:
    """What cameras and programs add: orientation, profiles, interlacing, several frames, transparency."""
    image = _pixels(draw)
    exif = Image.Exif()
    exif[0x0112] = draw.choice((*range(1, 9), 99))
    frames = [_pixels(draw) for _ in range(3)]
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * draw.choice((10, 100_000, 5_000_000)), zip=True)
    return draw.choice((
        lambda: _saved(image, "JPEG", exif=exif), lambda: _saved(image, "PNG", exif=exif),
        lambda: _saved(image, "JPEG", exif=draw.randbytes(200)), lambda: _saved(image, "JPEG", icc_profile=profile),
        lambda: _saved(image, "PNG", icc_profile=draw.randbytes(500)), lambda: _saved(image, "PNG", pnginfo=text),
        lambda: _saved(image, "JPEG", progressive=True), lambda: _saved(image.convert("CMYK"), "JPEG"),
        lambda: _saved(image.convert("L"), "JPEG"), lambda: _saved(image, "JPEG", quality=1, subsampling=2),
        lambda: _saved(image, "GIF", save_all=True, append_images=frames),
        lambda: _saved(image, "PNG", save_all=True, append_images=frames),
        lambda: _saved(image, "WEBP", save_all=True, append_images=frames, lossless=True),
        lambda: _saved(image, "TIFF", save_all=True, append_images=frames, compression="tiff_lzw"),
        lambda: _saved(image.convert("P"), "PNG", transparency=3),
        lambda: _saved(image, "PNG", transparency=(1, 2, 3)), lambda: _saved(image.convert("P"), "PNG", bits=4),
    ))()  # fmt: skip


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(width: int, height: int, bits: int, color: int, content: bytes, interlaced: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", content) + _chunk(b"IEND", b"")


def huge(draw: random.Random, _: bytes) -> bytes:
    """A small file that says, or really is, an image of millions of pixels: a bomb."""
    little = zlib.compress(bytes(100))
    side = draw.choice((2**31 - 1, 2**31, 2**32 - 1, 10**5, 20_000, 13_378))
    return draw.choice((
        lambda: _png(side, side, 8, 2, little), lambda: _png(side, 1, 8, 2, little), lambda: _png(0, 5, 8, 2, little),
        lambda: _png(5, 0, 8, 2, little), lambda: _png(0, 0, 8, 0, little), lambda: _png(5, 5, 3, 7, little),
        lambda: _png(side, 2, 16, 6, little, 1), lambda: _png(100, 100, 8, 2, zlib.compress(bytes(50_000_000))),
        lambda: _png(3000, 3000, 8, 6, zlib.compress(bytes(3000 * 12_001))),
        lambda: b"P6\n%d %d\n255\n" % (side, side) + bytes(100), lambda: b"P5\n0 0\n255\n",
        lambda: b"P6\n4 4\n999999\n",
        lambda: b"P6\n" + b"#" * 200_000 + b"\n4 4\n255\n", lambda: b"P4\n13000 13000\n" + bytes(100),
        lambda: b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0" + b"\xff" * 5,
        lambda: b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, side % 2**31, -(2**31), 1, 24, *[0] * 6),
        lambda: b"II*\0" + struct.pack("<I", 8) + b"\xff\xff" + bytes(50), lambda: b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
        lambda: b"RIFF\xff\xff\xff\xffWEBPVP8X\x0a\0\0\0\x10\0\0\0" + b"\xff" * 6,
    ))()  # fmt: skip


def largest(_: random.Random, _whole: bytes) -> bytes:
    """A whole image of as many pixels as Pillow takes, in the mode that needs the most memory."""
    width, height = 13_378, 13_376
    row = bytes(1 + 4 * width)
    packer = zlib.compressobj(1)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return _png(width, height, 8, 6, packed)


def no_image(draw: random.Random, _: bytes) -> bytes:
    """Something else that is called .png."""
    return draw.choice((
        b"", b"\0", b"text\n", b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        b"%PDF-1.4\n%\xe2\xe3",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{} loop\n", b"\x7fELF" + bytes(60),
        b"PK\x03\x04" + bytes(60),
        b"<html></html>", b"\xff\xd8\xff\xe0", b"\xff\xd8\xff\xd9", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"BM",
        b"RIFF\0\0\0\0WEBP",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 999999 999999\n%%EOF\n", draw.randbytes(5000),
        b"\0\0\x01\0\xff\xff",
    ))  # fmt: skip


IMAGES: dict[str, Mutate] = {
    "mode and format": modes_and_formats,
    "odd size": odd_sizes,
    "settings": settings,
    "bomb": huge,
    "no image": no_image,
    **BYTES,
}
