"""A family under Ray Serve: a real Ray on this machine, real replicas, requests over HTTP."""

from __future__ import annotations

import base64
import http.client
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tocom
from tests.ports import HOST, leased_ports
from tests.waiting import SAFETY_S, eventually
from tocom.runtime.manifest import Family
from tocom.serving.ray.local_cluster import local_ray, prepare_environment

pytestmark = pytest.mark.timing

prepare_environment()  # before anything imports ray
pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'tocom[ray]'")
pytest.importorskip("pydantic")

NAME = "tiny"
PROMPT = {"upscale_delay_s": 0.5, "downscale_delay_s": 1.0, "num_cpus": 0.5, "threads": 1, "max_batch": 8}


@dataclass(frozen=True)
class Got:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def logits(self) -> np.ndarray:
        (output,) = self.json["outputs"]
        assert output["name"] == "logits" and output["datatype"] == "FP32"
        return np.array(output["data"], np.float32).reshape(output["shape"])


def call(port: int, path: str, body: bytes | None = None, **headers: str) -> Got:
    connection = http.client.HTTPConnection(HOST, port, timeout=SAFETY_S)
    try:
        connection.request("GET" if body is None else "POST", path, body, headers)
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return Got(response.status, found, response.read())
    finally:
        connection.close()


def asked(pixel_values: np.ndarray, **parameters: object) -> bytes:
    tensor = {
        "name": "pixel_values",
        "datatype": "FP32",
        "shape": list(pixel_values.shape),
        "data": pixel_values.ravel().tolist(),
    }
    return json.dumps({"id": "one", "parameters": parameters, "inputs": [tensor]}).encode()


@pytest.fixture(scope="module")
def cluster() -> Iterator[int]:
    """The port of Ray Serve's proxy."""
    with (
        leased_ports(1) as (port,),
        local_ray(num_cpus=8, object_store_mib=80, _system_config={"metrics_report_interval_ms": 500}),
    ):
        import logging

        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(proxy_location="HeadOnly", http_options={"host": HOST, "port": port})
        yield port
        serve.delete("tocom")


