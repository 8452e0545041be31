"""`tocom serve`, as a process on loopback, asked over HTTP and gRPC by the clients of the protocol."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as over_grpc
import tritonclient.http as over_http
from tritonclient.utils import InferenceServerException

import tocom
from tests.ports import leased_ports
from tests.waiting import SAFETY_S, eventually
from tocom.runtime.manifest import Family

pytestmark = pytest.mark.timing


@dataclass
class Server:
    """A running `tocom serve`."""

    process: subprocess.Popen[str]
    port: int
    grpc_port: int
    folder: Path
    log: Path

    def ask(self, path: str, content: bytes | None = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", content, headers)
        try:
            with urllib.request.urlopen(request, timeout=SAFETY_S) as reply:
                return reply.status, {k.lower(): v for k, v in reply.headers.items()}, reply.read()
        except urllib.error.HTTPError as refused:
            with refused:
                return refused.code, {k.lower(): v for k, v in refused.headers.items()}, refused.read()

    def infer(self, request: object) -> tuple[int, dict[str, str], dict]:
        status, headers, content = self.ask(
            "/v2/models/tiny/infer", json.dumps(request).encode(), **{"Content-Type": "application/json"}
        )
        return status, headers, json.loads(content)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(SAFETY_S)


def _listens(server: Server) -> bool:
    """Waits until a server is ready; false where it ended, because another program was faster to take a port.

    Raises:
        AssertionError: It ended for another reason.
    """

    def is_ready() -> bool:
        with contextlib.suppress(OSError):
            return server.ask("/v2/health/ready")[0] == 200
        return False

    eventually(lambda: server.process.poll() is not None or is_ready(), "the server", every=0.05)
    if server.process.poll() is None:
        return True
    assert "cannot be listened on" in server.log.read_text() or "cannot listen" in server.log.read_text(), (
        server.log.read_text()
    )
    return False


@contextlib.contextmanager
def running(folder: Path, log: Path, *options: str) -> Iterator[Server]:
    for _ in range(5):
        with leased_ports(2) as (port, grpc_port), log.open("w") as file:
            command = [sys.executable, "-m", "tocom", "serve", str(folder), "--name", "tiny", "--port", str(port),
                       "--grpc-port", str(grpc_port), "--threads", "1", "--max-batch", "8", *options]  # fmt: skip
            process = subprocess.Popen(command, cwd=log.parent, stdout=file, stderr=subprocess.STDOUT, text=True)
            server = Server(process, port, grpc_port, folder, log)
            try:
                if _listens(server):
                    yield server
                    return
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait(SAFETY_S)
    pytest.fail(f"every port was taken: {log.read_text()}")


@pytest.fixture(scope="module")
def server(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    scratch = tmp_path_factory.mktemp("served")
    folder = shutil.copytree(tiny_family, scratch / "family")
    with running(folder, scratch / "log.txt", "--objective-ms", "60000") as started:
        yield started
        assert started.stop() == 0
        log = started.log.read_text()
        assert "Traceback" not in log, log


@pytest.fixture(scope="module")
def local(tiny_family: Path) -> Iterator[tocom.LoadedFamily]:
    with tocom.load(tiny_family, threads=1) as family:
        yield family


@pytest.fixture
def pixels(noise: Callable[..., np.ndarray]) -> np.ndarray:
    return noise(3, 64, 64)


def close(found: np.ndarray, wanted: np.ndarray) -> bool:
    """A batch may be cut otherwise than the local one, and rounds otherwise then."""
    return np.allclose(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("degree", [0, 8, 16])
def test_http_client(server: Server, local: tocom.LoadedFamily, pixels: np.ndarray, degree: int) -> None:
    with contextlib.closing(over_http.InferenceServerClient(f"127.0.0.1:{server.port}")) as client:
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("tiny")
        assert client.get_model_metadata("tiny")["inputs"][0]["shape"] == [-1, 3, 64, 64]
        given = over_http.InferInput("pixel_values", list(pixels.shape), "FP32")
        given.set_data_from_numpy(pixels, binary_data=False)
        wanted = over_http.InferRequestedOutput("logits", binary_data=False)
        answer = client.infer("tiny", [given], outputs=[wanted], parameters={"degree": degree})
    assert answer.get_response()["parameters"]["degree"] == degree
    assert close(answer.as_numpy("logits"), local.infer(pixels, degree))


@pytest.mark.parametrize("degree", [0, 8, 16])
def test_grpc_client(server: Server, local: tocom.LoadedFamily, pixels: np.ndarray, degree: int) -> None:
    with over_grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
        given = over_grpc.InferInput("pixel_values", list(pixels.shape), "FP32")
        given.set_data_from_numpy(pixels)
        answer = client.infer("tiny", [given], parameters={"degree": degree})
    assert answer.get_response().parameters["degree"].int64_param == degree
    assert close(answer.as_numpy("logits"), local.infer(pixels, degree))


def test_images_over_http_and_grpc(server: Server, local: tocom.LoadedFamily, picture: bytes, tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(picture)
    wanted = local.infer(local.prepare(tmp_path / "image.png"), 8)
    status, headers, answer = server.infer({
        "parameters": {"min_degree": 8, "max_degree": 9},
        "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"content_type": "base64"},
                    "data": [base64.b64encode(picture).decode()]}],
    })  # fmt: skip
    assert (status, headers["tocom-degree"], answer["parameters"]["degree"]) == (200, "8", 8)
    assert close(np.array(answer["outputs"][0]["data"], np.float32).reshape(1, -1), wanted)
    with over_grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
        given = over_grpc.InferInput("image", [1], "BYTES")
        given.set_data_from_numpy(np.array([picture], np.object_))
        assert close(client.infer("tiny", [given], parameters={"degree": 8}).as_numpy("logits"), wanted)
    status, headers, content = server.ask("/api/predict?degree=8&top_k=1", picture)
    assert (status, headers["tocom-degree"]) == (200, "8")
    assert json.loads(content)["predictions"][0]["class"] == int(wanted.argmax())


@pytest.mark.parametrize(
    ("request_", "status", "says"),
    [
        ({}, 400, "inputs"),
        ({"inputs": []}, 400, "one input"),
        ({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}]}, 400, "be named pixel_values"),
        ({"inputs": [{"name": "pixel_values", "datatype": "FP32", "shape": [1, 3, 8, 8], "data": []}]}, 400, "64, 64"),
        ({"inputs": [{"name": "pixel_values", "datatype": "what", "shape": [1], "data": []}]}, 400, "datatype"),
        ({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": ["?"]}]}, 400, "base64"),
        ({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": ["AAAA"]}]}, 400, "be decoded"),
        ({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": ["AAAA"]}],
          "parameters": {"degree": -1}}, 400, "whole number"),
        ([1], 400, "body"),
    ],
)  # fmt: skip
def test_bad_requests(server: Server, request_: object, status: int, says: str) -> None:
    found, _, answer = server.infer(request_)
    assert found == status
    assert says in answer["error"] and "\n" not in answer["error"]


def test_bad_requests_over_grpc(server: Server, pixels: np.ndarray) -> None:
    with over_grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
        given = over_grpc.InferInput("pixel_values", [1, 3, 8, 8], "FP32")
        given.set_data_from_numpy(pixels[:1, :, :8, :8].copy())
        with pytest.raises(InferenceServerException, match="64, 64") as refused:
            client.infer("tiny", [given])
        assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"
        with pytest.raises(InferenceServerException, match="ends|serves one family"):
            client.unload_model("tiny")
        with pytest.raises(InferenceServerException, match="no model other"):
            client.load_model("other")


def test_bounds(server: Server) -> None:
    assert server.ask("/v2/models/tiny/infer", b"x" * (17 << 20))[0] == 413
    assert server.ask("/v2/models/tiny/infer", b"x", **{"Content-Encoding": "gzip"})[0] == 415
    as_json = {"Content-Type": "application/json"}
    assert server.ask("/v2/models/other/infer", b'{"inputs": []}', **as_json)[0] == 404
    assert server.ask("/v2/models/tiny/infer", b'{"inputs": ' + b"[" * 100_000, **as_json)[0] == 400
    for stream in ("infer_stream", "generate_stream"):
        assert server.ask(f"/v2/models/tiny/{stream}", b'{"inputs": []}', **as_json)[0] == 404


def test_metrics_count(server: Server, picture: bytes) -> None:
    def value(name: str) -> float:
        lines = server.ask("/metrics")[2].decode().splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(name)), 0.0)

    before = value('tocom_requests_total{degree="16"}')
    for _ in range(3):
        server.ask("/api/predict?degree=16", picture)
    assert value('tocom_requests_total{degree="16"}') == before + 3
    assert value("tocom_degree ") == 0
    refused = value('tocom_refused_total{reason="bad input"}')
    server.infer({"inputs": []})
    assert value('tocom_refused_total{reason="bad input"}') == refused + 1


def test_the_page_is_there(server: Server) -> None:
    status, headers, content = server.ask("/")
    assert status == 200 and "text/html" in headers["content-type"] and b"<html" in content


def test_reload_on_request(tiny_family: Path, tmp_path: Path, picture: bytes) -> None:
    folder = shutil.copytree(tiny_family, tmp_path / "family")
    with running(folder, tmp_path / "log.txt", "--workers", "0") as server:
        family = Family.read(folder)
        broken = folder / family.entry(8).engine
        whole = broken.read_bytes()
        replace(family, engines=(family.entry(0), replace(family.entry(8), degree=12))).write(folder)
        broken.write_bytes(whole[:-10])
        status, _, content = server.ask("/v2/repository/models/tiny/load", b"{}")
        assert status == 409 and "the old one goes on" in json.loads(content)["error"]
        assert server.ask("/api/predict?degree=16", picture)[0] == 200
        broken.write_bytes(whole)
        assert server.ask("/v2/repository/models/tiny/load", b"{}")[0] == 200
        assert server.ask("/api/predict?degree=16", picture)[0] == 400
        assert server.ask("/api/predict?degree=12", picture)[0] == 200
        assert server.stop() == 0
    assert "Traceback" not in (tmp_path / "log.txt").read_text()


def test_ending_answers_what_was_accepted(tiny_family: Path, tmp_path: Path, pixels: np.ndarray) -> None:
    big = np.concatenate([pixels] * 20)
    with (
        running(tiny_family, tmp_path / "log.txt") as server,
        over_grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client,
        ThreadPoolExecutor(8) as pool,
    ):
        given = over_grpc.InferInput("pixel_values", list(big.shape), "FP32")
        given.set_data_from_numpy(big)
        wanted = client.infer("tiny", [given]).as_numpy("logits")
        futures = [pool.submit(client.infer, "tiny", [given]) for _ in range(4)]
        while b"tocom_queued_images 0" in server.ask("/metrics")[2]:
            if all(future.done() for future in futures):
                break
        assert server.stop() == 0
        for future in futures:  # what was not accepted any more is told so
            with contextlib.suppress(InferenceServerException):
                assert close(future.result(SAFETY_S).as_numpy("logits"), wanted)
        assert sum(future.exception() is None for future in futures) >= 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["missing"], "there is no family.json"),
        (["FAMILY", "--name", "a/b"], "model's name"),
        (["FAMILY", "--port", "8080", "--grpc-port", "8080"], "must differ"),
        (["FAMILY", "--objective-ms", "0"], "objective_ms"),
        (["FAMILY", "--degree", "3"], "0, 8, 16"),
        (["FAMILY", "--port", "TAKEN", "--workers", "0"], "cannot be listened on"),
        (["FAMILY", "--grpc-port", "TAKEN", "--workers", "0"], "cannot be listened on"),
    ],
)
def test_bad_usage_is_one_line(tiny_family: Path, options: list[str], says: str) -> None:
    with contextlib.closing(socket.socket()) as taken, contextlib.ExitStack() as held:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        places = {"FAMILY": str(tiny_family), "TAKEN": str(taken.getsockname()[1])}
        given = [places.get(option, option) for option in options]
        ports = held.enter_context(leased_ports(2))
        for name, port in zip(("--port", "--grpc-port"), ports, strict=True):
            given += [] if name in given else [name, str(port)]
        command = [sys.executable, "-m", "tocom", "serve", *given]
        done = subprocess.run(
            command, cwd=tiny_family.parent, capture_output=True, text=True, timeout=SAFETY_S, check=False
        )
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert says in lines[-1] and len(lines) == 1, done.stderr


def test_a_server_that_is_still_opening_engines_can_be_ended(tiny_family: Path, tmp_path: Path) -> None:
    with leased_ports(2) as (port, grpc_port):
        command = [sys.executable, "-m", "tocom", "serve", str(tiny_family), "--port", str(port), "--grpc-port",
                   str(grpc_port)]  # fmt: skip
        environment = os.environ | {"TMPDIR": str(tmp_path)}
        with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
            eventually(lambda: list(tmp_path.glob("tocom-scratch-*")) or process.poll() is not None, "its own folder")
            process.terminate()
            assert process.wait(SAFETY_S) == 0, process.stderr.read()
    assert not list(tmp_path.glob("tocom-*"))


def test_the_worker_can_be_killed(server: Server, picture: bytes) -> None:
    children = subprocess.run(["pgrep", "-P", str(server.process.pid)], capture_output=True, text=True, check=True)
    workers = [pid for pid in map(int, children.stdout.split()) if _is_engine(pid)]
    assert workers
    os.kill(workers[-1], signal.SIGKILL)
    assert server.ask("/api/predict?degree=8", picture)[0] == 200


def _is_engine(pid: int) -> bool:
    return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
