"""The merge kernels against the reference: through Triton's interpreter on the CPU, and on a GPU where there is one.

Triton decides when it is imported whether it interprets or compiles, for the whole process. So the interpreter has a
process of its own, this file run as a script, which carries out what the tests ask of it.
"""

from __future__ import annotations

import ast
import importlib
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tocom
from tocom.merging import Matching, cosine_scores, match, merge
from tocom.reduction import PRUNE
from tocom.runtime.errors import InputError

triton = pytest.importorskip("triton", reason="Triton is not installed: it comes with torch on Linux")

ROOT = Path(__file__).resolve().parents[2]
PREFIXES = {
    "class": (1, True),
    "distilled": (2, True),
    "registers": (5, True),
    "none": (0, False),
    "no_class": (4, False),
}
FORMATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PREFIXES_AND_FORMATS = [
    pytest.param(prefix, name, marks=() if name == "fp32" or prefix in ("class", "none") else pytest.mark.full)
    for prefix in PREFIXES
    for name in FORMATS
]


def carry_out(device: str, name: str, *args: object, **kwargs: object) -> object:
    """Calls a function of the module under test with tensors on a device; what it returns is on the CPU."""
    kernels = importlib.import_module("tocom.triton_merge")

    def to(where: str, value: object) -> object:
        if isinstance(value, Matching):
            return Matching(*(each.to(where) for each in (value.src, value.dst, value.unm)), value.protected)
        if isinstance(value, tuple):
            return tuple(to(where, each) for each in value)
        if not isinstance(value, torch.Tensor) or value.device.type == where:
            return value
        moved = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=where)
        return moved.copy_(value).requires_grad_(value.requires_grad)

    given = [to(device, each) for each in args]
    if name == "step":
        prefix, *given = given
        result = kernels.triton_step(prefix)(0, *given)
    elif name == "apply_with_log":
        x, _, matching = given
        log_size = torch.full((x.shape[0], x.shape[1] - matching.src.shape[1], 1), -1.0, device=device)
        result = (*kernels.apply(*given, log_size=log_size), log_size)
    else:
        result = getattr(kernels, name)(*given, **kwargs)
    return to("cpu", result)


def serve() -> None:
    """Carries out on the CPU what is asked on stdin, until it ends."""
    while True:
        try:
            name, args, kwargs = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = carry_out("cpu", name, *args, **kwargs)
        except Exception as error:  # noqa: BLE001
            answer = error
        pickle.dump(answer, sys.stdout.buffer)
        sys.stdout.buffer.flush()


class Interpreter:
    """Triton's interpreter in a process of its own."""

    name = "interpreter"

    def __init__(self) -> None:
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __call__(self, name: str, *args: object, **kwargs: object) -> object:
        pickle.dump((name, args, kwargs), self.process.stdin)
        self.process.stdin.flush()
        answer = pickle.load(self.process.stdout)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self.process.kill()  # taking torch down in order takes longer than a test
        self.process.communicate()


class Cuda:
    """The GPU."""

    name = "cuda"

    def __call__(self, name: str, *args: object, **kwargs: object) -> object:
        return carry_out("cuda", name, *args, **kwargs)


@pytest.fixture(
    scope="module",
    params=["interpreter", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])],
)
def run(request):
    """Runs a function of the module under test by name: every case on a GPU too, where there is one."""
    if request.param == "cuda":
        yield Cuda()
    else:
        interpreter = Interpreter()
        yield interpreter
        interpreter.close()


def check_equal(found: Matching, expected: Matching) -> None:
    assert found.protected == expected.protected
    for name in ("src", "dst", "unm"):
        one, other = getattr(found, name), getattr(expected, name)
        assert one.dtype == torch.int64
        assert torch.equal(one, other), name


def check_margins(found: Matching, metric: torch.Tensor, keep_order: bool) -> None:
    """Every decision is valid, and the best one to within float32's rounding."""
    from tocom.export.proof.decisions import MergeComparer, merge_margin
    from tocom.export.proof.gates import margin_allowed

    scores = cosine_scores(metric.double(), found.protected)
    for image in range(len(metric)):
        assert MergeComparer().is_valid(found, image, metric.shape[1])
        if found.src.shape[1]:
            margin = merge_margin(scores[image], found, image, ordered_by_score=not keep_order)
            assert margin < margin_allowed("fp32", "merge")


