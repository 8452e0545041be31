"""The example's family, and a real Triton server on loopback.

The server comes from the wheel that `make test` unpacks into build/triton: Triton itself with its Python backend
alone. The backends onnxruntime and openvino are stood in for by those in backends/, which read the same repository; a
model of the first can be held up.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest

from tests.ports import HOST, leased_ports
from tests.waiting import SAFETY_S, eventually
from tocom.export.artifacts import OnnxGraph
from tocom.export.engine.build import build
from tocom.export.family.steps import Graphs
from tocom.export.graph.weight_store import WeightStore
from tocom.export.source.load import load_source
from tocom.export.source.options import CompileOptions
from tocom.runtime.manifest import EngineEntry, Family

ROOT = Path(__file__).resolve().parents[3]
WHEEL = ROOT / "build" / "triton"
SERVER = WHEEL / "pytriton" / "tritonserver"
DEGREES = (0, 8, 16)


def _entry(graph: OnnxGraph, degree: int, backend: str) -> EngineEntry:
    engine = build(graph, backend=backend)
    return EngineEntry(
        degree=degree, scale=0.1, schedule=(degree,) * (len(graph.tokens) - 1), tokens=graph.tokens,
        gmacs=graph.gmacs, backend=backend, precision="fp32", onnx=graph.file.name, engine=engine.file.name,
        sha256=engine.files, recipe="", validation={}, latency_ms={"1": {}, "8": {}}, accuracy={}, native=engine.native,
    )  # fmt: skip


def _make_families(example: Path, root: Path) -> None:
    digits, vino = root / "digits", root / "vino"
    digits.mkdir()
    given = {"compensator": example / "compensator.safetensors", "source_degree": 0, "backend": "onnxruntime"}
    source = load_source(CompileOptions(model=str(example), out=digits, degrees=DEGREES, **given))
    with Graphs(source, WeightStore(digits, []), lambda degree, stage: None) as lowered:
        graphs = {degree: lowered.graph(degree, "onnxruntime") for degree in DEGREES}
    family = source.family
    for degree, graph in graphs.items():
        family = family.with_entry(_entry(graph, degree, "onnxruntime"))
    family.write(digits)
    shutil.copytree(digits, vino)
    graph = replace(graphs[8], file=vino / graphs[8].file.name)
    replace(family, engines=(_entry(graph, 8, "openvino"),)).write(vino)


@pytest.fixture(scope="session")
def families(once: Callable[[str, Callable[[Path], object]], Path], small_example: Path) -> dict[str, Path]:
    """The example in miniature for ONNX Runtime, and its degree 8 for OpenVINO."""
    root = once("triton-families", partial(_make_families, small_example))
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
        metrics: Likewise.
        log: What it says.
        process: Itself.
        shared: What the names of its shared memory begin with.
        repositories: What it serves.
    """

    http: str
    grpc: str
    metrics: str
    log: Path
    process: subprocess.Popen
    shared: str
    repositories: tuple[Path, ...]

    @contextmanager
    def held_up(self, model: str) -> Iterator[None]:
        """Keeps a model from running what it is given until the context ends; see the backend for ONNX Runtime."""
        (folder,) = (each / model for each in self.repositories if (each / model).is_dir())
        (folder / "hold").touch()
        try:
            yield
        finally:
            (folder / "hold").unlink()

    def begun(self, model: str) -> int:
        """Images of all calls of a model that have begun, as its backend says."""
        return sum(map(int, re.findall(f"{model} runs ([0-9]+) images", self.log.read_text(errors="replace"))))

    def waiting(self, model: str) -> int:
        """Requests for a model that wait, as its metrics say."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=SAFETY_S) as answer:
            lines = answer.read().decode().splitlines()
        (line,) = (each for each in lines if each.startswith("nv_inference_pending_request_count{")
                   and f'model="{model}"' in each)  # fmt: skip
        return int(float(line.split()[-1]))


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
    others = [each for each in sys.path if Path(each).name == "site-packages"]  # an environment may lie over another
    (packages / "others.pth").write_text("".join(f"{each}\n" for each in others))
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


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/v2/health/ready", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _command(folder: Path, repositories: Sequence[Path], backends: Path, ports: Sequence[int]) -> list[str]:
    http, grpc, metrics = ports
    return [
        str(SERVER / "bin" / "tritonserver"), *(f"--model-repository={each}" for each in repositories),
        f"--backend-directory={backends}", "--disable-auto-complete-config",
        f"--backend-config=python,shm-region-prefix-name={_shared(folder)}", "--exit-timeout-secs=120",
        f"--http-address={HOST}", f"--http-port={http}", f"--grpc-address={HOST}", f"--grpc-port={grpc}",
        f"--metrics-address={HOST}", f"--metrics-port={metrics}", "--allow-gpu-metrics=false",
    ]  # fmt: skip


def _shared(folder: Path) -> str:
    return f"tocom_test_{os.getpid()}_{folder.name}"


@contextmanager
def run_triton(folder: Path, repositories: Sequence[Path]) -> Iterator[Running]:
    """A Triton server for some model repositories; skips the test where there is none."""
    if (why := _why_not()) is not None:
        pytest.skip(why)
    backends, python = _make_backends(folder / "backends"), _make_python(folder / "python")
    environment, log = _environment(python) | {"OMP_NUM_THREADS": "1"}, folder / "log.txt"
    for _ in range(5):
        with leased_ports(3) as ports, log.open("w") as told:
            http, grpc, metrics = (f"{HOST}:{port}" for port in ports)
            command = _command(folder, repositories, backends, ports)
            process = subprocess.Popen(command, stdout=told, stderr=subprocess.STDOUT, env=environment, cwd=folder)
            try:
                eventually(lambda: process.poll() is not None or _is_ready(http), "the server", every=0.05)  # noqa: B023
                if process.poll() is None:
                    yield Running(http, grpc, metrics, log, process, _shared(folder), tuple(repositories))
                    return
                assert "in use" in log.read_text(), log.read_text()[-5000:]  # another program was faster
            finally:
                _end(process)
                for left in Path("/dev/shm").glob(f"{_shared(folder)}*"):
                    left.unlink()
    pytest.fail(f"every port was taken: {log.read_text()[-5000:]}")


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(SAFETY_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def triton() -> Callable:
    """`run_triton`, for tests that need a server."""
    return run_triton
