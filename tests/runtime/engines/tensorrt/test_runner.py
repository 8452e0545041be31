"""Tests the TensorRT engine: what needs no GPU everywhere, the rest where there is one (marked `gpu`)."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tocom.runtime.backends import available
from tocom.runtime.engines.base import open_engine
from tocom.runtime.engines.tensorrt import device, plan
from tocom.runtime.engines.tensorrt.lane import Pool
from tocom.runtime.engines.tensorrt.plan import Part, Profile, check_header, cut
from tocom.runtime.engines.tensorrt.runner import TensorRtRunner, complaints, logger
from tocom.runtime.errors import InputError

NO_CUDA = device.unusable()
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
needs_cuda = [pytest.mark.gpu, pytest.mark.skipif(NO_CUDA is not None, reason=str(NO_CUDA))]
without_cuda = pytest.mark.skipif(NO_CUDA is None, reason="there is a CUDA device")


def library_of(backend: str) -> ModuleType:
    return pytest.importorskip(MODULES[backend], reason=f"{backend} is not installed", exc_type=ImportError)


def build_plan(library: ModuleType, graph: Path, batch: tuple[int, int, int]) -> bytes:
    """A plan for this machine's GPU, or for SM80 where it has none."""
    builder = library.Builder(logger(library))
    network = builder.create_network(1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = library.OnnxParser(network, logger(library))
    assert parser.parse(graph.read_bytes()), [str(parser.get_error(index)) for index in range(parser.num_errors)]
    config = builder.create_builder_config()
    if library.__name__ == "tensorrt_rtx":
        config.num_compute_capabilities = 1
        capability = library.ComputeCapability
        config.set_compute_capability(capability.SM80 if NO_CUDA else capability.CURRENT, 0)
    profile = builder.create_optimization_profile()
    image = tuple(network.get_input(0).shape)[1:]
    profile.set_shape(network.get_input(0).name, *((size, *image) for size in batch))
    config.add_optimization_profile(profile)
    content = builder.build_serialized_network(network, config)
    assert content is not None
    return bytes(content)


@pytest.fixture
def rtx_plan(tmp_path, colour_graph) -> Path:
    library = library_of("tensorrt-rtx")
    file = tmp_path / "colours.plan"
    file.write_bytes(build_plan(library, colour_graph(tmp_path / "colours.onnx"), (2, 2, 4)))
    return file


def images(batch: int) -> np.ndarray:
    return np.random.default_rng(batch).standard_normal((batch, 3, 8, 8), dtype=np.float32)


# --- which backends can run here


def test_the_backends_say_whether_they_can_run_here():
    found = {status.name: status for status in available()}
    for backend, name in MODULES.items():
        status = found[backend]
        try:
            version = importlib.import_module(name).__version__
        except ImportError:
            assert not status.usable and re.match("not installed: pip install|its library does not load", status.detail)
        else:
            assert status.usable == (NO_CUDA is None)
            assert status.detail.startswith(version) and (NO_CUDA or "compute capability") in status.detail


def test_the_right_package_is_named(monkeypatch):
    packages = {"tensorrt": "tensorrt-cu13", "tensorrt-rtx": "tensorrt-rtx-cu13 (or 'tocom[tensorrt-rtx]')"}
    for module in ("nvidia", "rtx"):
        monkeypatch.delitem(sys.modules, f"tocom.runtime.engines.tensorrt.{module}", raising=False)
    for name in MODULES.values():
        monkeypatch.setitem(sys.modules, name, None)
    found = {status.name: status for status in available()}
    for backend, package in packages.items():
        assert (found[backend].usable, found[backend].detail) == (False, f"not installed: pip install {package}")


def test_an_old_tensorrt_is_refused(monkeypatch):
    monkeypatch.delitem(sys.modules, "tocom.runtime.engines.tensorrt.nvidia", raising=False)
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.9.0.34"))
    (status,) = (status for status in available() if status.name == "tensorrt")
    assert not status.usable
    assert status.detail == "its library does not load: TensorRT must be 10.13 or later, got 10.9.0.34"


@without_cuda
def test_without_a_device_a_plan_is_refused_in_one_line(rtx_plan, capfd):
    with pytest.raises(InputError, match="backend tensorrt-rtx cannot run here, no usable CUDA device .*, not run$"):
        open_engine(rtx_plan, "tensorrt-rtx", precision="fp16")
    with pytest.raises(InputError, match="TensorRT for RTX .* cannot run .*plan: no usable CUDA device") as caught:
        TensorRtRunner(rtx_plan, library_of("tensorrt-rtx"), "tensorrt-rtx")
    assert str(caught.value).isprintable()
    assert capfd.readouterr() == ("", "")


def test_missing_cuda_bindings_are_told(monkeypatch):
    device._cudart.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert device.unusable() == "the CUDA bindings are not installed: pip install cuda-bindings"


def test_everything_used_of_cuda_is_there():
    cudart = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    source = inspect.getsource(device)
    names = set(re.findall(r'_call\(\s*"(\w+)"', source)) | set(re.findall(r"cudart(?:\(\))?\.([\w.]+)", source))
    assert {"cudaMemcpyAsync", "cudaStreamNonBlocking", "cudaMemcpyKind.cudaMemcpyDeviceToHost"} <= names
    for name in names:
        found = cudart
        for part in name.split("."):
            found = getattr(found, part)


# --- what a plan says without a library


def test_the_header_of_a_plan_tells_who_built_it(rtx_plan):
    content = rtx_plan.read_bytes()
    assert check_header(content, "tensorrt-rtx", "x.plan") == library_of("tensorrt-rtx").__version__
    with pytest.raises(InputError, match="must be a plan of TensorRT, got one of TensorRT for RTX .*: open it"):
        check_header(content, "tensorrt", "x.plan")
    with pytest.raises(InputError, match=r"x.plan is cut off: it must have \d+ bytes, got \d+; compile it again"):
        check_header(content[:-1], "tensorrt-rtx", "x.plan")


@pytest.mark.parametrize("backend", MODULES)
@pytest.mark.parametrize("content", [b"", b"\n" * 100, b"\x08\nonnx" * 9])
def test_what_is_no_plan_is_refused(backend, content):
    with pytest.raises(InputError, match="x.plan is not a plan of TensorRT.*: it starts with .*; compile it") as caught:
        check_header(content, backend, "x.plan")
    assert str(caught.value).isprintable()


def test_a_plan_of_tensorrt_is_refused_by_tensorrt_for_rtx():
    content = b"ftrt" + bytes(20) + bytes((10, 16, 1, 11)) + bytes(100)
    assert check_header(content, "tensorrt", "x.plan") == "10.16.1.11"
    with pytest.raises(InputError, match=r"got one of TensorRT 10.16.1.11: open it as tensorrt, or compile it again"):
        check_header(content, "tensorrt-rtx", "x.plan")
    with pytest.raises(InputError, match="x.plan is cut off after 20 bytes"):
        check_header(content[:20], "tensorrt", "x.plan")


# --- how a batch is cut


@st.composite
def profiles(draw) -> list[Profile]:
    found = []
    for index in range(draw(st.integers(1, 3))):
        smallest, best, largest = sorted(draw(st.tuples(*[st.integers(1, 40)] * 3)))
        found.append(Profile(index, smallest, best, largest))
    return found


@given(batch=st.integers(1, 200), choice=profiles())
def test_parts_cover_a_batch_and_fit_their_profiles(batch, choice):
    parts = cut(batch, choice)
    assert [image for part in parts for image in range(part.start, part.start + part.images)] == list(range(batch))
    assert len(parts) == -(-batch // max(profile.largest for profile in choice))
    for part in parts:
        profile = choice[part.profile]
        assert profile.smallest <= part.size <= profile.largest and part.images <= part.size
        others = [max(part.images, each.smallest) for each in choice if part.images <= each.largest]
        assert part.size == min(others)


def test_a_part_takes_the_profile_that_was_made_for_it():
    choice = [Profile(0, 1, 1, 1), Profile(1, 1, 8, 16), Profile(2, 1, 32, 64)]
    assert cut(1, choice) == [Part(0, 1, 1, 0)]
    assert cut(7, choice) == [Part(0, 7, 7, 1)]
    assert cut(100, choice) == [Part(0, 64, 64, 2), Part(64, 36, 36, 2)]
    assert cut(65, choice)[1] == Part(64, 1, 1, 0)
    assert cut(3, [Profile(0, 8, 8, 8)]) == [Part(0, 3, 8, 0)]


def test_the_examples_in_the_docstrings_hold():
    import doctest

    assert doctest.testmod(plan) == (0, 1)


# --- what a library complains about


def test_complaints_are_collected_and_not_printed(capfd):
    library = library_of("tensorrt-rtx")
    assert logger(library) is logger(library)
    with complaints() as lines, complaints() as more:
        network = library.Builder(logger(library)).create_network(0)
        assert not library.OnnxParser(network, logger(library)).parse(b"no graph")
    assert lines and lines == more
    assert all(line.isprintable() for line in lines)
    with complaints() as later:
        pass
    assert later == []
    assert capfd.readouterr() == ("", "")


# --- the pool of lanes: these stand for what has to be closed, nothing more


class Closable:
    def __init__(self):
        self.closed = False

    def close(self):
        self.closed = True


@pytest.mark.timing
def test_the_pool_makes_no_more_than_its_limit():
    made: list[Closable] = []
    pool = Pool(lambda: made.append(Closable()) or made[-1], limit=2)
    using, most, meeting = set(), [], threading.Barrier(2)

    def use(number):
        with pool.lane() as lane:
            assert lane not in using
            using.add(lane)
            most.append(len(using))
            if number < 2:
                meeting.wait(60)  # neither gives its lane back before the other has one
            using.remove(lane)

    with pool.lane():
        pass
    with pool.lane():
        assert len(made) == 1  # one was waiting
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(use, range(50)))
    assert len(made) == max(most) == 2
    pool.close()
    assert all(lane.closed for lane in made)


def test_a_lane_that_cannot_be_made_is_not_counted():
    answers = [InputError("full"), Closable()]

    def make():
        answer = answers.pop(0)
        if isinstance(answer, InputError):
            raise answer
        return answer

    pool = Pool(make, limit=1)
    with pytest.raises(InputError, match="full"), pool.lane():
        pass
    with pool.lane():
        pass
    pool.close()


@pytest.mark.timing
def test_closing_waits_for_who_runs_and_refuses_who_waits():
    pool = Pool(Closable, limit=1)
    running, release, refused = threading.Event(), threading.Event(), []

    def run():
        with pool.lane() as lane:
            running.set()
            assert release.wait(60)
            assert not lane.closed

    def wait():
        try:
            with pool.lane():
                pass
        except InputError as error:
            refused.append(str(error))

    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(run)
        assert running.wait(60)
        second = threads.submit(wait)
        third = threads.submit(pool.close)
        second.result(60)
        assert not third.done()
        release.set()
        first.result(60)
        third.result(60)
    assert refused == ["the engine must be open, got one that was closed meanwhile: open it again"]


# --- on a device


@pytest.fixture(params=[pytest.param(backend, marks=needs_cuda) for backend in MODULES])
def backend(request) -> str:
    library_of(request.param)
    return request.param


@pytest.fixture
def plan_of(backend, tmp_path, colour_graph) -> Callable[..., Path]:
    """Builds a plan for batches of 2 to 4; with debug=True it also gives `features`, and the best class as int64."""

    def made(debug: bool = False, batch: tuple[int, int, int] = (2, 2, 4)) -> Path:
        graph = colour_graph(tmp_path / f"colours{debug}.onnx", debug=debug)
        if debug:
            model = onnx.load(graph)
            model.graph.node.append(onnx.helper.make_node("ArgMax", ["logits"], ["best"], axis=1, keepdims=0))
            model.graph.output.append(onnx.helper.make_tensor_value_info("best", onnx.TensorProto.INT64, ["batch"]))
            graph.write_bytes(model.SerializeToString())
        file = tmp_path / f"colours{debug}.plan"
        file.write_bytes(build_plan(library_of(backend), graph, batch))
        return file

    return made


def runner_of(file: Path, backend: str, **options) -> TensorRtRunner:
    if backend == "tensorrt":
        return TensorRtRunner(file, library_of(backend), backend, **options)
    return importlib.import_module("tocom.runtime.engines.tensorrt.rtx").RtxRunner(file, **options)


def check_logits(runner: TensorRtRunner, batch: int) -> None:
    pixel_values = images(batch)
    logits = runner.infer(pixel_values)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, 4 * pixel_values.mean((2, 3)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_logits_equal_numpys_for_every_batch_size(plan_of, backend, cuda_graphs):
    with runner_of(plan_of(), backend, cuda_graphs=cuda_graphs) as runner:
        assert (runner.backend, runner.input_size, runner.classes) == (backend, (3, 8, 8), 3)
        for batch in (1, 2, 3, 4, 9, 4, 1, 2):  # padded, as it is, cut; then again, from recordings
            check_logits(runner, batch)


def test_it_opens_like_every_engine(plan_of, backend):
    with open_engine(plan_of(), backend, batch=2) as runner:
        check_logits(runner, 2)
    with pytest.raises(InputError, match="must be open"):
        runner.infer(images(2))
    runner.close()


def test_infer_all_gives_every_output_by_name(plan_of, backend):
    pixel_values = images(5)
    with runner_of(plan_of(debug=True), backend) as runner:
        outputs = runner.infer_all(pixel_values)
        assert set(outputs) == {"logits", "features", "best"}
        np.testing.assert_allclose(outputs["features"], pixel_values.mean((2, 3)), rtol=0, atol=1e-5)
        np.testing.assert_array_equal(outputs["logits"], runner.infer(pixel_values))
        assert outputs["best"].dtype == np.int64
        np.testing.assert_array_equal(outputs["best"], outputs["logits"].argmax(1))


def test_many_threads_may_call_one_runner(plan_of, backend):
    with runner_of(plan_of(), backend, lanes=2) as runner, ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: check_logits(runner, 1 + number % 6), range(200)))


