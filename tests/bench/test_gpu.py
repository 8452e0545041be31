"""bench.gpu without a GPU: arithmetic by hand, what is kept, what is refused; and a real run."""

from __future__ import annotations

import doctest
import importlib.util
import re
from dataclasses import replace
from types import SimpleNamespace

import onnx
import pytest
import timm
import torch
from onnx import TensorProto, helper

from bench.gpu import __main__ as command
from bench.gpu import check as run
from bench.gpu import compare as checks
from bench.gpu import machine, reasons
from bench.gpu.compare import FAILED, NOT_RUN, PASSED, Check, planned, run_check
from bench.gpu.contenders import Contender, Field
from bench.gpu.page import write_page
from bench.gpu.speed import rows_of
from bench.gpu.subject import Deployed, Subject, drop_last
from bench.gpu.timing import interleaved, latency
from bench.harness.run import Places, main
from tocom.runtime.errors import GateError, InputError

pytestmark = pytest.mark.bench
HERE = {"GPU": "Made Up 1", "driver": "1.2", "torch": "0.0"}
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
with_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_examples_in_docstrings():
    for module in (reasons, machine):
        assert doctest.testmod(module) in {(0, 1), (0, 2)}


# --- the command


@without_cuda
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "needs a CUDA device, and torch .* finds none"),
        (["--degrees", "4,x"], "--degrees must be numbers of 0 or more .* got '4,x'"),
        (["--batches", "0"], "--batches must be numbers of 1 or more"),
        (["--precision", "int8"], "--precision must be one of fp32, fp16, bf16, got 'int8'"),
        (["--nonsense"], "No such option"),
    ],
)
def test_what_cannot_be_is_one_line_and_status_2(arguments, words, capsys):
    with pytest.raises(SystemExit) as left:
        main("gpu-check", command.gpu_check, arguments=arguments)
    error = capsys.readouterr().err
    assert left.value.code == 2
    assert re.search(words, error) and error.count("\n") == 1


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as left:
        main("gpu-check", command.gpu_check, arguments=["--help"])
    shown = capsys.readouterr().out
    assert left.value.code == 0
    for option in (
        "models",
        "batches",
        "degrees",
        "precision",
        "only",
        "without",
        "seconds",
        "minutes",
        "out",
        "quick",
    ):
        assert f"--{option} " in shown
    assert "goes on" in shown


# --- arithmetic


def contender(name: str, degree: int, bound: bool = False, gmacs: float = 2.0) -> Contender:
    return Contender(name, degree, bound, "events", gmacs, open=lambda stack: None)


def test_ratios_are_taken_round_by_round():
    times = {
        ("ours", 0, False): (4.0, 4.0, 4.0),
        ("ours", 8, False): (2.0, 2.5, 2.0),
        ("ours", 8, True): (2.0, 2.0, 2.0),
        ("peer", 8, False): (3.0, 5.0, 4.0),
    }
    who = {key: contender(*key) for key in times}
    rows = rows_of({key: latency(each) for key, each in times.items()}, who, {0: 4.0, 8: 2.5}, 64, "peer")
    plain, merged, peer = rows  # a slice bound has no row of its own
    assert merged == {
        "contender": "ours", "degree": 8, "clock": "events", "ms": 2.0, "low": 2.0, "high": 2.25, "rounds": 3,
        "speed_up": 2.0,  # the median of 2, 1.6, 2
        "ideal": 1.6, "tax": [0.0, 0.0, 0.125], "over_compile": [1.75, 2.0, 2.0],  # of 0, 0.25, 0; of 1.5, 2, 2
        "tflops": 2 * 2.0 * 64 / 2.0,
    }  # fmt: skip
    assert (plain["speed_up"], plain["ideal"], plain["tax"], plain["over_compile"]) == (1.0, 1.0, None, None)
    assert (peer["speed_up"], peer["over_compile"]) == (None, None)  # its degree 0 did not run


def test_a_contender_that_fails_is_taken_out_and_the_others_go_on():
    turns = []

    def failing(calls):
        turns.append(calls)
        if len(turns) == 3:
            raise RuntimeError("out of memory")
        return 1.0

    timed = {"a": lambda calls: 2.0 * calls, "b": failing}
    times, failures = interleaved(timed, {"a": 1, "b": 7}, seconds=0, min_rounds=5)
    assert set(times) == {"a"} and times["a"].times_ms == (2.0,) * 5
    assert turns == [7, 7, 7] and str(failures["b"]) == "out of memory"


# --- what is timed and compared, on the CPU