@pytest.mark.parametrize(("prefix", "number_format"), PREFIXES_AND_FORMATS)
def test_decisions_equal_the_reference_with_exact_ties_and_zero_vectors(run, tied_metric, prefix, number_format):
    protected, keep_order = PREFIXES[prefix]
    for tokens, r in ((2, 1), (23, 0), (23, 1), (23, 99), (46, 6)):
        metric = torch.from_numpy(tied_metric(2, protected + tokens, seed=tokens)).to(FORMATS[number_format])
        how = {"protected": protected, "keep_order": keep_order}
        check_equal(run("decide", metric, r, **how), match(metric, r, **how))


@pytest.mark.full
@pytest.mark.parametrize("number_format", ["fp32", "fp16"])
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("tokens", [*range(8, 30), 63, 64, 65, 66, 127, 128, 129, 130, 197, 256, 257])
def test_decisions_equal_the_reference_at_every_size(run, tied_metric, prefix, number_format, tokens):
    protected, keep_order = PREFIXES[prefix]
    metric = torch.from_numpy(tied_metric(1, tokens, seed=tokens)).to(FORMATS[number_format])
    for r in (0, 1, 13, 999):
        how = {"protected": protected, "keep_order": keep_order}
        check_equal(run("decide", metric, r, **how), match(metric, r, **how))


@pytest.mark.parametrize(
    ("tokens", "number_format"),
    [(259, "fp32"), (263, "fp16"), *(pytest.param(n, f, marks=pytest.mark.full) for n in (577, 1025) for f in FORMATS)],
)
@pytest.mark.parametrize("prefix", ["registers", "none"])
def test_decisions_equal_the_reference_where_one_program_is_too_small(run, tied_metric, prefix, tokens, number_format):
    protected, keep_order = PREFIXES[prefix]
    metric = torch.from_numpy(tied_metric(1, tokens, seed=tokens)).to(FORMATS[number_format])
    how = {"protected": protected, "keep_order": keep_order}
    for r in (8, 999):
        check_equal(run("decide", metric, r, **how), match(metric, r, **how))


@pytest.mark.parametrize(
    ("tokens", "width", "number_format"),
    [(34, 64, "fp16"), (47, 24, "fp32"), (31, 144, "fp16"), (31, 144, "bf16"), (197, 64, "fp32"), (197, 64, "fp16")]
    + [pytest.param(n, d, f, marks=pytest.mark.full) for n, d in ((197, 64), (300, 80), (577, 64)) for f in FORMATS],
)
def test_decisions_on_random_metrics_are_the_best_to_within_rounding(run, tokens, width, number_format):
    draw = torch.Generator().manual_seed(tokens)
    metric = torch.randn(2, tokens, width, generator=draw).to(FORMATS[number_format])
    for protected, keep_order in (PREFIXES["class"], PREFIXES["none"]):
        found = run("decide", metric, 9, protected=protected, keep_order=keep_order)
        check_margins(found, metric, keep_order)


def test_equal_tokens_are_equally_good(run):
    """Vectors whose cosines are rounded, in pairs: rounded equally, so the lowest of equals is picked."""
    metric = torch.randn(1, 12, 40, generator=torch.Generator().manual_seed(1)).repeat(1, 3, 1)
    check_equal(run("decide", metric, 8, protected=0), match(metric, 8, protected=0))
    found = run("decide", torch.full((1, 36, 40), 0.3), 8, protected=2)
    assert found.src.tolist() == [[*range(2, 18, 2)]]
    assert set(found.dst.flatten().tolist()) == {3}


@pytest.mark.parametrize("number_format", FORMATS)
def test_what_is_not_a_number_is_decided_as_torch_does(run, number_format):
    draw = torch.Generator().manual_seed(5)
    clean = torch.randn(5, 23, 16, generator=draw).to(FORMATS[number_format])
    metric = clean.clone()
    metric[0, 4, 3] = torch.nan  # an a-token
    metric[1, 7, 3] = torch.nan  # a b-token
    metric[2] = torch.nan
    metric[3, 9, 2], metric[3, 12, 2] = torch.inf, -torch.inf
    for keep_order in (True, False):
        how = {"protected": 1, "keep_order": keep_order}
        check_equal(run("decide", metric, 6, **how), match(metric, 6, **how))


@pytest.mark.parametrize("tokens", [37, 275])
def test_tokens_that_all_point_away_from_each_other_are_matched_all_the_same(run, tokens):
    """All scores are below 0, which is what the padding of a block would score."""
    metric = torch.rand(1, tokens, 16, generator=torch.Generator().manual_seed(7)) + 0.1
    metric[:, 1::2] *= -1
    for keep_order in (True, False):
        check_margins(run("decide", metric, 9, keep_order=keep_order), metric, keep_order)


