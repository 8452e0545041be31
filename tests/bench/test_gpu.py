"""bench.gpu and bench.pack_gpu without a GPU: arithmetic by hand, what is kept, what is refused; and a real run."""

from __future__ import annotations

import doctest
import importlib.util
import json
import platform
import re
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import timm
import torch
from onnx import TensorProto, helper

from bench import markdown, pack_gpu
from bench.gpu import __main__ as command
from bench.gpu import checks, machine, reasons, run
from bench.gpu.checks import FAILED, NOT_RUN, PASSED, Check, planned, run_check
from bench.gpu.contenders import Contender, Field
from bench.gpu.page import page
from bench.gpu.speed import Group, Missing, Row, rows_of
from bench.gpu.state import State
from bench.gpu.subject import Deployed, Subject, drop_last
from bench.gpu.timing import interleaved, latency
from tocom.runtime.errors import GateError, InputError

HERE = {"GPU": "Made Up 1", "driver": "1.2", "torch": "0.0"}
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
with_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_examples_in_docstrings():
    for module in (markdown, reasons, machine):
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
        command.main(arguments)
    error = capsys.readouterr().err
    assert left.value.code == 2
    assert re.search(words, error) and error.count("\n") == 1


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as left:
        command.main(["--help"])
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
    assert merged == Row(
        "ours", 8, "events", ms=2.0, low=2.0, high=2.25, rounds=3,
        speed_up=2.0,  # the median of 2, 1.6, 2
        ideal=1.6, tax=(0.0, 0.0, 0.125), over_compile=(1.75, 2.0, 2.0),  # of 0, 0.25, 0; of 1.5, 2, 2
        tflops=2 * 2.0 * 64 / 2.0,
    )  # fmt: skip
    assert (plain.speed_up, plain.ideal, plain.tax, plain.over_compile) == (1.0, 1.0, None, None)
    assert (peer.speed_up, peer.over_compile) == (None, None)  # its degree 0 did not run


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


def made_up_group(batch: int = 64) -> Group:
    rows = (
        Row("ours, X fp16", 0, "events", 4.0, 3.9, 4.2, 20, 1.0, 1.0, None, (1.0, 1.1, 1.2), 100.0),
        Row("ours, X fp16", 8, "events", 2.0, 1.9, 2.1, 20, 2.0, 1.6, (0.01, 0.02, 0.03), (1.2, 1.3, 1.4), 150.0),
        Row("torch eager fp16", 8, "events", 3.0, 2.9, 3.1, 20, None, 1.6, None, None, 90.0),
    )
    missing = (Missing("ours, Y fp16", 0, "it is not there"), Missing("ours, Y fp16", 8, "it is not there"))
    return Group("some_vit", batch, "fp16", (0, 8), rows, missing, 321.0, "2026-01-02")


def test_the_page_tells_everything():
    check = Check("some_vit", 8, "reference, fp32", PASSED, 0.995, 2, 0, 1.5e-6, 1e-4)
    absent = Check("some_vit", 8, "TensorRT, fp32", NOT_RUN, why="not installed")
    text = page(HERE, "python -m bench.gpu", "2026-01-02", [check, absent], {"fp16": 300.0}, [made_up_group()],
                ["some_vit, batch 8, fp16, all degrees: not timed"])  # fmt: skip
    assert text.startswith("# Engines on Made Up 1\n") and "driver 1.2, torch 0.0." in text
    assert "| some_vit | 8 | reference, fp32 | passed | 99.50% | 2 | 0 | 1.5e-06 | 1.0e-04 |  |" in text
    assert "### some_vit, batch 64, fp16" in text and "reach 321 TFLOP/s" in text and "300 TFLOP/s in fp16" in text
    assert ("| 8 | ours, X fp16 | events | 20 | 2.000 | 1.900 - 2.100 | 32000 | 2.00x | 125% | +2.0% (+1.0% to +3.0%) "
            "| 1.30x (1.20x to 1.40x) | 150.0 | 50% |") in text  # fmt: skip
    assert "| 8 | torch eager fp16 | events | 20 | 3.000 | 2.900 - 3.100 | 21333 |  |  |  |  | 90.0 | 30% |" in text
    not_run = text.partition("## Not run")[2]
    assert "- some_vit, batch 8, fp16, all degrees: not timed\n" in not_run
    assert "- compared, TensorRT, fp32, some_vit, r = 8: not installed\n" in not_run
    assert "- some_vit, batch 64, fp16: ours, Y fp16, r = 0, 8: it is not there\n" in not_run


