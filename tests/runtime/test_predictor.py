"""The Python API: images in, classes out."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tocom
from tocom.runtime.degrees.local_latency import this_machine
from tocom.runtime.engines.base import open_engine
from tocom.runtime.errors import GateError, InputError
from tocom.runtime.files import sha256_file
from tocom.runtime.manifest import Family
from tocom.runtime.predictor import LoadedFamily


@pytest.fixture
def family(family_folder: Path) -> LoadedFamily:
    """Degrees 2 and 8, with times as if they had been measured here: 8 is faster and less accurate."""
    family = Family.read(family_folder)
    slow, fast = family.engines
    times = {str(batch): {"p50": 4.0 * batch, "p99": 5.0 * batch} for batch in (1, 2)}
    halved = {batch: {"p50": each["p50"] / 2, "p99": each["p99"] / 2} for batch, each in times.items()}
    entries = (
        replace(slow, latency_ms=times, machine=this_machine(), accuracy={"top1": 0.9}),
        replace(fast, latency_ms=halved, machine=this_machine(), accuracy={"top1": 0.7}),
    )
    replace(family, engines=entries).write(family_folder)
    with tocom.load(family_folder) as loaded:
        yield loaded


def files(photos: Path) -> list[Path]:
    return sorted(photos.rglob("*.png"))


def test_files_arrays_and_pictures_are_the_same(family: LoadedFamily, photos: Path) -> None:
    paths = files(photos)
    pictures = [Image.open(path) for path in paths]
    arrays = [np.asarray(picture) for picture in pictures]
    expected = family.predict(paths)
    assert [one.names[0] for one in expected] == [path.parent.name for path in paths]
    for given in (list(map(str, paths)), pictures, arrays, np.stack(arrays), family.prepare(paths)):
        assert family.predict(given) == expected
    assert family.predict(paths[0]) == family.predict(arrays[0]) == expected[:1]
    assert family.predict([]) == []


def test_probabilities_are_the_softmax_of_the_engine(family: LoadedFamily, photos: Path) -> None:
    pixel_values = family.prepare(files(photos))
    with open_engine(family.folder / family.family.entry(8).engine, "onnxruntime") as engine:
        logits = engine.infer(pixel_values).astype(np.float64)
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for one, row in zip(family.predict(pixel_values, degree=8, top_k=3), softmax, strict=True):
        assert one.degree == 8
        assert one.probabilities == pytest.approx(sorted(row, reverse=True))
        assert row[list(one.classes)] == pytest.approx(one.probabilities)


def test_a_budget_and_an_accuracy_choose(family: LoadedFamily, photos: Path) -> None:
    image, two = files(photos)[0], files(photos)[:2]
    assert family.predict(image)[0].degree == 2  # the least compressed there is
    assert family.predict(image, budget_ms=4.1)[0].degree == 2
    assert family.predict(image, budget_ms=3.9)[0].degree == 8
    assert family.predict(two, budget_ms=3.9 * 2)[0].degree == 8  # at their batch size
    assert family.predict(image, min_accuracy=0.8)[0].degree == 2
    assert family.predict(image, min_accuracy=0.6)[0].degree == 8
    assert family.choose(budget_ms=100, batch=2) == 2
    with pytest.raises(GateError, match="2"):
        family.predict(image, budget_ms=0.1)
    with pytest.raises(GateError, match="9"):
        family.predict(image, min_accuracy=0.95)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"degree": 8, "budget_ms": 3}, "not both"),
        ({"degree": 7}, "2, 8"),
        ({"degree": 8, "cascade": True}, "chooses degrees itself"),
        ({"top_k": 0}, "top_k"),
        ({"cascade": True}, "cascade"),  # there is none in the folder
    ],
)
def test_what_contradicts_itself(family: LoadedFamily, photos: Path, asked: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        family.predict(files(photos)[0], **asked)


@pytest.mark.parametrize(
    "image",
    [7, None, np.zeros((8, 8), np.uint8), np.zeros((3, 8, 8), np.uint8), np.zeros((3, 9, 8), np.float32),
     np.zeros((8, 8, 3), np.float64), "missing.png"],
)  # fmt: skip
def test_what_is_no_image(family: LoadedFamily, image: object) -> None:
    with pytest.raises(InputError):
        family.predict([image])


@pytest.mark.timing
def test_many_threads_get_their_own_answers(family: LoadedFamily) -> None:
    draw = np.random.default_rng(0)
    batches = [draw.random((int(size), 3, 8, 8), np.float32) for size in draw.integers(1, 5, 64)]
    expected = [family.infer(batch, 8) for batch in batches]
    with tocom.load(family.folder) as fresh:  # engines are opened by the threads
        barrier = threading.Barrier(8)

        def run(worker: int) -> list[np.ndarray]:
            barrier.wait()
            return [fresh.infer(batch, 8) for batch in batches[worker::8]]

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(run, range(8)))
    for worker, rows in enumerate(found):
        for got, wanted in zip(rows, expected[worker::8], strict=True):
            assert np.array_equal(got, wanted)


def test_a_changed_file_is_refused(family_folder: Path) -> None:
    (family_folder / "r08/model.onnx").write_bytes(b"other")
    with pytest.raises(InputError, match="it has changed"):
        tocom.load(family_folder)


def test_a_closed_family_says_so(family: LoadedFamily, photos: Path) -> None:
    family.warm()
    family.close()
    family.close()
    with pytest.raises(InputError, match="closed"):
        family.predict(files(photos)[0])


def test_logits_that_are_not_finite(family_folder: Path, colour_graph: Callable[..., Path], photos: Path) -> None:
    colour_graph(family_folder / "r08/model.onnx", gain=float("nan"))
    family = Family.read(family_folder)
    entry = family.entry(8)
    replaced = replace(entry, sha256={entry.onnx: sha256_file(family_folder / entry.onnx)})
    family.with_entry(replaced).write(family_folder)
    with tocom.load(family_folder) as loaded, pytest.raises(InputError, match="compile degree 8 again"):
        loaded.predict(files(photos)[0], degree=8)


def test_the_package_loads_nothing_until_it_is_asked() -> None:
    code = "import sys, tocom; assert 'numpy' not in sys.modules; tocom.load; assert 'numpy' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(tocom.__file__).parents[1])
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = tocom.laod