def test_a_score_too_small_for_float32_equals_zero(run):
    metric = torch.zeros(1, 12, 16)
    metric[0, 1::2, 1], metric[0, 0::2, 0] = 1, 1
    metric[0, 5] *= 1e15
    metric[0, 5, 0] = -1e-35  # its cosine to the a-tokens is -1e-50
    metric[0, 1:5:2, 0] = -0.5
    check_equal(run("decide", metric, 3), match(metric, 3))
    assert set(run("decide", metric, 3).dst.flatten().tolist()) == {5}


def test_long_and_short_vectors_are_decided_as_the_reference_does(run):
    draw = torch.Generator().manual_seed(6)
    metric = torch.randn(2, 30, 16, generator=draw) * 10.0 ** torch.randint(-9, 10, (2, 30, 1), generator=draw)
    check_margins(run("decide", metric, 7), metric, keep_order=True)


@pytest.mark.parametrize("number_format", FORMATS)
@pytest.mark.parametrize(("tokens", "heads"), [(37, 4), (37, 1), pytest.param(262, 4, marks=pytest.mark.full)])
def test_keys_are_averaged_as_they_lie_in_qkv(run, tied_metric, tokens, heads, number_format):
    metric = torch.from_numpy(tied_metric(2, tokens, seed=heads)).to(FORMATS[number_format])
    share = torch.tensor([1.5, 0.5, 0.75, 1.25] if heads == 4 else [1.0]).to(metric.dtype)  # their mean is exactly 1
    qkv = torch.randn(2, tokens, 3, heads, 16).to(metric.dtype)
    qkv[:, :, 1] = metric.unsqueeze(2) * share[:, None]
    keys = qkv.permute(2, 0, 3, 1, 4)[1]
    assert not keys.is_contiguous()
    assert torch.equal(keys.mean(dim=1), metric)
    check_equal(run("decide_from_keys", keys, 6), match(metric, 6))
    spread = torch.zeros(16, tokens, 2, dtype=metric.dtype).permute(2, 1, 0).copy_(metric)
    check_equal(run("decide", spread, 6), match(metric, 6))


def test_random_keys_are_averaged_over_heads(run):
    for number_format in ("fp32", "fp16"):
        keys = torch.randn(2, 6, 37, 64, generator=torch.Generator().manual_seed(2))
        keys = (8000 * keys).to(FORMATS[number_format])  # the sum over heads is more than float16 holds
        metric = keys.float().mean(dim=1).to(keys.dtype)
        check_margins(run("decide_from_keys", keys, 9), metric, keep_order=True)


def test_images_of_a_batch_are_decided_each_by_itself(run, tied_metric):
    metric = torch.from_numpy(tied_metric(4, 41, seed=8))
    together = run("decide", metric, 7)
    for image in range(4):
        alone = run("decide", metric[image : image + 1], 7)
        assert torch.equal(alone.src[0], together.src[image])
        assert torch.equal(alone.dst[0], together.dst[image])
        assert torch.equal(alone.unm[0], together.unm[image])


@pytest.mark.parametrize(("prefix", "number_format"), PREFIXES_AND_FORMATS)
def test_merging_equals_the_weighted_mean_loop(run, naive, tied_metric, prefix, number_format):
    protected, keep_order = PREFIXES[prefix]
    random = np.random.default_rng(3)
    # rounding to the nearest; Triton's interpreter cuts off what bfloat16 does not hold
    rounding = {"fp32": 1e-5, "fp16": 2**-11, "bf16": 2**-7 if run.name == "interpreter" else 2**-8}[number_format]
    crowded = 0
    for tokens, width, r in ((protected + 13, 5, 0), (protected + 13, 5, 1), (protected + 32, 150, 99)):
        x = torch.from_numpy(random.standard_normal((2, tokens, width))).to(FORMATS[number_format])
        token_size = torch.from_numpy(random.integers(1, 40, (2, tokens, 1))).to(x.dtype)
        matching = match(
            torch.from_numpy(tied_metric(2, tokens, tokens)), r, protected=protected, keep_order=keep_order
        )
        merged, sizes, log_sizes = run("apply_with_log", x, token_size, matching)
        assert (merged.dtype, sizes.dtype) == (x.dtype, torch.float32)
        assert merged.shape[1] == tokens - matching.src.shape[1]
        for image in range(2):
            src, dst, unm = (each[image].tolist() for each in (matching.src, matching.dst, matching.unm))
            crowded = max([crowded, *Counter(dst).values()])
            expected, expected_sizes = naive.merge(
                x[image].double().numpy(), token_size[image, :, 0].double().numpy(), (src, dst, unm), protected
            )
            np.testing.assert_allclose(merged[image].double().numpy(), expected, rtol=1.01 * rounding, atol=1e-5)
            np.testing.assert_array_equal(sizes[image, :, 0].numpy(), expected_sizes)
            np.testing.assert_allclose(log_sizes[image, :, 0].numpy(), np.log(expected_sizes), atol=1e-5)
        stays = protected + matching.unm.shape[1]
        untouched = torch.cat([torch.arange(protected).expand(2, -1), matching.unm], dim=1)
        assert torch.equal(merged[:, :stays], x.gather(1, untouched.unsqueeze(-1).expand(-1, -1, width)))
    assert crowded > 2  # several tokens merged into one