@pytest.fixture
def subject(tmp_path, monkeypatch, make_tiny) -> Subject:
    model = make_tiny("deit_tiny_patch16_224", depth=3)
    monkeypatch.setattr(timm, "create_model", lambda name: model)
    return Subject("deit_tiny_patch16_224", tmp_path / "work", device="cpu")


def test_an_unknown_model_is_named(tmp_path):
    with pytest.raises(InputError, match="one that timm knows, got 'resnot'"):
        Subject("resnot", tmp_path)


def means_taken(network, images) -> int:
    with torch.no_grad(), torch.profiler.profile() as profile:
        network(images)
    return sum(event.count for event in profile.key_averages() if event.key == "aten::mean")


def test_what_is_deployed_is_the_reference(subject):
    images = subject.images(2)
    for degree, deciding in ((0, 0), (8, 2)):
        reference = subject.reference(degree)
        with torch.no_grad():
            torch.testing.assert_close(Deployed(reference)(images), reference(images), rtol=0, atol=1e-5)
        assert means_taken(Deployed(reference), images) == deciding  # none behind the last merge that logits depend on


def test_the_slice_bound_drops_the_last_tokens_and_looks_at_none(subject):
    reference, images = subject.reference(8), subject.images(2)
    bound = Deployed(reference, drop_last)
    shapes = []
    for block in reference.model.blocks:
        block.norm2.register_forward_hook(lambda module, given, found: shapes.append(found.shape[1]))
    with torch.no_grad():
        found = bound(images)
        assert shapes == [57, 49, 1]  # 65 tokens; behind the last keys and values, the class token alone goes on
        torch.testing.assert_close(found, reference(images, drop_last), rtol=0, atol=1e-5)
    assert means_taken(bound, images) == 0


def test_less_is_multiplied_where_nobody_reads_it(subject):
    tokens, width = 65, 48
    unread = 9 * width * width * (tokens - 1)  # the last block's projection and MLP, for all but the class token
    queries = width * width * 0 + 2 * tokens * width * (tokens - 1)  # and its attention's two products
    assert subject.gmacs(0) - subject.deployed_gmacs(0) == pytest.approx((unread + queries) / 1e9)
    assert subject.block_products(2)[0] == (130, 3 * width, width)


def test_everybody_takes_part_with_degree_0_first(subject):
    field = Field(subject, 2, "fp16")
    keys = [each.key for each in field.contenders((0, 8))]
    names = {name for name, _, _ in keys}
    ours = {name for name in names if name.startswith("ours")}
    assert len(ours) == 6 and names - ours == {"torch eager fp16", "torch.compile fp16"}
    assert len(keys) == 3 * len(ours) + 2 * 2  # each of ours at 0, at 8, and its slice bound
    assert [degree for _, degree, _ in keys] == sorted(degree for _, degree, _ in keys)
    chosen = replace(field, only=("triton", "EAGER"), without=("graph", "compile"))
    assert {each.name for each in chosen.contenders((0,))} == {"ours, PyTorch and Triton fp16", "torch eager fp16"}


def test_the_reference_passes(subject):
    assert planned(0, "fp16")[0] == "reference, fp32" and not any("Triton" in what for what in planned(0, "fp16"))
    found = run_check(subject, 8, "reference, fp32")
    assert found.verdict == PASSED and found.agreement == 1.0 and found.error <= 1e-5


@without_cuda
def test_what_cannot_run_says_why(subject, monkeypatch, tmp_path):
    pooled = [helper.make_node("GlobalAveragePool", ["pixel_values"], ["pooled"]),
              helper.make_node("Flatten", ["pooled"], ["logits"])]  # fmt: skip
    shapes = {"pixel_values": ["batch", 3, 64, 64], "logits": ["batch", 3]}
    given, put_out = (helper.make_tensor_value_info(name, TensorProto.FLOAT, each) for name, each in shapes.items())
    opset = [helper.make_opsetid("", 20)]
    model = helper.make_model(helper.make_graph(pooled, "tiny", [given], [put_out]), opset_imports=opset, ir_version=10)
    onnx.save(model, tmp_path / "tiny.onnx")
    monkeypatch.setattr(subject, "graph", lambda *which: SimpleNamespace(file=tmp_path / "tiny.onnx"))
    why = {"ONNX Runtime CUDA": "CUDAExecutionProvider does not work here: ONNX Runtime fell back"}
    if importlib.util.find_spec("tensorrt") is None:
        why["TensorRT"] = "backend tensorrt cannot build plans here: No module named 'tensorrt'"
    for library, words in why.items():
        found = run_check(subject, 0, f"{library}, fp32")
        assert found.verdict == NOT_RUN and words in found.why


