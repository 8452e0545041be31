"""The example's family, and a real Triton server on loopback.

The server comes from the wheel that `make test` unpacks into build/triton: Triton itself with its Python backend
alone. The backends onnxruntime and openvino are stood in for by those in backends/, which read the same repository.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tocom.export.artifacts import OnnxGraph
from tocom.export.engine.build import build
from tocom.export.family.steps import steps_of
from tocom.export.graph.weight_store import WeightStore
from tocom.export.source.load import load_source
from tocom.export.source.options import CompileOptions
from tocom.runtime.manifest import EngineEntry, Family

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "examples" / "digits"
WHEEL = ROOT / "build" / "triton"
SERVER = WHEEL / "pytriton" / "tritonserver"
DEGREES = (0, 8, 16)
_STARTS_WITHIN, _STOPS_WITHIN = 90, 60  # seconds


def _entry(graph: OnnxGraph, degree: int, backend: str) -> EngineEntry:
    engine = build(graph, backend=backend)
    return EngineEntry(
        degree=degree, scale=0.1, schedule=(degree,) * (len(graph.tokens) - 1), tokens=graph.tokens,
        gmacs=graph.gmacs, backend=backend, precision="fp32", onnx=graph.file.name, engine=engine.file.name,
        sha256=engine.files, recipe="", validation={}, latency_ms={"1": {}, "8": {}}, accuracy={}, native=engine.native,
    )  # fmt: skip


def _make_families(root: Path) -> None:
    digits, vino = root / "digits", root / "vino"
    digits.mkdir(parents=True)
    given = {"compensator": EXAMPLE / "compensator.safetensors", "source_degree": 0, "backend": "onnxruntime"}
    source = load_source(CompileOptions(model=str(EXAMPLE), out=digits, degrees=DEGREES, **given))
    with steps_of(source, WeightStore(digits, []), lambda degree, stage: None) as steps:
        graphs = {degree: steps.graph(degree) for degree in DEGREES}
    family = source.family
    for degree, graph in graphs.items():
        family = family.with_entry(_entry(graph, degree, "onnxruntime"))
    family.write(digits)
    shutil.copytree(digits, vino)
    graph = replace(graphs[8], file=vino / graphs[8].file.name)
    replace(family, engines=(_entry(graph, 8, "openvino"),)).write(vino)


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The example for ONNX Runtime, and its degree 8 for OpenVINO; made by the first of several test processes."""
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "triton-families"
    with root.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.exists():
            making = root.with_suffix(".making")
            _make_families(making)
            making.rename(root)
    return {"digits": root / "digits", "vino": root / "vino"}


@pytest.fixture(scope="session")
def family(families: dict[str, Path]) -> tuple[Path, Family]:
    """The family for ONNX Runtime, and its folder."""
    return families["digits"], Family.read(families["digits"])


@dataclass(frozen=True)
class Running:
    """A server that is ready.

    Attributes:
        http: Its address, as clients want it.
        grpc: Likewise.
        log: What it says.
        process: Itself.
        shared: What the names of its shared memory begin with.
    """

    http: str
    grpc: str
    log: Path
    process: subprocess.Popen
    shared: str


def _why_not() -> str | None:
    """Why there is no Triton here; None where there is."""
    if not (SERVER / "bin" / "tritonserver").is_file():
        return f"no Triton server at {WHEEL}: `make test` fetches it where there is one for the platform"
    stub = SERVER / "python_backend_stubs" / f"{sys.version_info[0]}.{sys.version_info[1]}"
    if not stub.is_dir():
        return f"Triton's Python backend knows no Python {stub.name}"
    program = [stub / "triton_python_backend_stub", "--help"]
    told = subprocess.run(program, env=_environment(), capture_output=True, text=True, check=False, timeout=60)
    if "cannot open shared object file" in told.stderr:
        return f"Triton's Python backend does not load: {told.stderr.strip()}"
    return None


def _environment(python: Path | None = None) -> dict[str, str]:
    """Where the server finds its libraries, and the Python that its backends run in."""
    libraries = [str(WHEEL / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR")]
    path = [*([str(python / "bin")] if python else []), os.environ["PATH"]]
    return os.environ | {"LD_LIBRARY_PATH": os.pathsep.join(libraries), "PATH": os.pathsep.join(path)}


def _make_python(folder: Path) -> Path:
    """An environment like this one, in which numpy is the one that the Python backend was built for."""
    packages = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    packages.mkdir(parents=True)
    for name in ("numpy", "numpy.libs"):
        (packages / name).symlink_to(WHEEL / name)
    (packages / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    executable = Path(sys.executable).resolve()
    (folder / "bin").mkdir()
    for name in ("python3", "python"):
        (folder / "bin" / name).symlink_to(executable)
    (folder / "pyvenv.cfg").write_text(f"home = {executable.parent}\ninclude-system-site-packages = false\n")
    return folder


def _make_backends(folder: Path) -> Path:
    shutil.copytree(SERVER / "backends" / "python", folder / "python")
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    shutil.copy(SERVER / "python_backend_stubs" / version / "triton_python_backend_stub", folder / "python")
    for name in ("onnxruntime", "openvino"):
        shutil.copytree(Path(__file__).parent / "backends" / name, folder / name)
    return folder


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/v2/health/ready", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


@contextmanager
def run_triton(folder: Path, repositories: Sequence[Path]) -> Iterator[Running]:
    """A Triton server for some model repositories; skips the test where there is none."""
    if (why := _why_not()) is not None:
        pytest.skip(why)
    http, grpc, metrics = _free_ports(3)
    shared = f"tocom_test_{os.getpid()}"
    command = [
        str(SERVER / "bin" / "tritonserver"), *(f"--model-repository={each}" for each in repositories),
        f"--backend-directory={_make_backends(folder / 'backends')}", "--disable-auto-complete-config",
        f"--backend-config=python,shm-region-prefix-name={shared}", "--exit-timeout-secs=30",
        "--http-address=127.0.0.1", f"--http-port={http}", "--grpc-address=127.0.0.1", f"--grpc-port={grpc}",
        "--metrics-address=127.0.0.1", f"--metrics-port={metrics}", "--allow-gpu-metrics=false",
    ]  # fmt: skip
    log = folder / "log.txt"
    with log.open("w") as told:
        environment = _environment(_make_python(folder / "python")) | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=told, stderr=subprocess.STDOUT, env=environment, cwd=folder)
    try:
        deadline = time.monotonic() + _STARTS_WITHIN
        while not _is_ready(f"127.0.0.1:{http}"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-5000:]
            time.sleep(0.1)
        yield Running(f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", log, process, shared)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_STOPS_WITHIN)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for left in Path("/dev/shm").glob(f"{shared}*"):
            left.unlink()


@pytest.fixture(scope="session")
def triton() -> Callable:
    """`run_triton`, for tests that need a server."""
    return run_triton