def test_merging_a_merged_batch_again_follows_the_reference(run):
    draw = torch.Generator().manual_seed(4)
    x, metric = torch.randn(3, 50, 33, generator=draw), torch.randn(3, 50, 8, generator=draw)
    token_size = expected_size = torch.ones(3, 50, 1)
    expected = x
    for r in (8, 16, 20):
        matching = match(metric[:, : x.shape[1]], r)
        x, token_size = run("apply", x, token_size, matching)
        expected, expected_size = merge(expected, expected_size, matching)
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(token_size, expected_size)


def test_strided_tokens_and_sizes_are_merged(run):
    draw = torch.Generator().manual_seed(9)
    x = torch.randn(20, 41, 2, generator=draw).permute(2, 1, 0)
    token_size = torch.randint(1, 9, (2, 41, 3), generator=draw).float()[:, :, 1:2]
    matching = match(x, 8)
    for one, other in zip(run("apply", x, token_size, matching), merge(x, token_size, matching), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    merged_size = run("apply", x, token_size, matching, size_dtype=torch.bfloat16)[1]
    assert merged_size.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "name",
    ["deit_distilled", "gap"]
    + [pytest.param(name, marks=pytest.mark.full) for name in ("deit_tiny", "reg4_dinov2", "map", "reg4_gap", "clip")],
)
def test_a_network_computes_what_the_reference_computes(run, make_vit, noise, name):
    from tocom.vit import ReducedViT

    model = make_vit(name)
    images = torch.from_numpy(noise(1, *model.patch_embed.img_size))
    prefix = SimpleNamespace(num_prefix_tokens=model.num_prefix_tokens, has_class_token=model.has_class_token)

    def step(_block, x, token_size, signal, r):
        return run("step", prefix, x, token_size, signal, r)

    reduced = ReducedViT(model, 13)
    torch.testing.assert_close(reduced(images, step), reduced(images), rtol=1e-5, atol=1e-5)
    half = ReducedViT(model.half(), 4)
    assert half(images.half(), step).dtype == torch.float16  # as sizes keep their format, nothing is promoted


def test_what_the_kernels_cannot_do_is_refused(run):
    metric, x = torch.randn(2, 20, 8), torch.randn(2, 20, 8)
    token_size, matching = torch.ones(2, 20, 1), match(metric, 4)
    with pytest.raises(InputError, match="float32, float16 and bfloat16, got metric in torch.float64"):
        run("decide", metric.double(), 4)
    with pytest.raises(InputError, match="got -1"):
        run("decide", metric, -1)
    with pytest.raises(InputError, match="no gradient"):
        run("apply", x.clone().requires_grad_(), token_size, matching)
    for other in ((x[:, :18], token_size[:, :18], matching), (x, token_size[:, :18], matching),
                  (x, token_size, match(metric[:1], 4))):  # fmt: skip
        with pytest.raises(InputError, match="must be made for x of shape"):
            run("apply", *other)


