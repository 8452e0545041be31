"""The native merge operator: the algorithm under sanitizers against the loop over tokens, and its build."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import layer_norm

import tocom.runtime.native
from tocom.merging import match
from tocom.runtime.errors import InputError
from tocom.runtime.native import SOURCE, build, library

DRIVER = Path(__file__).with_name("merge_driver.cpp")


@dataclass(frozen=True)
class Case:
    metric: np.ndarray  # [H, N, D]
    r: int
    protected: int
    keep_order: bool
    half: bool
    seed: int
    fused: bool = False

    @property
    def tokens(self) -> int:
        return self.metric.shape[1]

    @property
    def x(self) -> np.ndarray:
        return self._normal(self.seed, self.tokens, 1 + self.seed % 37)

    @property
    def size(self) -> np.ndarray:
        return np.random.default_rng(self.seed + 1).integers(1, 30, self.tokens).astype(np.float32)

    @property
    def addend(self) -> np.ndarray:
        return self._normal(self.seed + 2, *self.x.shape)

    @property
    def norm(self) -> tuple[np.ndarray, np.ndarray]:
        """Weight and bias."""
        return self._normal(self.seed + 3, self.x.shape[1]), self._normal(self.seed + 4, self.x.shape[1])

    @staticmethod
    def _normal(seed: int, *shape: int) -> np.ndarray:
        return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)

    def encoded(self) -> bytes:
        metric = self.metric.transpose(1, 0, 2)  # [N, H, D], as keys leave their projection
        header = (self.tokens, self.x.shape[1], self.metric.shape[2], len(self.metric), self.r, self.protected,
                  self.keep_order, self.half, 1 + self.seed % 3, self.fused)  # fmt: skip
        around = (self.addend, *self.norm) if self.fused else ()
        return b"".join(each.tobytes() for each in (np.array(header, np.uint64), self.x, self.size, metric, *around))


@pytest.fixture(scope="module")
def run_driver(tmp_path_factory):
    """Cases -> their answers, computed by a driver with address and undefined-behaviour sanitizers."""
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    program = tmp_path_factory.mktemp("driver") / "driver"
    flags = ("-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined",
             "-fno-sanitize-recover=all", f"-I{SOURCE}")  # fmt: skip
    subprocess.run([compiler, *flags, str(DRIVER), "-o", str(program)], check=True)

    def run(cases: list[Case]) -> list[tuple[np.ndarray, ...]]:
        given = b"".join(case.encoded() for case in cases)
        done = subprocess.run([program], input=given, check=False, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()[-3000:]
        answers, at = [], 0
        for case in cases:
            left, width = case.tokens - case.r, case.x.shape[1]
            sources = len(range(case.protected + case.protected % 2, case.tokens, 2))
            parts = []
            around = ((left * width, "f4"), (left, "f4")) if case.fused else ()
            for count, kind in ((left * width, "f4"), (left, "f4"), *around, (case.r, "i8"), (case.r, "i8"),
                                (sources - case.r, "i8")):  # fmt: skip
                parts.append(np.frombuffer(done.stdout, kind, count, at))
                at += parts[-1].nbytes
            answers.append((parts[0].reshape(left, width), *parts[1:]))
        assert at == len(done.stdout)
        return answers

    return run


def shapes(count: int, seed: int, *, smallest: int = 2):
    """Random sizes, small ones often; r from nothing to all there is."""
    random = np.random.default_rng(seed)
    for number in range(count):
        protected, free = int(random.integers(0, 6)), int(random.choice([smallest, 2, 3, 5, 16, 17, 33, 40]))
        yield number, protected, free, int(random.integers(0, free // 2 + 1)), bool(random.integers(2))


def rounded(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).bfloat16().float().numpy()


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_equals_the_loop_with_exact_ties_and_zero_vectors(run_driver, naive, tied_metric, half):
    cases = [
        Case(tied_metric(1, protected + free, seed=number), r, protected, keep_order, half, number)
        for number, protected, free, r, keep_order in shapes(150, seed=1)
    ]
    for case, (merged, sizes, *decisions) in zip(cases, run_driver(cases), strict=True):
        expected = naive.match(case.metric[0].tolist(), case.r, case.protected, case.keep_order)
        assert [each.tolist() for each in decisions] == list(expected)
        x = rounded(case.x) if half else case.x
        tokens, expected_sizes = naive.merge(x, case.size, expected, case.protected)
        np.testing.assert_allclose(merged, tokens, rtol=2**-8 if half else 1e-5, atol=1e-6)
        np.testing.assert_array_equal(sizes, expected_sizes)


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_what_stands_around_a_merge_is_done_with_it(run_driver, naive, half):
    """The residual before it, the layer norm behind it, and the logarithm of the sizes."""
    cases = [
        Case(np.random.default_rng(number).standard_normal((2, protected + free, 8), dtype=np.float32), r, protected,
             keep_order, half, number, fused=True)
        for number, protected, free, r, keep_order in shapes(150, seed=4)
    ]  # fmt: skip
    error = {"rtol": 2**-8, "atol": 2**-7} if half else {"rtol": 1e-5, "atol": 1e-5}
    for case, (merged, sizes, normed, logs, *decisions) in zip(cases, run_driver(cases), strict=True):
        x, addend = (rounded(each) if half else each for each in (case.x, case.addend))
        tokens, expected_sizes = naive.merge(
            x + addend, case.size, [each.tolist() for each in decisions], case.protected
        )
        np.testing.assert_allclose(merged, tokens, **error)
        np.testing.assert_array_equal(sizes, expected_sizes)
        np.testing.assert_allclose(logs, np.log(expected_sizes), **error)
        weight, bias = (torch.from_numpy(each).double() for each in case.norm)
        if case.x.shape[1] > 4:  # of two or three numbers the variance may be as small as the rounding
            expected = layer_norm(torch.from_numpy(np.asarray(tokens)).double(), weight.shape, weight, bias, 1e-6)
            scale = float(weight.abs().max() + bias.abs().max())
            assert np.abs(normed.reshape(expected.shape) - expected.numpy()).max() < (2**-6 if half else 1e-4) * scale


def test_the_mean_over_heads_is_what_tokens_are_matched_on(run_driver, naive):
    random = np.random.default_rng(0)
    cases = [
        Case(random.standard_normal((heads, 1 + free, 8), dtype=np.float32), free // 2, 1, True, False, heads)
        for heads in (1, 2, 3, 6)
        for free in (5, 24, 64)
    ]
    for case, (_, _, *decisions) in zip(cases, run_driver(cases), strict=True):
        expected = naive.match(case.metric.mean(0).tolist(), case.r, 1, True)
        assert [each.tolist() for each in decisions] == list(expected)


def test_what_is_not_a_number_ranks_first_as_in_pytorch_and_never_crashes(run_driver):
    random = np.random.default_rng(3)
    cases = []
    for number, protected, free, r, keep_order in shapes(200, seed=2, smallest=1):
        metric = random.standard_normal((1, protected + free, 4), dtype=np.float32)
        strange = random.choice([np.nan, np.inf, -np.inf, 3e38, 1e-45, 0.0], metric.shape)
        metric = np.where(random.random(metric.shape) < 0.2, strange, metric).astype(np.float32)
        cases.append(Case(metric, r, protected, keep_order, False, number))
    for case, (_, sizes, *decisions) in zip(cases, run_driver(cases), strict=True):
        assert sizes.sum() == case.size.sum()
        if case.tokens < case.protected + 2:
            continue
        with np.errstate(all="ignore"):
            finite = np.isfinite((case.metric**2).sum())
        expected = match(torch.from_numpy(case.metric), case.r, protected=case.protected, keep_order=case.keep_order)
        if finite or np.isnan(case.metric).any():
            assert [each.tolist() for each in decisions] == [
                each[0].tolist() for each in (expected.src, expected.dst, expected.unm)
            ]


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    """What this machine's user has built lies elsewhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def copying_compiler(tmp_path, monkeypatch):
    """A compiler that is quick: it writes down what it was asked for."""
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nfor last in "$@"; do :; done\necho "$@" > "$last"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))


