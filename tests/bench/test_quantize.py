"""bench.quantize: comparisons are the textbook's, values and decisions are told apart, the page says what is."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import pytest
import timm
import torch
from scipy import stats

from bench.quantize import __main__ as command
from bench.quantize.comparison import against, compared, mean_of, ratio_of, split_of
from bench.quantize.insight import replayed
from bench.quantize.page import write_page
from bench.quantize.protocol import FULL, METHODS, QUICK, RECONSTRUCTED, RULES, STRESS, stress_formats
from bench.quantize.selection import divergence_ratio
from tocom.calib.quantize.calibrate import Method
from tocom.calib.quantize.grids import FORMATS
from tocom.runtime.errors import InputError
from tocom.vit import ReducedViT


def test_comparison_is_the_textbooks():
    draw = torch.Generator().manual_seed(0)
    reference, classes = torch.randn(400, 10, generator=draw), torch.randint(10, (400,), generator=draw)
    candidate = reference + 0.5 * torch.randn(400, 10, generator=draw)
    found = compared(reference, candidate, classes)
    right = [(logits.argmax(1) == classes).numpy().astype(float) for logits in (reference, candidate)]
    assert found["change"] == pytest.approx(found["candidate"] - found["reference"]) and found["change"] != 0
    assert found["error"] == pytest.approx(100 * stats.sem(right[1] - right[0]))
    p, q = (torch.softmax(logits.double(), 1).numpy() for logits in (reference, candidate))
    assert found["divergence"] == pytest.approx(np.mean([stats.entropy(*pair) for pair in zip(p, q, strict=True)]))
    assert found["logit"] == pytest.approx(float(np.abs((candidate - reference).numpy()).mean()))
    gain = against(reference, candidate, reference, classes)
    assert gain["change"] == 0 and gain["gain"] == pytest.approx(-found["change"])


def test_means_and_ratios_are_the_textbooks():
    mean = mean_of([{"change": -1.0, "error": 0.3}, {"change": 0.5, "error": 0.4}])
    assert (mean.mean, mean.error, mean.worst, mean.worst_error) == pytest.approx((-0.25, 0.25, -1.0, 0.3))
    assert mean.within_error and not mean_of([{"change": -1.0, "error": 0.3}]).within_error
    logs = np.random.default_rng(0).normal(0.4, 0.3, 8)
    ratio = ratio_of([[(1.0, float(np.exp(each)))] for each in logs])
    expected = np.exp(stats.ttest_1samp(logs, 0).confidence_interval(0.95))
    assert (ratio.low, ratio.high) == pytest.approx(tuple(expected))
    assert ratio.mean == pytest.approx(np.exp(logs.mean()))
    assert not ratio_of([[(1.0, 5.0)]]).tells, "one observation tells nothing"


def test_divergences_are_compared_at_the_same_network_and_degree():
    base = [{"network": "a", "degree": 0, "divergence": 1.0}, {"network": "a", "degree": 16, "divergence": 100.0}]
    other = [{"network": "a", "degree": 16, "divergence": 50.0}]
    assert divergence_ratio(other, base).mean == pytest.approx(0.5)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **shape).eval().requires_grad_(False)


def test_replay_tells_values_from_decisions(tiny):
    draw = torch.Generator().manual_seed(0)
    pixels, classes = torch.randn(12, 3, 32, 32, generator=draw), torch.randint(10, (12,), generator=draw)
    reference = ReducedViT(tiny, 8)
    only_values, also_decisions = copy.deepcopy(tiny), copy.deepcopy(tiny)
    only_values.head.weight.mul_(1.5)  # behind all decisions
    only_values.head.weight[0] += 0.1
    keys = also_decisions.blocks[0].attn.qkv.weight[24:48]
    keys += 0.02 * torch.randn(keys.shape, generator=draw)
    values = replayed(reference, ReducedViT(only_values, 8), pixels, classes)
    assert values["own"] == values["local"] == [100.0] * 2 and values["same_sheets"] == 100
    assert values["forced"]["divergence"] == pytest.approx(0, abs=1e-9)
    assert values["whole"]["divergence"] == pytest.approx(values["values"]["divergence"])
    assert values["whole"]["divergence"] > 1e-4
    assert split_of([values], "divergence").decisions == pytest.approx(0, abs=1e-9)
    both = replayed(reference, ReducedViT(also_decisions, 8), pixels, classes)
    assert both["own"][0] == both["local"][0] < 100, "nothing comes before the first block"
    assert both["local"][1] > both["own"][1], "errors accumulate"
    assert both["forced"]["logit"] > 0 and both["same_sheets"] < 100
    split = split_of([both], "logit")
    assert split.values + split.decisions == pytest.approx(both["whole"]["logit"])


def test_formats_of_no_engine_are_known_for_a_while_only():
    before = dict(FORMATS)
    with pytest.raises(ZeroDivisionError), stress_formats():
        assert set(FORMATS) == {*before, *STRESS}
        Method(format="w4a4")
        raise ZeroDivisionError
    assert before == FORMATS
    with pytest.raises(InputError):
        Method(format="w4a4")
    assert STRESS["w5a5"].weight.nearest(torch.tensor([-99.0, 99.0])).tolist() == [-15, 15]


def invented(change=0.0, divergence=0.01, gain=0.0, error=0.1):
    return {"sheets": 512, "reference": 90.0, "candidate": 90.0 + change, "change": change, "error": error,
            "equal": 99.0, "divergence": divergence, "logit": 0.1, "gain": gain, "gain_error": error}  # fmt: skip


def invented_results(int8_change=-0.1):
    names, draw = ("example", "board-0", "board-1"), np.random.default_rng(0)
    forms, at = ("int8", "w4a4"), (0, 16)
    nats = {"range mse": 0.002, "range entropy": 0.05}
    gains = {"range mse": 2.0, "rounding gptq": -2.0}
    stages = {
        "default": [{"format": form, "degree": r, **invented(int8_change, 0.001 * (1 + r))} for form in forms
                    for r in at],
        "methods": [{"method": name, "format": form, "degree": r,
                     **invented(divergence=nats.get(name, 0.01), gain=gains.get(name, 0.0))}
                    for name in METHODS for form in forms for r in at],
        "reconstruction": [{"method": name, "format": "w4a4", "degree": r,
                            **invented(divergence=0.005 if "reconstruct" in name else 0.01)}
                           for name in RECONSTRUCTED for r in at],
        "degrees": [{"rule": rule, "format": form, "degree": r, **invented()} for rule in RULES for form in forms
                    for r in at],
        "ranges": [{"weights": weights, "degree": r, "kind": kind, "largest": [1.0 + r, 2.0 + 2 * r],
                    "percentile": [1.0, 1.5]} for weights in ("compensated", "merging only") for r in at
                   for kind in ("qkv", "proj", "fc1", "fc2")],
        "products": [{"degree": r, "product": f"blocks.{block}.attn.{kind}", "divergence": alone}
                     for r in at for block in range(2) for kind, alone in (("qkv", 0.04), ("proj", 0.01))],
        "decisions": [{"format": form, "degree": 16, "blocks": [0, 1], "own": [98.0, 90.0], "local": [98.0, 99.0],
                       "same_sheets": 50.0, "same_logit": None, "whole": invented(-1.0, 0.05),
                       "values": invented(-0.75, 0.01), "forced": invented(-0.5, 0.04)} for form in forms],
        "data": [{"source": source, "images": count, "format": form, "degree": r,
                  **invented(divergence=0.01 if count > 4 else 0.03)}
                 for source, count in (("spread", 128), ("spread", 4), ("spread", 16), ("diverse", 16),
                                       ("synthesized", 64), ("Gaussian noise", 64)) for form in forms for r in at],
    }  # fmt: skip
    noisy = {
        "methods",
        "reconstruction",
        "degrees",
        "data",
    }  # differs by network: an interval
    setup = {"effort": "full", "date": "2026-01-01", "torch": "2", "timm": "1", "python": "3", "seeds": [0, 1],
             "unfinished": []}  # fmt: skip
    found = {
        stage: {
            name: [
                {**each, "divergence": each["divergence"] * draw.uniform(0.98, 1.02)} if stage in noisy else each
                for each in records
            ]
            for name in names
        }
        for stage, records in stages.items()
    }
    return json.loads(json.dumps({"setup": setup, "stages": found}))


def test_the_page_says_what_the_results_say(tmp_path):
    out = tmp_path / "quantize.md"
    write_page(invented_results(), out)
    page = out.read_text()
    assert (
        "the mean over networks loses no more than 0.3 points at any degree. The largest mean loss is -0.10 ± 0.06"
        in page
    )
    assert "INT8's divergence from float32 is 0.001 nats at r = 0 and 0.017 at r = 16, 17 times as much" in page
    assert re.search(r"\| range mse \|.*\| gains \|", page) and re.search(r"\| rounding gptq \|.*\*\*harms\*\*", page)
    assert re.search(r"\| range entropy \|.*5\.\d\dx.*\| further from float32, not in top-1 \|", page)
    assert re.search(r"\| smooth \|.*\| buys nothing \|", page) and "gains: `range mse` (+2.00 points)" in page
    assert re.search(r"Reconstruction at 4 bits, networks: 3. Divergence 0\.(49|50|51)x.*on top of all other", page)
    assert "qkv 17.00x, proj 17.00x, fc1 17.00x and fc2 17.00x the largest magnitude" in page
    assert "blocks.0.attn.qkv (40%)" in page
    assert "most of the divergence comes from flipped decisions" in page
    assert "Its own decisions in place of float32's add -0.25 ± 0.08 points." in page
    assert re.search(r"with 16 or more the divergence is that of 128 within the error; with 4 it is (2\.9|3)", page)
    pictures = re.findall(r"\]\((quantize-[^)]*\.png)\)", page)
    assert len(pictures) == 6
    for picture in pictures:
        assert 5_000 < (tmp_path / picture).stat().st_size < 150_000


def test_a_loss_is_told_as_plainly(tmp_path):
    results = invented_results(int8_change=-0.6)
    results["stages"] = {"default": results["stages"]["default"]}
    results["setup"]["unfinished"] = ["methods-board-0", "data-example", "data-board-0"]
    write_page(results, tmp_path / "quantize.md")
    page = (tmp_path / "quantize.md").read_text()
    assert "the mean over networks loses more than 0.3 points at r = 0 and 16" in page and page.count("**no**") == 2
    assert (
        "Not finished yet, so not in it: methods (1 network) and data (2 networks)." in page
        and "## Decisions" not in page
    )


def test_finished_stages_are_not_repeated(tmp_path, monkeypatch, capsys):
    calls = []

    def run(subject, effort, folder):
        calls.append(subject.name)
        return [{"format": "int8", "degree": degree, **invented()} for degree in effort.degrees]

    monkeypatch.setattr(command, "STAGES", {"default": command.Stage(run, lambda _effort: ("example",))})
    given = {"work": tmp_path, "out": None, "only": "", "quick": True}
    with pytest.raises(SystemExit):
        command.main(**given, report_only=True)
    assert "no finished stage" in capsys.readouterr().err
    command.main(**given, report_only=False)
    command.main(**given, report_only=False)
    assert calls == ["example"]
    assert "A quick trial" in (tmp_path / "quick" / "quantize.md").read_text()
    numbers = json.loads((tmp_path / "quick" / "quantize.json").read_text())
    assert [each["degree"] for each in numbers["stages"]["default"]["example"]] == [0, 16]


def test_a_stage_that_does_not_exist_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as leave:
        command.main(work=tmp_path, out=None, only="default,speed", quick=True, report_only=False)
    error = capsys.readouterr().err
    assert leave.value.code == 2 and len(error.splitlines()) == 1 and "'speed'" in error


def test_every_stage_has_its_networks():
    for effort in (FULL, QUICK):
        found = list(command.jobs(effort, list(command.STAGES)))
        assert len(set(found)) == len(found)
        assert {("default", "missing-0"), ("methods", "board-0"), ("decisions", "letters-0")} <= set(found)
    assert ("methods", "board-2") in set(command.jobs(FULL, ["methods"]))
    assert {stage for stage, _ in command.jobs(FULL, ["methods"])} == {"methods"}