@pytest.fixture(scope="module")
def folder(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny family, with times that are long beside what Ray and JSON take: only these count for the degree."""
    folder = shutil.copytree(tiny_family, tmp_path_factory.mktemp("ray") / NAME)
    family = Family.read(folder)
    for entry in family.engines:
        slow = {batch: {name: 10 * ms for name, ms in times.items()} for batch, times in entry.latency_ms.items()}
        family = family.with_entry(replace(entry, latency_ms=slow))
    family.write(folder)
    return folder


@pytest.fixture(scope="module")
def deploy(cluster: int, folder: Path) -> Callable[..., Callable[..., Got]]:
    """Has Ray run the family as asked; what it returns sends requests."""

    running: list[object] = []

    def run(**arguments: object) -> Callable[..., Got]:
        from ray import serve

        from tocom.serving.ray.app import FamilyArgs, app

        args = FamilyArgs(engines=str(folder), **{**PROMPT, **arguments})
        if args not in running:
            running.clear()
            serve.run(app(args), name="tocom", route_prefix="/")
            running.append(args)
        return lambda *given, **headers: call(cluster, *given, **headers)

    return run


@pytest.fixture
def two(deploy: Callable[..., Any]) -> Callable[..., Got]:
    """Two replicas whose degree does not change."""
    return deploy(min_replicas=2, max_replicas=2, max_body_mib=1)


@pytest.fixture(scope="module")
def pixels(noise: Callable[..., np.ndarray]) -> np.ndarray:
    return noise(3, 64, 64)


@pytest.fixture(scope="module")
def local(folder: Path, pixels: np.ndarray) -> dict[int, np.ndarray]:
    """What the engines give without any server."""
    with tocom.load(folder, threads=1) as family:
        return {degree: np.concatenate([family.infer(pixels[i : i + 1], degree) for i in range(3)])
                for degree in family.degrees}  # fmt: skip


INFER = f"/v2/models/{NAME}/infer"


def test_logits_are_those_of_the_local_engine(two: Callable, pixels: np.ndarray, local: dict[int, np.ndarray]) -> None:
    for degree, expected in local.items():
        for parameters in ({"degree": degree}, {"min_degree": degree, "max_degree": degree}):
            got = two(INFER, asked(pixels[:1], **parameters))
            assert got.status == 200 and got.json["id"] == "one" and got.json["model_name"] == NAME
            assert got.json["parameters"]["degree"] == degree and got.headers["tocom-degree"] == str(degree)
            np.testing.assert_array_equal(got.logits, expected[:1])
        np.testing.assert_allclose(two(INFER, asked(pixels, degree=degree)).logits, expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(local[0], local[16], rtol=1e-2, atol=1e-2)  # degrees can be told apart


def test_images_and_the_page(two: Callable, picture: bytes, folder: Path) -> None:
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(picture).decode()]}
    got = two(INFER, json.dumps({"parameters": {"degree": 8}, "inputs": [tensor]}).encode())
    with tocom.load(folder, threads=1) as family:
        best = int(got.logits.argmax())
        assert family.predict([_opened(picture)], degree=8)[0].classes == (best,)
    predicted = two("/api/predict?degree=8", picture)
    assert predicted.headers["tocom-degree"] == "8" and predicted.json["predictions"][0]["class"] == best
    assert two("/api/merges?degree=8", picture).json["degree"] == 8
    assert two("/api/family").json["replica"]["stale"] is None
    assert b"<!doctype html>" in two("/").body
    assert two("/v2").json["name"] == "tocom" and two("/v2/health/live").json == {"live": True}
    assert two("/v2/health/ready").json == {"ready": True}
    assert two(f"/v2/models/{NAME}").json["inputs"][0]["shape"] == [-1, 3, 64, 64]


def _opened(picture: bytes) -> Any:
    import io

    from PIL import Image

    return Image.open(io.BytesIO(picture))


REFUSED = [
    (INFER, b"{", 400, "JSON"),
    (INFER, b"\xff", 400, "UTF-8"),
    (INFER, b"{}", 400, "inputs"),
    (
        INFER,
        b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}]}',
        400,
        "pixel_values or image",
    ),
    (INFER, b'{"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": ["AAAA"]}]}', 400, "image"),
    (INFER, asked(np.zeros((1, 3, 8, 8), np.float32)), 400, "[n, 3, 64, 64]"),
    (INFER, asked(np.zeros((1, 3, 64, 64), np.float32), degree=5), 400, "0, 8, 16"),
    (INFER, asked(np.zeros((1, 3, 64, 64), np.float32), degree=-1), 400, "whole number"),
    (INFER, b" " * (1 << 20) + b"{}", 413, "1048576 bytes"),
    ("/v2/models/other/infer", b"{}", 404, "Not Found"),
    ("/api/predict?degree=8", b"no image", 400, "image"),
]


@pytest.mark.parametrize(("path", "body", "status", "words"), REFUSED)
def test_what_cannot_be_answered_is_refused_in_one_line(
    two: Callable, path: str, body: bytes, status: int, words: str
) -> None:
    got = two(path, body)
    assert got.status == status and words in got.json["error"] and "\n" not in got.json["error"]


def test_a_killed_replica_loses_no_request(two: Callable, pixels: np.ndarray, local: dict[int, np.ndarray]) -> None:
    first = _replicas(two, 2)
    stop, answers = threading.Event(), []

    def ask(number: int) -> None:
        while not stop.is_set():
            got = two(INFER, asked(pixels[number % 3][None], degree=8))
            answers.append(got.status)
            if got.status == 200:
                np.testing.assert_array_equal(got.logits, local[8][number % 3][None])

    with ThreadPoolExecutor(6) as pool:
        clients = [pool.submit(ask, number) for number in range(6)]
        try:
            eventually(lambda: len(answers) > 10, "answers of both replicas")
            os.kill(first[0], signal.SIGKILL)
            before = len(answers)
            eventually(lambda: len(answers) > before + 30, "answers of the one that is left")
        finally:
            stop.set()
        for client in clients:
            client.result()
    assert set(answers) == {200}
    eventually(lambda: set(_replicas(two, 2)) - set(first), "a replica in the place of the one that was killed")


def _replicas(serve: Callable, count: int) -> list[int]:
    """Process ids of the replicas that answer."""
    found: set[int] = set()
    for _ in range(40):
        if len(found) < count and (got := serve("/api/family")).status == 200:
            found.add(got.json["replica"]["pid"])
    return sorted(found)


@pytest.fixture
def adaptive(deploy: Callable[..., Any]) -> Callable[..., Got]:
    return deploy(objective_ms=120)


def test_the_degree_rises_under_load_and_every_answer_says_so(
    adaptive: Callable, pixels: np.ndarray, local: dict[int, np.ndarray]
) -> None:
    body = asked(np.concatenate([pixels] * 2))  # one such request is more than degree 8 is expected to answer in time

    def ask(_: int) -> int:
        got = adaptive(INFER, body)
        degree = got.json["parameters"]["degree"]
        assert got.headers["tocom-degree"] == str(degree)
        np.testing.assert_allclose(got.logits, np.concatenate([local[degree]] * 2), rtol=1e-4, atol=1e-5)
        return degree

    assert adaptive(INFER, asked(pixels[:1])).json["parameters"]["degree"] == 0
    with ThreadPoolExecutor(12) as pool:
        degrees = list(pool.map(ask, range(24)))
    assert max(degrees) == 16
    assert adaptive(INFER, asked(pixels[:1], max_degree=0)).json["parameters"]["degree"] == 0


@pytest.mark.full
def test_the_degree_falls_back_and_metrics_tell_it(adaptive: Callable, pixels: np.ndarray) -> None:
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: adaptive(INFER, asked(pixels)), range(60)))
    assert "16" in {got.headers["tocom-degree"] for got in answers}
    assert adaptive(INFER, b"{}").status == 400
    eventually(lambda: adaptive("/api/family").json["adaptive"]["degree"] == 0, "degree 0")
    wanted = ("ray_tocom_degree{", "ray_tocom_requests_total{", 'degree="16"', 'reason="bad input"')
    eventually(lambda: all(words in _metrics() for words in wanted), "the metrics", every=0.1)


def _metrics() -> str:
    import ray

    (node,) = ray.nodes()
    return call(node["MetricsExportPort"], "/metrics").body.decode()


def test_another_family_on_disk_takes_over_without_new_replicas(deploy: Callable, folder: Path) -> None:
    serve = deploy()
    before = serve("/api/family").json
    family = Family.read(folder)
    try:
        replace(family, engines=family.engines[:2]).write(folder)
        serve = deploy(generation=1)
        after = serve("/api/family").json
        assert [each["degree"] for each in after["degrees"]] == [0, 8]
        assert after["replica"]["pid"] == before["replica"]["pid"]
        (folder / "family.json").write_text("{}")
        damaged = _deployed_unchecked(deploy, folder, family)
        told = serve("/api/family").json
        assert [each["degree"] for each in told["degrees"]] == [0, 8] and "missing" in told["replica"]["stale"], damaged
    finally:
        family.write(folder)
    serve = deploy(generation=3, objective_ms=30)
    told = serve("/api/family").json
    assert told["adaptive"]["objective_ms"] == 30 and len(told["degrees"]) == 3
    assert told["replica"]["pid"] == before["replica"]["pid"] and told["replica"]["stale"] is None


def _deployed_unchecked(deploy: Callable, folder: Path, family: Family) -> None:
    """As a cluster does whose head sees a sound family, and whose replicas see one that is damaged."""
    read = Family.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Family, "read", lambda given: family if given == folder else read(given))
        deploy(generation=2)


@pytest.mark.full
def test_replicas_are_added_under_load_and_removed_without(deploy: Callable, pixels: np.ndarray) -> None:
    serve = deploy(min_replicas=1, max_replicas=2, target_ongoing_requests=2)
    assert len(_replicas(serve, 2)) == 1
    stop = threading.Event()

    def ask(_: int) -> set[int]:
        found = set()
        while not stop.is_set():
            found.add(serve(INFER, asked(pixels, degree=0)).status)
        return found

    with ThreadPoolExecutor(12) as pool:
        clients = [pool.submit(ask, number) for number in range(12)]
        try:
            eventually(lambda: len(_replicas(serve, 2)) == 2, "a second replica")
        finally:
            stop.set()
        assert set().union(*(client.result() for client in clients)) == {200}
    eventually(lambda: len(_replicas(serve, 2)) == 1, "the end of the second replica")


@pytest.mark.full
def test_every_deployment_has_its_degree(deploy: Callable, pixels: np.ndarray) -> None:
    from ray import serve as ray_serve

    ray_serve.delete("tocom")  # Ray's controller fails where an autoscaled deployment leaves an application that stays
    serve = deploy(fixed="0,16")
    answered = [
        serve(INFER, asked(pixels[:1], **parameters)).json["parameters"]["degree"]
        for parameters in ({}, {"degree": 16}, {"min_degree": 4}, {"degree": 8}, {"max_degree": 8})
    ]
    assert answered == [0, 16, 16, 8, 0]


@pytest.mark.full
def test_what_is_too_much_is_refused_and_told_to_come_back(deploy: Callable, noise: Callable) -> None:
    serve = deploy(max_queue=8, max_queued_requests=4, max_ongoing_requests=4)
    body = asked(noise(8, 64, 64), degree=0)
    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda _: serve(INFER, body), range(160)))
    refused = [got for got in answers if got.status != 200]
    assert refused and {got.status for got in refused} == {503} and len(refused) < len(answers)
    assert all(int(got.headers["retry-after"]) >= 1 and got.json["error"] for got in refused)


@pytest.mark.full
def test_the_command_serves_reloads_and_ends_with_what_it_accepted(folder: Path, pixels: np.ndarray) -> None:
    with leased_ports(1) as (port,):
        _serve_reload_and_end(folder, pixels, port)


def _serve_reload_and_end(folder: Path, pixels: np.ndarray, port: int) -> None:
    manifest = (folder / "family.json").read_bytes()
    command = [sys.executable, "-m", "tocom", "serve-ray", str(folder), "--port", str(port), "--max-batch", "8"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=folder.parent, **streams) as process:  # where there is no checkout
        try:
            lines = iter(process.stdout.readline, "")
            assert any(f"listening on http://{HOST}:{port}" in line for line in lines)
            process.send_signal(signal.SIGHUP)
            assert any("another family" in line for line in lines)
            (folder / "family.json").write_text("{")
            process.send_signal(signal.SIGHUP)
            assert any("the old one goes on" in line for line in lines)
            body = asked(np.concatenate([pixels] * 16), degree=0)
            with ThreadPoolExecutor(4) as pool:
                answers = [pool.submit(call, port, INFER, body) for _ in range(4)]
                wait(answers, SAFETY_S, FIRST_COMPLETED)  # the others run or wait
                process.send_signal(signal.SIGTERM)
                assert {answer.result().status for answer in answers} <= {200, 503}
            assert any("ending" in line for line in lines)
            assert process.wait(SAFETY_S) == 0
        finally:
            process.kill()
            (folder / "family.json").write_bytes(manifest)


def test_the_import_path_of_the_docs_leads_to_the_application(tmp_path: Path) -> None:
    (path,) = re.findall(r"import_path: (\S+)", Path(__file__).resolve().parents[3].joinpath("docs/ray.md").read_text())
    module, _, name = path.partition(":")
    code = f"import {module} as module; print(module.{name}.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"{name}\n"


def test_ray_finds_out_how_to_read_arguments_that_are_text(folder: Path) -> None:
    from tocom.serving.ray.app import FamilyArgs, app

    (parameter,) = inspect.signature(app).parameters.values()
    assert parameter.annotation is FamilyArgs  # what `serve run` and `serve deploy` look at
    args = FamilyArgs.model_validate({"engines": str(folder), "objective_ms": "50", "max_replicas": "4"})
    assert (args.objective_ms, args.max_replicas) == (50.0, 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "there is no family.json"),
        (["FAMILY", "--degree", "5"], "degree must be one the family was compiled for"),
        (["FAMILY", "--fixed", "0,x"], "fixed must be degrees such as 0,16"),
        (["FAMILY", "--fixed", "0", "--degree", "0"], "give no objective_ms or degree with it"),
        (["FAMILY", "--objective-ms", "-1"], "objective_ms"),
        (["FAMILY", "--min-replicas", "2"], "max_replicas must be min_replicas or more"),
        (["FAMILY", "--name", "a/b"], "name must be letters"),
    ],
)
def test_bad_input_is_one_line(
    folder: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tocom.export.cli.__main__ import main

    given = [str(folder) if word == "FAMILY" else word for word in arguments]
    monkeypatch.setattr(sys, "argv", ["tocom", "serve-ray", *given])
    with pytest.raises(SystemExit) as left:
        main()
    told = capsys.readouterr().err
    assert left.value.code == 2 and words in " ".join(told.split()) and told.count("\n") == 1


def test_without_ray_it_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys; sys.modules['ray'] = None\n"
        f"sys.argv = ['tocom', 'serve-ray', {str(folder)!r}]\nfrom tocom.export.cli.__main__ import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "pip install 'tocom[ray]'" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