def test_the_device_alone_can_be_timed(plan_of, backend):
    with runner_of(plan_of(), backend) as runner:
        times = runner.device_ms(images(4), runs=7)
        assert len(times) == 7 and all(0 < each < 1000 for each in times)
        check_logits(runner, 4)
        with pytest.raises(InputError, match="a batch to time must be 4 images or fewer, got 5"):
            runner.device_ms(images(5))


def test_what_cannot_be_loaded_is_told_in_one_line(plan_of, backend, tmp_path, capfd):
    content = plan_of().read_bytes()
    broken = {
        "version": content[:24] + bytes((9, 9, 9, 9)) + content[28:],
        "half": content[: len(content) // 2],
    }
    for name, changed in broken.items():
        (tmp_path / name).write_bytes(changed)
        with pytest.raises(InputError, match=name) as caught:
            runner_of(tmp_path / name, backend)
        assert str(caught.value).isprintable() and "compile it again" in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_plan_that_breaks_the_contract_is_refused(backend, tmp_path, colour_graph):
    file = tmp_path / "x.plan"
    for names, words in (
        ({"image": "x"}, r"must take one input, pixel_values .*, got x \[-1, 3, 8, 8\]"),
        ({"logits": "y"}, r"must give logits \[batch, classes\], got y \[-1, 3\]"),
    ):
        graph = colour_graph(tmp_path / "x.onnx", **names)
        file.write_bytes(build_plan(library_of(backend), graph, (1, 1, 1)))
        with pytest.raises(InputError, match=words):
            runner_of(file, backend)


def test_what_was_compiled_just_in_time_is_kept(plan_of, backend, tmp_path):
    if backend != "tensorrt-rtx":
        pytest.skip("only TensorRT for RTX compiles just in time")
    file = plan_of()
    with runner_of(file, backend) as runner:
        check_logits(runner, 2)
    (cache,) = tmp_path.glob("*.plan.*.cache")
    kept = cache.read_bytes()
    cache.write_bytes(b"noise")
    for _ in range(2):
        with runner_of(file, backend) as runner:
            check_logits(runner, 2)
        assert len(cache.read_bytes()) > len(kept) // 2
    cache.unlink()
    cache.mkdir()  # cannot be written
    with runner_of(file, backend) as runner:
        check_logits(runner, 2)
