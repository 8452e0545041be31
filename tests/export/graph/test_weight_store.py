"""Where a family's weights lie: every tensor's bytes once, in files that never change."""

from __future__ import annotations

import contextlib

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from tocom.export.artifacts import FusedCheckpoint, OnnxGraph
from tocom.export.graph.fuse import fuse
from tocom.export.graph.lower import lower, reference_model
from tocom.export.graph.weight_store import INLINE_BYTES, WeightStore
from tocom.runtime.engines.base import open_engine
from tocom.runtime.engines.mapped_weights import _mapped, mapped_weights
from tocom.runtime.errors import InputError
from tocom.vit import ReducedViT, schedule_for

DRAW = np.random.default_rng(0)
SHARED = DRAW.standard_normal((20, 20), dtype=np.float32)
FIRST, SECOND = DRAW.standard_normal((2, 20, 20), dtype=np.float32)
SMALL = DRAW.standard_normal(8, dtype=np.float32)


def graph_of(**tensors: np.ndarray) -> ir.Model:
    """A graph that puts out its tensors."""
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in tensors]
    outputs = [
        helper.make_tensor_value_info(f"{name}_out", helper.np_dtype_to_tensor_dtype(tensor.dtype), tensor.shape)
        for name, tensor in tensors.items()
    ]
    weights = [numpy_helper.from_array(tensor, name) for name, tensor in tensors.items()]
    graph = helper.make_graph(nodes, "tensors", [], outputs, weights)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def write(store: WeightStore, name: str, **tensors: np.ndarray) -> tuple[str, ...]:
    model = graph_of(**tensors)
    files = store.place(model)
    (store.folder / name).write_bytes(ir.to_proto(model).SerializeToString())
    return files


def check_reads(folder, name, **tensors):
    session = onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
    for (tensor_name, tensor), found in zip(tensors.items(), session.run(None, {}), strict=True):
        assert np.array_equal(found, tensor), tensor_name
    for stored in onnx.load(folder / name).graph.initializer:
        assert np.array_equal(numpy_helper.to_array(stored), tensors[stored.name])


def places(folder, name) -> dict[str, dict[str, str]]:
    graph = onnx.load(folder / name, load_external_data=False)
    return {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in graph.graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
    }


def files_of(folder, name) -> list[tuple[str, int, int]]:
    """(file, offset, length) of what a graph reads."""
    return [(each["location"], int(each["offset"]), int(each["length"])) for each in places(folder, name).values()]


def contents(folder) -> dict[str, tuple[bytes, int]]:
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.glob("*.bin")}


def test_equal_bytes_are_stored_once_within_and_across_graphs(tmp_path):
    store = WeightStore(tmp_path)
    one = write(store, "one.onnx", shared=SHARED, twin=SHARED.copy(), own=FIRST)
    two = write(store, "two.onnx", other_name=SHARED, own=SECOND)
    assert len(one) == 1
    assert len(two) == 2
    assert set(one) < set(two)
    stored = b"".join(content for content, _ in contents(tmp_path).values())
    for tensor in (SHARED, FIRST, SECOND):
        assert stored.count(tensor.tobytes()) == 1
    assert sum(map(len, (content for content, _ in contents(tmp_path).values()))) < 3 * 1600 + 2 * 4096
    check_reads(tmp_path, "one.onnx", shared=SHARED, twin=SHARED, own=FIRST)
    check_reads(tmp_path, "two.onnx", other_name=SHARED, own=SECOND)


def test_equal_bytes_of_another_type_keep_their_type(tmp_path):
    whole = SHARED.view(np.int32)
    files = write(WeightStore(tmp_path), "one.onnx", real=SHARED, whole=whole, reshaped=SHARED.reshape(4, 100))
    assert len(files) == 1
    assert (tmp_path / files[0]).stat().st_size == SHARED.nbytes
    check_reads(tmp_path, "one.onnx", real=SHARED, whole=whole, reshaped=SHARED.reshape(4, 100))


def test_listed_graphs_are_shared_with_after_reopening(tmp_path):
    write(WeightStore(tmp_path), "one.onnx", shared=SHARED, own=FIRST)
    before = contents(tmp_path)
    reopened = WeightStore(tmp_path, [tmp_path / "one.onnx"])
    write(reopened, "two.onnx", shared=SHARED, own=SECOND)
    assert {name: after for name, after in contents(tmp_path).items() if name in before} == before
    assert places(tmp_path, "two.onnx")["shared"] == places(tmp_path, "one.onnx")["shared"]
    added = set(contents(tmp_path)) - set(before)
    assert [contents(tmp_path)[name][0] for name in added] == [SECOND.tobytes()]
    check_reads(tmp_path, "one.onnx", shared=SHARED, own=FIRST)
    check_reads(tmp_path, "two.onnx", shared=SHARED, own=SECOND)


def test_a_graph_of_known_bytes_writes_nothing(tmp_path):
    store = WeightStore(tmp_path)
    one = write(store, "one.onnx", shared=SHARED, own=FIRST)
    before = contents(tmp_path)
    assert write(store, "two.onnx", a=FIRST, b=SHARED) == one
    assert write(WeightStore(tmp_path, [tmp_path / "two.onnx"]), "three.onnx", a=SHARED) == one
    assert contents(tmp_path) == before


def test_an_unlisted_graph_is_not_relied_on(tmp_path):
    """What was not listed may be swept away: its weights are written again."""
    first = write(WeightStore(tmp_path), "one.onnx", shared=SHARED, own=FIRST)
    second = write(WeightStore(tmp_path), "two.onnx", shared=SHARED)
    (tmp_path / first[0]).unlink()
    assert first != second
    check_reads(tmp_path, "two.onnx", shared=SHARED)