def test_pruning_has_no_kernels(run):
    with pytest.raises(InputError, match="--reduction merge, got 'prune'"):
        run("triton_step", None, PRUNE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("how", ["graph", "compile"])
def test_a_step_is_captured_and_compiled_as_it_is(how):
    """In a CUDA graph, and as part of one compiled function, a step gives the bits that it gives by itself."""
    kernels = importlib.import_module("tocom.triton_merge")
    step = kernels.triton_step(SimpleNamespace(num_prefix_tokens=1, has_class_token=True))
    draw = torch.Generator("cuda").manual_seed(0)
    x, metric = (torch.randn(4, 197, width, device="cuda", generator=draw).half() for width in (384, 64))
    given = 0, x, torch.ones(4, 197, 1, device="cuda").half(), metric, 16
    expected = step(*given)
    if how == "compile":
        found = torch.compile(step, fullgraph=True)(*given)
    else:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step(*given)
        graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.fixture
def kernels():
    """The module under test, with kernels that are compiled."""
    module = importlib.import_module("tocom.triton_merge")
    if module._INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set")
    return module


def test_the_cpu_is_refused_in_one_line(kernels):
    metric = torch.randn(1, 20, 8)
    for call in (
        lambda: kernels.decide(metric, 4),
        lambda: kernels.apply(metric, torch.ones(1, 20, 1), match(metric, 4)),
    ):
        with pytest.raises(InputError, match="run on CUDA devices, got .* on cpu") as refused:
            call()
        assert "\n" not in str(refused.value)


def test_without_triton_the_module_says_so_in_one_line(monkeypatch):
    monkeypatch.delitem(sys.modules, "tocom.triton_merge", raising=False)
    monkeypatch.delattr(tocom, "triton_merge", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(InputError, match="need Triton, which is not installed") as refused:
        importlib.import_module("tocom.triton_merge")
    assert "\n" not in str(refused.value)


def test_nothing_else_in_the_room_needs_triton():
    for file in (ROOT / "tocom").rglob("*.py"):
        names = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {name.name for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module)
        if file.name != "triton_merge.py":
            assert not names & {"triton", "triton.language", "tocom.triton_merge"}, file


class Recorder:
    """Stands in for a kernel and keeps what it would be launched with."""

    def __init__(self, kernel: triton.JITFunction, launches: list) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


def compiled(kernel, args, options, capability: int):
    """A launch, compiled for a GPU that need not be there, specialized as Triton would for these arguments."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64",
                torch.int32: "*i32"}  # fmt: skip
    given = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
    options = {name: given.pop(name) for name in options if name not in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = pointers[value.dtype]
            attributes[index,] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def check_compiles(kernels, monkeypatch, folder, capability, tokens, heads, width, number_format) -> list[str]:
    """Compiles every launch of a block as it would be made; returns the kernels' names."""
    launches = []
    for name in ("_decide_image", "_score_rows", "_rank_image", "_merge_rows"):
        monkeypatch.setattr(kernels, name, Recorder(getattr(kernels, name), launches))
    monkeypatch.setattr(kernels, "_require_usable", lambda name, tensor: None)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    with torch.device("meta"):
        qkv = torch.empty(8, tokens, 3, heads, 64, dtype=FORMATS[number_format])
        x = torch.empty(8, tokens, width, dtype=qkv.dtype)
        matching = kernels.decide_from_keys(qkv.permute(2, 0, 3, 1, 4)[1], 16)
        kernels.apply(x, x[:, :, :1].contiguous(), matching)
    for kernel, args, options in launches:
        binary = compiled(kernel, args, options, capability)
        assert binary.metadata.shared <= 48 << 10  # what a program gets on every GPU
        (folder / "kernel.cubin").write_bytes(binary.asm["cubin"])
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", folder / "kernel.cubin"],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        registers, spilled = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
        assert registers * options["num_warps"] * 32 <= 65536
        assert spilled <= 128  # bytes per thread
        scores = kernel.__name__ in ("_decide_image", "_score_rows")
        has_tensor_cores = bool(re.search(r"mma\S*[.:]b?f16\b", binary.asm["ptx"]))
        assert has_tensor_cores == (scores and number_format != "fp32")
        assert "tf32" not in binary.asm["ptx"]
        print(f"sm{capability} {number_format} N {tokens} H {heads} {kernel.__name__}: {registers} registers, "
              f"{binary.metadata.shared} bytes shared, {spilled} bytes of stack")  # fmt: skip
    return [kernel.__name__ for kernel, _, _ in launches]


def test_a_block_of_deit_small_compiles_into_two_launches(kernels, monkeypatch, tmp_path):
    names = check_compiles(kernels, monkeypatch, tmp_path, 80, 197, 6, 384, "fp16")
    assert names == ["_decide_image", "_merge_rows"]


@pytest.mark.full
@pytest.mark.parametrize(
    ("capability", "shape", "number_format"),
    [(capability, shape, name)
     for capability in (80, 90)
     for shape in ((197, 6, 384), (197, 12, 768), (577, 12, 768), (1025, 16, 1024))
     for name in FORMATS]
    + [(capability, (197, 12, 768), name) for capability in (86, 89, 100, 120) for name in ("fp32", "fp16")],
)  # fmt: skip
def test_every_block_compiles(kernels, monkeypatch, tmp_path, capability, shape, number_format):
    names = check_compiles(kernels, monkeypatch, tmp_path, capability, *shape, number_format)
    assert len(names) == (2 if shape[0] == 197 else 3)


if __name__ == "__main__":
    serve()