def test_the_comparison_bites(subject, monkeypatch):
    on_device = subject.on_device

    def scaled(degree, dtype):
        reference = on_device(degree, dtype)
        reference.model.head.weight.data *= 1.01
        return reference

    monkeypatch.setattr(subject, "on_device", scaled)
    found = run_check(subject, 8, "reference, fp32")
    assert found.verdict == FAILED and found.error > found.allowed == pytest.approx(1e-4, rel=2)


def test_another_decision_is_unexplained(subject, monkeypatch):
    """What a wrong kernel would do: the second-best tokens merge."""

    def wrong(model):
        decide, step = checks._plain(model)

        def decide_wrongly(signal, r):
            return decide(-signal.flip(1), r)

        return decide_wrongly, lambda block, x, size, signal, r: step(block, x, size, -signal.flip(1), r)

    monkeypatch.setattr(checks, "_by_triton", wrong)
    found = run_check(subject, 8, "Triton step, fp32")
    assert found.verdict == FAILED and found.unexplained and found.error <= found.allowed


def test_other_means_fail(subject, monkeypatch):
    def scaled(model):
        decide, step = checks._plain(model)

        def scaled_step(*given):
            x, token_size = step(*given)
            return 1.001 * x, token_size

        return decide, scaled_step

    monkeypatch.setattr(checks, "_by_triton", scaled)
    found = run_check(subject, 8, "Triton step, fp32")
    assert found.verdict == FAILED and not found.unexplained and found.error == pytest.approx(1e-3, rel=0.01)
    monkeypatch.setattr(checks, "_by_triton", checks._plain)
    found = run_check(subject, 8, "Triton step, fp32")
    assert found.verdict == PASSED and found.agreement == 1.0 and found.error <= 1e-6


# --- what is kept, and the page


def made_up_group(batch: int = 64) -> dict:
    def row(name, degree, ms, speed_up, ideal, tax, over_compile, tflops):
        return {"contender": name, "degree": degree, "clock": "events", "ms": ms, "low": ms - 0.1, "high": ms + 0.1,
                "rounds": 20, "speed_up": speed_up, "ideal": ideal, "tax": tax, "over_compile": over_compile,
                "tflops": tflops}  # fmt: skip

    rows = [row("ours, X fp16", 0, 4.0, 1.0, 1.0, None, [1.0, 1.1, 1.2], 100.0),
            row("ours, X fp16", 8, 2.0, 2.0, 1.6, [0.01, 0.02, 0.03], [1.2, 1.3, 1.4], 150.0),
            row("torch eager fp16", 8, 3.0, None, 1.6, None, None, 90.0)]  # fmt: skip
    missing = [{"contender": "ours, Y fp16", "degree": degree, "why": "it is not there"} for degree in (0, 8)]
    return {"model": "some_vit", "batch": batch, "precision": "fp16", "degrees": [0, 8], "rows": rows,
            "missing": missing, "block_tflops": 321.0, "date": "2026-01-02"}  # fmt: skip


def cells(text: str) -> list[str]:
    """Lines of a page without the blanks that align its tables."""
    return [re.sub(r" *\| *", "|", line) for line in text.splitlines()]


def test_the_page_tells_everything(tmp_path):
    check = Check("some_vit", 8, "reference, fp32", PASSED, 0.995, 2, 0, 1.5e-6, 1e-4)
    absent = Check("some_vit", 8, "TensorRT, fp32", NOT_RUN, why="not installed")
    write_page({
        "setup": {"command": "python -m bench.gpu", "date": "2026-01-02"}, "machine": HERE,
        "checks": [vars(check), vars(absent)], "matmul": {"fp16": 300.0}, "groups": [made_up_group()],
        "to_do": ["some_vit, batch 8, fp16, all degrees: not timed"],
    }, tmp_path / "page.md")  # fmt: skip
    text = (tmp_path / "page.md").read_text()
    lines = cells(text)
    assert text.startswith("# Engines on Made Up 1\n") and "driver 1.2, torch 0.0." in text
    assert "|some_vit|8|reference, fp32|passed|99.50%|2|0|1.5e-06|1.0e-04||" in lines
    assert "### some_vit, batch 64, fp16" in text and "reach 321 TFLOP/s" in text and "300 TFLOP/s in fp16" in text
    assert ("|8|ours, X fp16|events|20|2.000|1.900 - 2.100|32000|2.00x|125%|+2.0% (+1.0% to +3.0%)"
            "|1.30x (1.20x to 1.40x)|150.0|50%|") in lines  # fmt: skip
    assert "|8|torch eager fp16|events|20|3.000|2.900 - 3.100|21333|||||90.0|30%|" in lines
    not_run = text.partition("## Not run")[2]
    assert "- some_vit, batch 8, fp16, all degrees: not timed\n" in not_run
    assert "- compared, TensorRT, fp32, some_vit, r = 8: not installed\n" in not_run
    assert "- some_vit, batch 64, fp16: ours, Y fp16, r = 0, 8: it is not there\n" in not_run


