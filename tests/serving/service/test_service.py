"""A family that is served: answers, engines in processes that die, and what happens to its files meanwhile."""

from __future__ import annotations

import io
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tocom
from tests.waiting import SAFETY_S
from tocom.runtime.errors import InputError
from tocom.runtime.manifest import Family
from tocom.serving.service.engine_process import EngineProcess
from tocom.serving.service.errors import EngineFailedError, WorkerDiedError
from tocom.serving.service.options import Limits, ServeOptions
from tocom.serving.service.request import Answer, DegreeRequest
from tocom.serving.service.service import Service

pytestmark = pytest.mark.timing

LIMITS = Limits(max_batch=8, max_queued=64)
Serve = Callable[..., Service]


@pytest.fixture
def folder(tiny_family: Path, tmp_path: Path) -> Path:
    """A copy of the tiny family that may be damaged."""
    return shutil.copytree(tiny_family, tmp_path / "family")


@pytest.fixture
def serve(folder: Path) -> Iterator[Serve]:
    made: list[Service] = []

    def build(**options: object) -> Service:
        made.append(Service(folder, ServeOptions(**{"workers": 0, "threads": 1, "limits": LIMITS, **options})))
        return made[-1]

    yield build
    for service in made:
        service.close()


@pytest.fixture
def pixels(noise: Callable[..., np.ndarray]) -> np.ndarray:
    return noise(6, 64, 64)


def expected(folder: Path, pixel_values: np.ndarray, degree: int) -> np.ndarray:
    with tocom.load(folder, threads=1) as family:
        return family.infer(pixel_values, degree)


def changed(folder: Path) -> None:
    """Another family of the same network: degree 16 is what 8 was."""
    family = Family.read(folder)
    other = family.entry(8)
    replace(family, engines=(family.entry(0), replace(other, degree=12))).write(folder)


@pytest.mark.parametrize("workers", [0, 1])
def test_answers_are_the_engines_own(serve: Serve, folder: Path, pixels: np.ndarray, workers: int) -> None:
    service = serve(workers=workers)
    for degree in (0, 8, 16):
        answer = service.submit(pixels, DegreeRequest(degree=degree)).result(SAFETY_S)
        assert answer.degree == degree
        assert np.allclose(answer.logits, expected(folder, pixels, degree), rtol=0, atol=1e-5)
        assert answer.queue_ms >= 0 and answer.engine_ms > 0
    assert service.submit(pixels).result(SAFETY_S).degree == 0


@pytest.mark.parametrize(
    ("pixel_values", "says"),
    [
        (np.zeros((1, 3, 64, 64)), "float64"),
        (np.zeros((1, 3, 64, 63), np.float32), r"\[1, 3, 64, 63\]"),
        (np.zeros((0, 3, 64, 64), np.float32), "1 to 64 images, got 0"),
        (np.zeros((65, 3, 64, 64), np.float32), "1 to 64 images, got 65"),
        (np.full((1, 3, 64, 64), np.nan, np.float32), "finite"),
    ],
)
def test_what_does_not_fit(serve: Serve, pixel_values: np.ndarray, says: str) -> None:
    with pytest.raises(InputError, match=says):
        serve().submit(pixel_values)


