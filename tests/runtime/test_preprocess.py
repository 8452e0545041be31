"""Tests runtime/preprocess.py against timm's own transform, and its refusals of files that are no images."""

import itertools
import os
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform

from tocom.runtime.errors import InputError
from tocom.runtime.manifest import CROP_MODES, INTERPOLATIONS, InputSpec
from tocom.runtime.preprocess import find_images, load_image, preprocess

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ATOL = 1e-6


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A random image; its values differ from pixel to pixel, so that a shift by one pixel shows."""
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, *channels), np.uint8)
    return Image.fromarray(pixels, mode)


def timms(image: Image.Image, spec: InputSpec) -> np.ndarray:
    transform = create_transform(
        input_size=spec.size,
        mean=spec.mean,
        std=spec.std,
        interpolation=spec.interpolation,
        crop_pct=spec.crop_pct,
        crop_mode=spec.crop_mode,
    )
    return transform(image.convert("RGB")).numpy()


def assert_equals_timm(image: Image.Image, spec: InputSpec) -> None:
    ours, theirs = preprocess(image, spec), timms(image, spec)
    assert ours.dtype == np.float32 and ours.flags.c_contiguous and ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=ATOL, err_msg=f"{image.size} {spec}")


@pytest.mark.parametrize("crop_mode", CROP_MODES)
@pytest.mark.parametrize("size", [(3, 24, 24), (3, 24, 17), (3, 15, 32)])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0, 1.15])
def test_equals_timm_for_all_geometries(crop_mode, size, crop_pct):
    spec = InputSpec(size, MEAN, STD, "bicubic", crop_pct, crop_mode)
    for width, height in itertools.product((7, 16, 25, 31, 64), repeat=2):
        assert_equals_timm(noise(width, height), spec)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_equals_timm_for_all_interpolations(interpolation):
    spec = InputSpec((3, 32, 32), MEAN, STD, interpolation, 0.9, "center")
    for size in ((41, 57), (57, 41), (20, 33)):
        assert_equals_timm(noise(*size), spec)


def test_equals_timm_at_full_size():
    for crop_pct, size in ((0.9, (500, 375)), (0.875, (375, 500)), (0.95, (224, 224))):
        assert_equals_timm(noise(*size), InputSpec((3, 224, 224), MEAN, STD, "bicubic", crop_pct, "center"))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    width=st.integers(2, 90),
    height=st.integers(2, 90),
    target=st.tuples(st.integers(2, 40), st.integers(2, 40)),
    square=st.booleans(),
    crop_pct=st.floats(0.5, 1.3),
    crop_mode=st.sampled_from(CROP_MODES),
)
def test_equals_timm_for_any_size(width, height, target, square, crop_pct, crop_mode):
    size = (3, target[0], target[0] if square else target[1])
    spec = InputSpec(size, MEAN, STD, "bilinear", crop_pct, crop_mode)
    try:
        preprocess(noise(width, height), spec)
    except InputError:
        with pytest.raises(ValueError):  # what has no pixels after the resize fails in timm too
            timms(noise(width, height), spec)
    else:
        assert_equals_timm(noise(width, height), spec)


def saved(image: Image.Image, file, **options):
    image.save(file, **options)
    return file


def odd_images(folder):
    """Files of the modes that photographs seldom have."""
    colour = noise(40, 30)
    grey16 = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees", which timm does not do
    return [
        saved(noise(40, 30, "L"), folder / "grey.png"),
        saved(noise(40, 30, "RGBA"), folder / "alpha.png"),
        saved(colour.quantize(17), folder / "palette.png"),
        saved(colour.quantize(17), folder / "transparent_palette.png", transparency=bytes(range(17))),
        saved(colour.convert("1"), folder / "bits.png"),
        saved(grey16, folder / "grey16.png"),
        saved(colour.convert("CMYK"), folder / "cmyk.jpg"),
        saved(colour, folder / "turned.jpg", exif=exif),
    ]


@pytest.mark.filterwarnings("ignore:Palette images")  # Pillow's advice; load_image keeps it to itself
def test_equals_timm_for_odd_modes(tmp_path):
    spec = InputSpec((3, 24, 24), MEAN, STD, "bicubic", 0.9, "center")
    for file in odd_images(tmp_path):
        with Image.open(file) as image:
            expected = timms(image, spec)
            np.testing.assert_allclose(preprocess(image, spec), expected, rtol=0, atol=ATOL, err_msg=file.name)
        loaded = load_image(file)
        assert loaded.mode == "RGB" and loaded.size == (40, 30)
        np.testing.assert_allclose(preprocess(loaded, spec), expected, rtol=0, atol=ATOL, err_msg=file.name)


def test_the_tolerance_notices_the_smallest_mistakes():
    spec = InputSpec((3, 24, 24), MEAN, STD, "bicubic", 0.9, "center")
    one_grey_value = 1 / 255 / max(STD)
    assert one_grey_value / 1000 > ATOL
    shifted = noise(41, 30).transform((41, 30), Image.Transform.AFFINE, (1, 0, 1, 0, 1, 0))
    assert np.abs(preprocess(shifted, spec) - timms(noise(41, 30), spec)).max() > 0.1


def test_images_too_thin_to_resize_are_refused():
    cases = (((1, 40_000), "center"), ((40_000, 1), "center"), ((1, 5000), "border"), ((0, 5), "center"))
    for size, crop_mode in cases:
        spec = InputSpec((3, 224, 224), MEAN, STD, "bilinear", 0.9, crop_mode)
        with pytest.raises(InputError, match="this thin"):
            preprocess(Image.new("RGB", size), spec)


@pytest.mark.filterwarnings("error")
def test_what_is_not_an_image_is_refused_in_one_line(tmp_path):
    jpeg, png = (saved(noise(64, 64), tmp_path / name).read_bytes() for name in ("a.jpg", "a.png"))
    contents = {
        "empty": b"",
        "text": b"hello",
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "header.jpg": jpeg[:20],
        "truncated.png": png[: len(png) // 2],
        "broken.png": png[:40] + b"\0" * 8 + png[48:],
        "new\nline.png": b"hello",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe.png")
    for name in (*contents, "pipe.png", "missing.png", "", "x\0y"):
        with pytest.raises(InputError) as caught:
            load_image(tmp_path / name)
        assert str(caught.value).isprintable()


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    file = saved(Image.new("L", (60, 60)), tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match="bomb.png"):
        load_image(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)  # between once and twice the limit Pillow, and timm, only warn
    assert load_image(file).size == (60, 60)


def test_find_images_takes_files_as_given_and_folders_sorted(tmp_path):
    for name in ("b/2.png", "b/1.JPEG", "a/x.jpg", "a/notes.txt", "c.bmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_images([tmp_path]) == [tmp_path / "a/x.jpg", tmp_path / "b/1.JPEG", tmp_path / "b/2.png"]
    assert find_images([tmp_path / "c.bmp", str(tmp_path / "a")]) == [tmp_path / "c.bmp", tmp_path / "a/x.jpg"]


def test_find_images_follows_links_but_not_in_circles(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.png").touch()
    pathlib.Path(tmp_path / "folder/again").symlink_to(tmp_path / "folder")
    pathlib.Path(tmp_path / "folder/up").symlink_to(tmp_path)
    assert find_images([tmp_path / "folder"]) == [tmp_path / "folder/a.png"]
    (tmp_path / "other").mkdir()
    pathlib.Path(tmp_path / "other/linked").symlink_to(tmp_path / "folder")
    assert find_images([tmp_path / "other"])[0] == tmp_path / "other/linked/a.png"


def test_find_images_refuses_what_is_missing_or_empty(tmp_path):
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    refusals = {"missing.png": "there is no", "empty": "got none in", "pipe": "a file or a folder", "\0": "there is no"}
    for path, words in refusals.items():
        with pytest.raises(InputError, match=words):
            find_images([tmp_path / path])