def test_where_the_package_cannot_be_written_the_users_cache_is(tmp_path, monkeypatch, capsys, copying_compiler):
    (tmp_path / "package").write_text("a file, so that no folder can be made below")
    built = tmp_path / "package" / "built"
    monkeypatch.setattr(tocom.runtime.native, "BUILT", built)
    assert tocom.runtime.native.main() == 0
    file = library()
    assert file.parent == tmp_path / "cache/tocom/native" and "openvino_operators.cpp" in file.read_text()
    assert capsys.readouterr().out == f"native merge operator: {file}, because {built} cannot be written\n"
    (file.parent / "openvino-of-yesterday.so").touch()
    assert build(force=True) == file and list(file.parent.iterdir()) == [file]


def test_where_nothing_can_be_written_both_places_are_told(tmp_path, monkeypatch, copying_compiler):
    (tmp_path / "package").touch()
    (tmp_path / "cache").touch()
    monkeypatch.setattr(tocom.runtime.native, "BUILT", tmp_path / "package/built")
    with pytest.raises(InputError, match=r"cannot be written to .*package/built \(.*\) or to .*tocom/native \("):
        build()


@pytest.mark.full
def test_the_library_is_built_once_and_again_when_forced(tmp_path, monkeypatch):
    monkeypatch.setattr(tocom.runtime.native, "BUILT", tmp_path / "built")
    assert library() is None
    file = build()
    assert library() == file and file.parent == tmp_path / "built"
    made = file.stat().st_mtime_ns
    (file.parent / "openvino-of-yesterday.so").touch()
    assert build() == file and file.stat().st_mtime_ns == made
    assert build(force=True) == file and file.stat().st_mtime_ns > made
    assert list(file.parent.iterdir()) == [file]


def test_without_a_compiler_it_says_what_is_used_instead(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tocom.runtime.native, "BUILT", tmp_path / "built")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match="no C\\+\\+ compiler .*no-such-compiler"):
        build()
    assert tocom.runtime.native.main() == 0
    told = capsys.readouterr()
    assert len(told.err.splitlines()) == 1 and "function body" in told.err and not told.out


def test_a_failing_compiler_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tocom.runtime.native, "BUILT", tmp_path / "built")
    monkeypatch.setattr(tocom.runtime.native, "_FLAGS", ("-include/no/such.h",))
    with pytest.raises(InputError, match="does not compile here"):
        build()
    assert library() is None and not list((tmp_path / "built").iterdir())