def test_tensors_begin_at_pages_and_small_ones_stay_in_the_graph(tmp_path):
    write(WeightStore(tmp_path), "one.onnx", small=SMALL, shared=SHARED, own=FIRST, more=SECOND)
    found = places(tmp_path, "one.onnx")
    assert found.keys() == {"shared", "own", "more"}
    assert sorted(int(place["offset"]) for place in found.values()) == [0, 4096, 8192]
    assert all(int(place["length"]) == SHARED.nbytes for place in found.values())
    assert all("/" not in place["location"] for place in found.values())
    check_reads(tmp_path, "one.onnx", small=SMALL, shared=SHARED, own=FIRST, more=SECOND)


@pytest.mark.parametrize(("elements", "outside"), [(INLINE_BYTES // 4 - 1, False), (INLINE_BYTES // 4, True)])
def test_the_limit_between_small_and_large(tmp_path, elements, outside):
    files = write(WeightStore(tmp_path), "one.onnx", tensor=np.arange(elements, dtype=np.float32))
    assert bool(files) == outside == bool(places(tmp_path, "one.onnx"))


def test_a_folder_can_be_moved(tmp_path):
    (tmp_path / "here").mkdir()
    write(WeightStore(tmp_path / "here"), "one.onnx", shared=SHARED)
    (tmp_path / "here").rename(tmp_path / "there")
    check_reads(tmp_path / "there", "one.onnx", shared=SHARED)


@pytest.fixture(scope="module")
def compensated(make_vit, make_compensator, tmp_path_factory) -> tuple[nn.Module, dict[int, OnnxGraph]]:
    """A model, and its graphs at three degrees, each traced by itself."""
    model, compensator = make_vit("deit3"), make_compensator(48, 2)
    store, graphs = WeightStore(tmp_path_factory.mktemp("compensated")), {}
    for degree in (0, 1, 8):
        compensation = compensator.between(0, degree)
        weights = fuse(model.state_dict(), compensation)
        fused = FusedCheckpoint(weights, "tiny", degree, 0, 0.1, "a" * 64, "b" * 64, compensation)
        graphs[degree] = lower(model, schedule_for(model, degree), fused, store, f"r{degree}.onnx")
    return model, graphs


def test_degrees_share_every_weight_and_differ_in_a_gate(compensated):
    graphs = compensated[1]
    r0, r1, r8 = (set(files_of(graph.file.parent, graph.file.name)) for graph in graphs.values())
    pair = 16 * graphs[8].fused.compensation.compensator.info.rank * 48 * 4
    assert {length for _, _, length in r1 - r0} == {pair} and len(r1 - r0) == 2 * 2 * 2  # down and up of q and v
    assert r0 < r1 == r8


def test_a_graph_computes_with_the_fused_weights(compensated, noise):
    """The factors in the graph against the weights that were fused in float64, on an engine and on the reference."""
    model, graphs = compensated
    for degree, graph in graphs.items():
        reference = reference_model(model, schedule_for(model, degree), graph.fused)
        images = noise(2, 64, 64)
        with torch.no_grad(), open_engine(graph.file, "onnxruntime") as engine:
            expected = reference(torch.from_numpy(images)).numpy()
            plain = ReducedViT(model, degree)(torch.from_numpy(images)).numpy()
            np.testing.assert_allclose(engine.infer(images), expected, rtol=0, atol=1e-5)
        assert (np.abs(plain - expected).max() > 1e-3) == (degree > 0)


def test_engines_that_share_weights_hold_each_once_and_let_go_of_it(compensated, noise):
    graphs = compensated[1]
    distinct = {place for graph in graphs.values() for place in files_of(graph.file.parent, graph.file.name)}
    images, before = noise(2, 64, 64), len(_mapped)
    for graph in graphs.values():
        with open_engine(graph.file, "onnxruntime") as packed, contextlib.ExitStack() as stack:
            sharing = [
                stack.enter_context(open_engine(each.file, "onnxruntime", share_weights=True))
                for each in graphs.values()
            ]
            assert len(_mapped) - before == len(distinct)
            found = sharing[list(graphs.values()).index(graph)].infer(images)
            np.testing.assert_allclose(found, packed.infer(images), rtol=0, atol=1e-5)
        assert len(_mapped) == before


def test_weights_outside_the_folder_are_not_shared_but_refused(tmp_path):
    """A graph that points elsewhere is nothing to read, whoever opens it."""
    (tmp_path / "family").mkdir()
    outside = tmp_path / "outside.bin"
    outside.write_bytes(SHARED.tobytes())
    model = graph_of(shared=SHARED)
    proto = ir.to_proto(model)
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "../outside.bin", "offset": "0", "length": str(SHARED.nbytes)}.items():
        tensor.external_data.add(key=key, value=value)
    file = tmp_path / "family" / "graph.onnx"
    file.write_bytes(proto.SerializeToString())
    assert mapped_weights(file) == {}
    for share in (False, True):
        with pytest.raises(InputError, match="not a graph that ONNX Runtime loads"):
            open_engine(file, "onnxruntime", share_weights=share)


def test_a_weight_file_with_a_second_name_is_told_in_one_line(tmp_path) -> None:
    values = np.arange(INLINE_BYTES, dtype=np.float32)
    weight = ir.Value(name="w", const_value=ir.tensor(values, name="w"))
    graph = ir.Graph([], [], nodes=[], initializers=[weight], opset_imports={"": 20})
    model = ir.Model(graph, ir_version=10)
    (name,) = WeightStore(tmp_path).place(model)
    ir.save(model, tmp_path / "model.onnx")
    (tmp_path / "other.bin").hardlink_to(tmp_path / name)
    with pytest.raises(InputError, match="of the family alone"):
        WeightStore(tmp_path, [tmp_path / "model.onnx"])