def test_images_are_bounded(serve: Serve) -> None:
    service = serve(max_pixels=10_000)
    content = io.BytesIO()
    Image.new("1", (3000, 3000)).save(content, "PNG")  # a few bytes that would become millions
    assert len(content.getvalue()) < 5000
    with pytest.raises(InputError, match="10000 pixels at most, got 3000x3000"):
        service.prepare([content.getvalue()])
    for bad in (b"", b"text", content.getvalue()[:100], b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"):
        with pytest.raises(InputError, match="image"):
            service.prepare([bad])
    with pytest.raises(InputError, match="1 to 64 images, got 0"):
        service.prepare([])
    with pytest.raises(InputError, match="1 to 64 images, got 65"):
        service.prepare([b"never looked at"] * 65)
    fits = io.BytesIO()
    Image.new("1", (100, 100)).save(fits, "PNG")
    assert service.prepare([fits.getvalue()] * 4).shape == (4, 3, 64, 64)
    with pytest.raises(InputError, match="40000 pixels at most together"):
        service.prepare([fits.getvalue()] * 5)


def test_an_engine_process_that_dies_loses_nothing(serve: Serve, folder: Path, pixels: np.ndarray) -> None:
    service = serve(workers=1)
    wanted = {degree: expected(folder, pixels, degree) for degree in (0, 16)}

    def ask(number: int) -> Answer:
        return service.submit(pixels, DegreeRequest(degree=16 * (number % 2))).result(SAFETY_S)

    answers: list[Answer] = []
    with ThreadPoolExecutor(4) as pool:
        for death in (1, 2):  # the second only when what the first one hit is answered: a batch is tried twice
            asked = [pool.submit(ask, number) for number in range(20)]
            next(as_completed(asked, SAFETY_S))  # some are answered, others run or wait
            os.kill(service.worker_pids[0], signal.SIGKILL)
            answers += [future.result(SAFETY_S) for future in (*asked, pool.submit(ask, death))]
            assert service.restarts == death
    assert all(np.allclose(answer.logits, wanted[answer.degree], rtol=0, atol=1e-5) for answer in answers)


def test_an_engine_process_that_hangs_is_replaced(folder: Path, pixels: np.ndarray) -> None:
    engines = EngineProcess(folder, threads=1, timeout_s=5)
    try:
        wanted = engines.infer(pixels, 8)
        os.kill(engines.pid, signal.SIGSTOP)
        assert np.array_equal(engines.infer(pixels, 8), wanted)
        assert engines.restarts == 1
    finally:
        engines.close()
    with pytest.raises(WorkerDiedError, match="closed"):
        engines.infer(pixels, 8)


def test_an_engine_that_fails_is_no_fault_of_the_request(folder: Path) -> None:
    engines = EngineProcess(folder, threads=1)
    try:
        with pytest.raises(EngineFailedError, match="pixel_values"):
            engines.infer(np.zeros((1, 3, 8, 8), np.float32), 8)
    finally:
        engines.close()


def test_files_that_change_on_disk_do_not_matter(serve: Serve, folder: Path, pixels: np.ndarray) -> None:
    wanted = expected(folder, pixels, 8)
    service = serve(workers=1)
    for file in folder.iterdir():
        file.write_bytes(b"damaged")
    os.kill(service.worker_pids[0], signal.SIGKILL)  # what is started again reads its own copy
    assert np.allclose(
        service.submit(pixels, DegreeRequest(degree=8)).result(SAFETY_S).logits, wanted, rtol=0, atol=1e-5
    )
    with pytest.raises(InputError):
        service.reload()
    assert np.allclose(
        service.submit(pixels, DegreeRequest(degree=8)).result(SAFETY_S).logits, wanted, rtol=0, atol=1e-5
    )


def test_a_reload_takes_over_while_requests_run(serve: Serve, folder: Path, pixels: np.ndarray) -> None:
    service = serve()
    assert service.reload() is False
    changed(folder)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(lambda: service.submit(pixels).result(SAFETY_S).degree) for _ in range(50)]
        assert service.reload() is True
        futures += [pool.submit(lambda: service.submit(pixels).result(SAFETY_S).degree) for _ in range(50)]
        assert {future.result(SAFETY_S) for future in futures} == {0}
    assert service.submit(pixels, DegreeRequest(degree=12)).result(SAFETY_S).degree == 12
    with pytest.raises(InputError, match="0, 12"):
        service.submit(pixels, DegreeRequest(degree=16))


def test_a_reload_of_what_cannot_be_served_leaves_the_old_one(serve: Serve, folder: Path, pixels: np.ndarray) -> None:
    service, original = serve(), Family.read(folder)
    replace(original, classes=9, class_names=None).write(folder)
    with pytest.raises(InputError, match="classes must stay"):
        service.reload()
    changed_file = folder / original.entry(16).engine
    changed(folder)
    (folder / original.entry(8).engine).write_bytes(changed_file.read_bytes()[:1000])
    with pytest.raises(InputError):
        service.reload()
    (folder / "family.json").unlink()
    with pytest.raises(InputError, match=r"family\.json"):
        service.reload()
    assert service.submit(pixels, DegreeRequest(degree=16)).result(SAFETY_S).degree == 16


def test_nothing_is_left_behind(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    service = serve(workers=1)
    changed(folder)
    service.reload()
    assert len(list((tmp_path / "tmp").iterdir())) == 1
    service.close()
    assert not list((tmp_path / "tmp").iterdir())
    (folder / Family.read(folder).entry(0).engine).write_bytes(b"")
    with pytest.raises(InputError):
        Service(folder, ServeOptions(workers=0))
    assert not list((tmp_path / "tmp").iterdir())


def test_describe_tells_the_state(serve: Serve) -> None:
    told = serve(objective_ms=50.0, degree=8).describe()
    assert [each["degree"] for each in told["degrees"]] == [0, 8, 16]
    assert told["adaptive"] == {"enabled": True, "objective_ms": 50.0, "degree": 8, "queued": 0}


@pytest.mark.parametrize(
    "options", [{"objective_ms": 0}, {"objective_ms": float("inf")}, {"workers": -1}, {"max_pixels": 0}]
)
def test_options_that_make_no_sense(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match="must be"):
        ServeOptions(**options)


def test_where_a_server_begins_and_how_far_it_goes(serve: Serve) -> None:
    assert serve(budget_ms=3.5).degree == 8
    accurate = serve(objective_ms=1000.0, min_accuracy=0.88)
    assert accurate._generation.scheduler._policy.degrees == (0, 8)
    for options in ({"budget_ms": 1}, {"min_accuracy": 0.95}, {"degree": 16, "min_accuracy": 0.88},
                    {"degree": 8, "budget_ms": 5.0}):  # fmt: skip
        with pytest.raises(InputError):
            serve(**options)


def test_a_degree_that_the_family_does_not_have(serve: Serve) -> None:
    with pytest.raises(InputError, match="0, 8, 16"):
        serve(degree=4)