@pytest.fixture
def options(monkeypatch) -> run.Options:
    monkeypatch.setattr(machine, "describe", lambda: HERE)
    monkeypatch.setattr(run, "matmul_rate", lambda products, dtype: 300.0)
    monkeypatch.setattr(run, "Subject", lambda name, work: name)
    return run.Options(("some_vit",), (64, 256), (0, 8), "fp16", (), (), 1.0, None, anyway=False,
                       command="python -m bench.gpu --out /some/where/page.md")  # fmt: skip


@pytest.fixture
def check(tmp_path):
    """Runs the check with its page in a folder."""
    return lambda options: run.check_gpu(options, lambda name: Places(tmp_path, tmp_path / "page.md"))


def test_a_run_that_was_cut_short_goes_on(options, check, tmp_path, monkeypatch):
    began, compared = [], []

    def compare(subject, degree, what):
        compared.append(what)
        return Check(subject, degree, what, FAILED if len(compared) == 1 else PASSED)

    def measured(field, degrees, seconds, date):
        began.append(field.batch)
        if field.batch == 256 and len(began) == 2:
            raise GateError("the GPU is gone")
        return made_up_group(field.batch)

    monkeypatch.setattr(run, "run_check", compare)
    monkeypatch.setattr(run, "run_group", measured)
    with pytest.raises(GateError, match="1 comparisons failed"):
        check(options)
    once = len(compared)
    with pytest.raises(GateError, match="the GPU is gone"):
        check(options)
    assert len(compared) == once + 1  # what did not pass is tried again, what passed is not
    text = (tmp_path / "page.md").read_text()
    assert "### some_vit, batch 64" in text and "batch 256, fp16, all degrees: not timed; the same command" in text
    assert "/some/where" not in text and "--out page.md" in text
    check(options)
    assert began == [64, 256, 256]  # what was finished is there
    assert "not timed" not in (tmp_path / "page.md").read_text()


def test_times_of_two_machines_are_not_mixed(options, check, monkeypatch):
    check(replace(options, minutes=0.0))
    monkeypatch.setattr(machine, "describe", lambda: {**HERE, "driver": "1.3"})
    with pytest.raises(InputError, match="--fresh"):
        check(options)


def test_nothing_begins_when_the_time_is_over(options, check, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "run_check", None)
    monkeypatch.setattr(run, "run_group", None)
    check(replace(options, minutes=0.0))
    told = " ".join(capsys.readouterr().err.split())
    assert "some_vit, r = 8: reference, fp32 was not compared; the same command goes on there" in told
    assert "some_vit, batch 256, fp16, all degrees: not timed" in told


def test_what_failed_is_not_timed_unless_asked_to(options, check, tmp_path, monkeypatch):
    verdicts = {"Triton step, fp16": FAILED}
    monkeypatch.setattr(
        run, "run_check", lambda subject, degree, what: Check(subject, degree, what, verdicts.get(what, PASSED))
    )
    monkeypatch.setattr(run, "run_group", lambda field, *how: made_up_group(field.batch))
    failed = r"1 comparisons failed, see page\.md: Triton step, fp16 \(some_vit, r = 8\)"
    with pytest.raises(GateError, match=failed + r"\. Nothing was timed"):
        check(options)
    assert "###" not in (tmp_path / "page.md").read_text() and "| failed" in (tmp_path / "page.md").read_text()
    with pytest.raises(GateError, match=failed):
        check(replace(options, anyway=True))
    assert "### some_vit, batch 256" in (tmp_path / "page.md").read_text()


@pytest.mark.gpu
@with_cuda
def test_a_tiny_run(tmp_path):
    out = tmp_path / "page.md"
    arguments = ["--models", "deit_tiny_patch16_224", "--batches", "2", "--degrees", "8", "--seconds", "0",
                 "--without", "compile", "--out", str(out), "--work", str(tmp_path)]  # fmt: skip
    with pytest.raises(SystemExit) as left:
        main("gpu-check", command.gpu_check, arguments=arguments)
    assert left.value.code == 0
    assert "| 8 | ours, PyTorch and Triton fp16, CUDA graph | events |" in out.read_text()
