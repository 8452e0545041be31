"""A repository of the example's family, served by a real Triton: what clients get is what the engines here answer."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from PIL import Image
from tritonclient.utils import InferenceServerException

from tests.waiting import SAFETY_S, eventually
from tocom.export.cli.export_triton import _inlined
from tocom.runtime.engines.base import open_engine
from tocom.runtime.manifest import Family
from tocom.runtime.preprocess import preprocess
from tocom.serving.triton.config import TritonOptions
from tocom.serving.triton.repository import RepositoryOptions, write_repository

pytestmark = pytest.mark.timing

DEGREES = (0, 8, 16)
PROTOCOLS = (tritonclient.http, tritonclient.grpc)


@pytest.fixture(scope="module")
def server(families: dict[str, Path], triton: Callable, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """Three repositories: the family, one engine of another library, and one whose queue holds two requests."""
    folder = tmp_path_factory.mktemp("triton")
    running = TritonOptions(max_batch=16, queue_delay_us=50_000)
    written = {
        "digits": (families["digits"], RepositoryOptions(preprocess="ensemble", running=running)),
        "vino": (families["vino"], RepositoryOptions(preprocess="ensemble")),
        "tight": (
            families["digits"],
            RepositoryOptions((16,), "tight", running=TritonOptions(max_queue=2, queue_delay_us=300_000)),
        ),
    }
    for name, (engines, options) in written.items():
        write_repository(engines, folder / name, options, _inlined)
    with triton(folder, [folder / name for name in written]) as running_server:
        yield running_server


def connect(server, protocol: ModuleType):
    return protocol.InferenceServerClient(server.http if protocol is tritonclient.http else server.grpc)


def tensor(protocol: ModuleType, name: str, array: np.ndarray, kind: str | None = None):
    given = protocol.InferInput(name, array.shape, kind or ("BYTES" if array.dtype == object else "FP32"))
    given.set_data_from_numpy(array)
    return given


def ask(server, protocol: ModuleType, model: str, name: str, array: np.ndarray) -> np.ndarray:
    with connect(server, protocol) as client:
        return client.infer(model, [tensor(protocol, name, array)]).as_numpy("logits")


def local(folder: Path, degree: int, pixels: np.ndarray) -> np.ndarray:
    entry = Family.read(folder).entry(degree)
    with open_engine(folder / entry.engine, entry.backend, precision=entry.precision, threads=1) as engine:
        return engine.infer(pixels)


def encoded(count: int, size: tuple[int, int] = (47, 39)) -> tuple[list[Image.Image], np.ndarray]:
    """Images, and the same as PNG."""
    draw = np.random.default_rng(count)
    images = [Image.fromarray(draw.integers(0, 256, (*size, 3), np.uint8)) for _ in range(count)]
    contents = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "PNG")
        contents.append(file.getvalue())
    return images, np.array(contents, dtype=object)


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=("http", "grpc"))
@pytest.mark.parametrize("degree", DEGREES)
def test_logits_are_the_local_engines(server, families, noise, protocol: ModuleType, degree: int) -> None:
    pixels = noise(3, 32, 32, seed=degree)
    found = ask(server, protocol, f"digits_r{degree:02d}", "pixel_values", pixels)
    assert np.array_equal(found, local(families["digits"], degree, pixels))


@pytest.mark.parametrize("batch", [1, 5])
def test_an_openvino_engine_merges_by_its_function_body(server, families, noise, batch: int) -> None:
    pixels = noise(batch, 32, 32, seed=batch)
    found = ask(server, tritonclient.grpc, "vino_r08", "pixel_values", pixels)
    expected = local(families["vino"], 8, pixels)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=("http", "grpc"))
@pytest.mark.parametrize("model", ["digits_r00", "digits_r08", "digits_r16", "vino_r08"])
def test_an_ensemble_prepares_images_as_the_client_would(server, families, protocol: ModuleType, model: str) -> None:
    name, degree = model.split("_r")
    images, contents = encoded(3)
    spec = Family.read(families[name]).input
    expected = local(families[name], int(degree), np.stack([preprocess(image, spec) for image in images]))
    found = ask(server, protocol, f"{model}_image", "image", contents)
    assert np.abs(found - expected).max() <= (1e-5 * np.abs(expected).max() if name == "vino" else 0)


def test_classes_have_their_names(server) -> None:
    _, contents = encoded(2)
    with connect(server, tritonclient.grpc) as client:
        wanted = [tritonclient.grpc.InferRequestedOutput("logits", class_count=1)]
        given = [tensor(tritonclient.grpc, "image", contents)]
        rows = client.infer("digits_r08_image", given, outputs=wanted).as_numpy("logits")
    for row in np.ravel(rows):
        _, index, label = row.decode().split(":")
        assert label == index  # the names of the example's classes are their digits


def test_the_server_says_which_engine_it_runs(server, families) -> None:
    entry = Family.read(families["digits"]).entry(8)
    with connect(server, tritonclient.grpc) as client:
        told = client.get_model_config("digits_r08").config
    assert told.parameters["degree"].string_value == "8"
    assert told.parameters["engine_sha256"].string_value == entry.sha256[entry.engine]


def test_models_are_warm_before_the_first_request(server) -> None:
    before, ready, _ = server.log.read_text().partition("Started HTTPService")
    assert ready
    for model in ("digits_r00", "digits_r08", "digits_r16"):
        assert f"{model} runs 1 images" in before and f"{model} runs 8 images" in before


def test_concurrent_requests_share_calls(server, families, noise) -> None:
    pixels = noise(32, 32, 32, seed=32)
    expected = local(families["digits"], 8, pixels)
    with connect(server, tritonclient.grpc) as client:
        before = statistics(client, "digits_r08")
        burst = Burst(server, client, "digits_r08")
        with server.held_up("digits_r08"):
            for index in range(32):
                burst.send(pixels[index : index + 1])
            eventually(burst.has_come, "the last request")
        found = [burst.answer(index) for index in range(32)]
        # an answer may be there before it is counted
        eventually(lambda: statistics(client, "digits_r08").inference_count == before.inference_count + 32, "the count")
        after = statistics(client, "digits_r08")
    worst = max(np.abs(row - expected[index : index + 1]).max() for index, row in enumerate(found))
    assert worst <= 1e-5 * np.abs(expected).max()  # each its own answer
    assert after.execution_count - before.execution_count <= 16
    assert max(each.batch_size for each in after.batch_stats) > 3


def test_a_full_queue_is_refused(server, noise) -> None:
    """What waits is bounded however fast requests come: while the model is held up none leaves the queue."""
    given = tensor(tritonclient.http, "pixel_values", noise(1, 32, 32))
    with connect(server, tritonclient.grpc) as client, connect(server, tritonclient.http) as http:
        burst = Burst(server, client, "tight_r16")
        with server.held_up("tight_r16"):
            while not burst.errors:
                assert burst.send(noise(1, 32, 32)) < 100, "nothing is refused"
                eventually(lambda: burst.errors or burst.has_come(), "a request")
            with pytest.raises(InferenceServerException) as refused:
                http.infer("tight_r16", [given])
            assert refused.value.status() == "503"
        assert all("Exceeds maximum queue size" in str(error) for error in burst.errors.values())
        accepted = [index for index in range(burst.sent) if index not in burst.errors]
        assert accepted and all(burst.answer(index).shape == (1, 10) for index in accepted)
        assert http.infer("tight_r16", [given]).as_numpy("logits").shape == (1, 10)


def statistics(client, model: str):
    return client.get_inference_statistics(model).model_stats[0]


class Burst:
    """Requests of one image each, for a model that nobody else asks, sent without waiting for their answers."""

    def __init__(self, server, client, model: str) -> None:
        self._server, self._client, self._model = server, client, model
        self._before, self.sent = server.begun(model), 0
        self.found: dict[int, np.ndarray] = {}
        self.errors: dict[int, InferenceServerException] = {}

    def send(self, pixels: np.ndarray) -> int:
        """Sends a request; returns its number."""
        number, self.sent = self.sent, self.sent + 1
        given = [tensor(tritonclient.grpc, "pixel_values", pixels)]
        self._client.async_infer(self._model, given, lambda result, error: self._keep(number, result, error))
        return number

    def has_come(self) -> bool:
        """Whether all that was sent waits in the server or is in calls that have begun."""
        return self._server.waiting(self._model) + self._server.begun(self._model) - self._before == self.sent

    def _keep(self, number: int, result, error) -> None:
        if error is None:
            self.found[number] = result.as_numpy("logits")
        else:
            self.errors[number] = error

    def answer(self, number: int) -> np.ndarray:
        eventually(lambda: number in self.found or number in self.errors, f"the answer to request {number}")
        assert number not in self.errors, self.errors[number]
        return self.found[number]


def test_what_does_not_fit_is_refused(server, noise) -> None:
    def refused(model: str, name: str, array: np.ndarray, kind: str | None, words: str) -> None:
        for protocol in PROTOCOLS:
            with connect(server, protocol) as client, pytest.raises(InferenceServerException) as error:
                client.infer(model, [tensor(protocol, name, array, kind)])
            assert words in str(error.value), error.value
            status = error.value.status()  # of who is to blame: not the server
            assert status in ("400", "404", "StatusCode.INVALID_ARGUMENT", "StatusCode.NOT_FOUND"), status

    fine = noise(1, 32, 32)
    refused("digits_r08", "pixel_values", noise(1, 32, 31), None, "unexpected shape")
    refused("digits_r08", "pixel_values", noise(17, 32, 32), None, "batch-size must be <= 16")
    refused("digits_r08", "pixel_values", fine.astype(np.float64), "FP64", "data-type is 'FP64'")
    refused("digits_r08", "image", fine, None, "unexpected inference input 'image'")
    refused("digits_r09", "pixel_values", fine, None, "unknown model")
    refused("vino_r08", "pixel_values", noise(1, 31, 32), None, "unexpected shape")
    _, contents = encoded(2)
    broken = np.array([contents[0], contents[1][:200]], dtype=object)
    refused("digits_r08_image", "image", broken, None, "the image cannot be decoded")
    refused("digits_r08_image", "image", np.array([b""], dtype=object), None, "the image cannot be decoded")
    refused("digits_r08_image", "image", encoded(17)[1], None, "image must hold 1 to 16 images, got 17")
    bomb = np.array([_huge()], dtype=object)
    refused("digits_r08_image", "image", bomb, None, "40000000 pixels at most")
    # and the model still answers
    assert ask(server, tritonclient.http, "digits_r08_image", "image", contents).shape == (2, 10)


def _huge() -> bytes:
    file = io.BytesIO()
    Image.new("1", (8000, 6000)).save(file, "PNG")
    return file.getvalue()


def test_a_stopped_server_has_answered_what_it_took(families, triton, noise, tmp_path) -> None:
    """It ends while a call runs and others wait: these are answered, what comes later is refused."""
    write_repository(families["digits"], tmp_path / "one", RepositoryOptions((0,), "one"), _inlined)
    pixels = noise(20, 32, 32)
    expected = local(families["digits"], 0, pixels)
    with triton(tmp_path, [tmp_path / "one"]) as server, connect(server, tritonclient.grpc) as client:
        burst = Burst(server, client, "one_r00")
        with server.held_up("one_r00"):
            for index in range(20):
                burst.send(pixels[index : index + 1])
            eventually(burst.has_come, "the last request")
            server.process.terminate()
            eventually(lambda: "Waiting for in-flight requests" in server.log.read_text(), "the beginning of the end")
            with pytest.raises(InferenceServerException) as refused:
                client.infer("one_r00", [tensor(tritonclient.grpc, "pixel_values", pixels[:1])])
        assert refused.value.status() == "StatusCode.UNAVAILABLE"
        found = np.concatenate([burst.answer(index) for index in range(20)])
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
        assert server.process.wait(SAFETY_S) == 0
    assert not list(Path("/dev/shm").glob(f"{server.shared}*"))