def test_what_was_finished_is_not_done_again(tmp_path):
    done = []

    def measure():
        done.append("group")
        return made_up_group()

    def compare(verdict):
        done.append("check")
        return Check("some_vit", 8, "reference, fp32", verdict)

    file = tmp_path / "state.json"
    for _ in range(2):
        state = State.load(file, HERE)
        group = state.group("some_vit", 64, "fp16", (0, 8), (), measure)
        check = state.check("some_vit", 8, "reference, fp32", lambda: compare(PASSED))
    assert done == ["group", "check"]
    assert group == made_up_group() and check.verdict == PASSED
    assert state.group("some_vit", 64, "fp16", (0, 4), (), None) is None  # other degrees are another group
    state.check("some_vit", 8, "other", lambda: compare(FAILED))
    state.check("some_vit", 8, "other", lambda: compare(FAILED))
    assert done == ["group", "check", "check", "check"]  # what did not pass is tried again


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"machine": {}, "checks": {"a": {"b": 1}}, "groups": {}}'])
def test_another_file_is_refused(tmp_path, content):
    file = tmp_path / "state.json"
    file.write_text(content)
    with pytest.raises(InputError, match="does not hold what this command keeps there"):
        State.load(file, HERE)


def test_times_of_two_machines_are_not_mixed(tmp_path):
    file = tmp_path / "state.json"
    State(file, HERE).save()
    with pytest.raises(InputError, match=r"measured with driver 1\.2, here it is 1\.3: remove it, or name another"):
        State.load(file, {**HERE, "driver": "1.3"})


@pytest.fixture
def options(tmp_path, monkeypatch) -> run.Options:
    monkeypatch.setattr(machine, "describe", lambda: HERE)
    monkeypatch.setattr(run, "matmul_rate", lambda products, dtype: 300.0)
    monkeypatch.setattr(run, "Subject", lambda name, work: name)
    return run.Options(("some_vit",), (64, 256), (0, 8), "fp16", (), (), 1.0, None, tmp_path / "page.md", tmp_path,
                       anyway=False, command=f"python -m bench.gpu --out {tmp_path}/page.md")  # fmt: skip


def test_a_run_that_was_cut_short_goes_on(options, monkeypatch):
    began = []
    monkeypatch.setattr(run, "run_check", lambda subject, degree, what: Check(subject, degree, what, PASSED))

    def measured(field, degrees, seconds, date):
        began.append(field.batch)
        if field.batch == 256 and len(began) == 2:
            raise GateError("the GPU is gone")
        return replace(made_up_group(), batch=field.batch)

    monkeypatch.setattr(run, "run_group", measured)
    with pytest.raises(GateError, match="the GPU is gone"):
        run.run(options)
    text = options.out.read_text()
    assert "### some_vit, batch 64" in text and "batch 256, fp16, all degrees: not timed; the same command" in text
    assert str(options.work) not in text and "--out page.md" in text
    run.run(options)
    assert began == [64, 256, 256]  # what was finished is there
    assert "not timed" not in options.out.read_text()


def test_nothing_begins_when_the_time_is_over(options, monkeypatch, capsys):
    monkeypatch.setattr(run, "run_check", None)
    monkeypatch.setattr(run, "run_group", None)
    run.run(replace(options, minutes=0.0))
    told = capsys.readouterr().err
    assert "some_vit, r = 8: reference, fp32 was not compared; the same command goes on there" in told
    assert "some_vit, batch 256, fp16, all degrees: not timed" in told and "not timed" in options.out.read_text()


def test_what_failed_is_not_timed_unless_asked_to(options, monkeypatch):
    verdicts = {"Triton step, fp16": FAILED}
    monkeypatch.setattr(
        run, "run_check", lambda subject, degree, what: Check(subject, degree, what, verdicts.get(what, PASSED))
    )
    monkeypatch.setattr(run, "run_group", lambda field, *how: replace(made_up_group(), batch=field.batch))
    failed = r"1 comparisons failed, see page\.md: Triton step, fp16 \(some_vit, r = 8\)"
    with pytest.raises(GateError, match=failed + r"\. Nothing was timed"):
        run.run(options)
    assert "###" not in options.out.read_text() and "| failed |" in options.out.read_text()
    with pytest.raises(GateError, match=failed):
        run.run(replace(options, anyway=True))
    assert "### some_vit, batch 256" in options.out.read_text()


@pytest.mark.gpu
@with_cuda
def test_a_tiny_run(tmp_path):
    out = tmp_path / "page.md"
    arguments = ["--models", "deit_tiny_patch16_224", "--batches", "2", "--degrees", "8", "--seconds", "0",
                 "--without", "compile", "--out", str(out), "--work", str(tmp_path)]  # fmt: skip
    with pytest.raises(SystemExit) as left:
        command.main(arguments)
    assert left.value.code == 0
    assert "| 8 | ours, PyTorch and Triton fp16, CUDA graph | events |" in out.read_text()


