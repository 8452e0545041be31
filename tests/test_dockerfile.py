"""The container file names what there is: the image itself is not built here."""

from __future__ import annotations

import fnmatch
import http.server
import json
import re
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Instructions and their values, in order. The parser opens its file for writing: it gets a copy."""
    copy = tmp_path_factory.mktemp("container") / "Dockerfile"
    copy.write_text((ROOT / "Dockerfile").read_text())
    return [step for step in DockerfileParser(str(copy)).structure if step["instruction"] != "COMMENT"]


def values(steps: list[dict[str, str]], instruction: str) -> list[str]:
    return [step["value"] for step in steps if step["instruction"] == instruction]


def test_what_it_installs_exists(steps: list[dict[str, str]]) -> None:
    extras = [value.partition("=")[2] for value in values(steps, "ARG") if value.startswith("EXTRAS=")]
    extras += re.findall(r"EXTRAS=(\S+)", (ROOT / "Dockerfile").read_text())
    assert len(extras) >= 3
    for extra in {extra for names in extras for extra in names.split(",")}:
        assert extra in PROJECT["project"]["optional-dependencies"], extra
    python = next(value for value in values(steps, "ARG") if value.startswith("PYTHON=")).partition("=")[2]
    assert f">={python}" == PROJECT["project"]["requires-python"]
    assert {value.split()[0] for value in values(steps, "FROM")} == {"python:${PYTHON}-slim"}


def test_the_package_reaches_the_build(steps: list[dict[str, str]]) -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    kept = {line[1:] for line in lines if line.startswith("!")}
    folders = set(PROJECT["tool"]["setuptools"]["package-dir"].values())
    assert kept == folders | {"LICENSE", "README.md", "constraints.txt", "pyproject.toml"}
    assert all((ROOT / name).exists() for name in kept)
    for room in folders:  # what the last lines leave out is nothing that is installed
        files = [str(file.relative_to(ROOT)) for file in (ROOT / room).rglob("*.py")]
        assert not fnmatch.filter(files, "runtime/native/built*")
    assert ". ." in values(steps, "COPY")


def test_it_runs_without_rights_by_a_command_that_exists(steps: list[dict[str, str]]) -> None:
    user, _, group = values(steps, "USER")[-1].partition(":")
    assert int(user) > 0 and int(group) > 0  # by number: Kubernetes cannot tell of a name that it is not root
    last = max(index for index, step in enumerate(steps) if step["instruction"] == "FROM")
    assert not [step for step in steps[last:] if step["instruction"] == "RUN"]
    command = json.loads(values(steps, "ENTRYPOINT")[0]) + json.loads(values(steps, "CMD")[0])
    assert command == ["tocom", "serve", "/family", "--host", "0.0.0.0"]
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, check=False, cwd=ROOT, timeout=60
    )
    assert done.returncode == 2 and "/family" in done.stderr  # there is none here, but every option is known


@pytest.mark.parametrize("status", [200, 503])
def test_the_health_check_asks_whether_the_server_is_ready(steps: list[dict[str, str]], status: int) -> None:
    check = json.loads(values(steps, "HEALTHCHECK")[0].partition("CMD ")[2])
    # in a process of its own: MLServer and clients of Triton define the same messages of gRPC
    code = "from tocom.serving.mlserver.app import Addresses as A; print(A().http_port, A().grpc_port)"
    ports = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert values(steps, "EXPOSE") == [ports.strip()]
    port = ports.split()[0]
    paths = []

    class Ready(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Ready) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        code = check[2].replace(f":{port}/", f":{server.server_port}/")
        assert code != check[2]
        done = subprocess.run([sys.executable, *check[1:2], code], capture_output=True, check=False, timeout=60)
        server.shutdown()
    assert paths == ["/v2/health/ready"]
    assert (done.returncode == 0) is (status == 200)