# --- the pack


def a_wheel(folder: Path, payload: bytes = b"x = 1\n" * 999) -> Path:
    """A package of one module, as small as a wheel may be."""
    folder.mkdir(exist_ok=True)
    file = folder / "made_up_thing-1.0-py3-none-any.whl"
    info = "made_up_thing-1.0.dist-info"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("made_up_thing.py", payload)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: made-up-thing\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return file


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """Packs what is asked for, from a wheel that is there instead of an index."""
    monkeypatch.setattr(pack_gpu, "_requirements", lambda python, rtx: {"made-up-thing": "1.0"})
    monkeypatch.setattr(pack_gpu, "_download", lambda requirement, python, folder: a_wheel(folder))
    python = ".".join(platform.python_version_tuple()[:2])

    def pack(bytes_per_piece=100, recompress=False, python=python):
        pack_gpu.pack(tmp_path / "pack", python, "1", bytes_per_piece / (1 << 20), (), recompress=recompress)
        return tmp_path / "pack"

    return pack


def test_a_pack_is_installed_as_it_was(packed, tmp_path):
    folder = packed()
    manifest = json.loads((folder / "manifest.json").read_text())
    pieces = manifest["files"][0]["pieces"]
    assert len(pieces) > 3 and all((folder / piece["name"]).stat().st_size <= 100 for piece in pieces)
    assert pack_gpu.unpack(folder, tmp_path / "site") == ["made_up_thing-1.0-py3-none-any.whl"]
    assert (tmp_path / "site" / "made_up_thing.py").read_bytes() == b"x = 1\n" * 999


def test_a_recompressed_wheel_holds_the_same_files(packed, tmp_path):
    folder = packed(recompress=True)
    (entry,) = json.loads((folder / "manifest.json").read_text())["files"]
    assert entry["compression"] == "xz"
    wheel = pack_gpu.join(folder, entry, tmp_path)
    with zipfile.ZipFile(wheel) as found, zipfile.ZipFile(a_wheel(tmp_path / "other")) as expected:
        assert {name: found.read(name) for name in found.namelist()} == {
            name: expected.read(name) for name in expected.namelist()
        }
    packed(bytes_per_piece=10**6)  # over the earlier one, whose pieces go
    assert sorted(file.name for file in folder.iterdir()) == [
        "made_up_thing-1.0-py3-none-any.whl.00", "manifest.json"
    ]  # fmt: skip


def spoil_byte(folder):
    piece = sorted(folder.glob("*.whl.*"))[1]
    content = bytearray(piece.read_bytes())
    content[0] ^= 1
    piece.write_bytes(content)


def edit(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (spoil_byte, r"whl\.01 is not what was packed: copy it again"),
        (lambda folder: sorted(folder.glob("*.whl.*"))[1].unlink(), r"whl\.01, a piece of .*, is missing"),
        (lambda folder: edit(folder, lambda m: m["files"][0]["pieces"].reverse()), "joined, is not what was packed"),
        (lambda folder: edit(folder, lambda m: m.update(python="2.7")), "is for Python 2.7, this is"),
        (lambda folder: edit(folder, lambda m: m["files"][0].update(name="../a.whl")), "is not one that this command"),
        (lambda folder: (folder / "manifest.json").unlink(), "must be a folder that was packed"),
    ],
)
def test_a_pack_that_is_not_whole_is_refused_in_one_line(packed, harm, words, tmp_path, capsys):
    folder = packed()
    harm(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        pack_gpu.main(["unpack", str(folder), "--into", str(tmp_path / "site")])
    error = capsys.readouterr().err
    assert left.value.code == 2 and re.search(words, error) and error.count("\n") == 1
    assert not (tmp_path / "site").exists()


def test_a_folder_of_something_else_is_left_alone(packed, tmp_path):
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "mine").write_text("precious")
    with pytest.raises(InputError, match="must be an empty folder, or that of an earlier pack"):
        packed()
    assert (tmp_path / "pack" / "mine").read_text() == "precious"


def test_what_the_other_machine_brings_is_not_packed():
    found = pack_gpu._requirements("3.12", "9.9")
    assert {"onnx", "onnx-ir", "onnxscript", "onnxruntime-gpu", "timm", "typer", "safetensors"} <= set(found)
    assert not {"torch", "torchvision", "numpy", "triton", "nvidia-cublas", "huggingface-hub"} & set(found)
    assert found["tensorrt_rtx_cu13_libs"] == "9.9"
