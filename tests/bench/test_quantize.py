"""bench.quantize: comparisons are the textbook's, the page says what is, finished networks are not repeated."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from bench.harness.run import main
from bench.quantize import accuracy as accuracy_module
from bench.quantize.__main__ import quantize
from bench.quantize.accuracy import compared
from bench.quantize.page import change, write_page

pytestmark = pytest.mark.bench


def test_comparison_is_the_textbooks() -> None:
    draw = torch.Generator().manual_seed(0)
    reference, classes = torch.randn(400, 10, generator=draw), torch.randint(10, (400,), generator=draw)
    candidate = reference + 0.5 * torch.randn(400, 10, generator=draw)
    found = compared(reference, candidate, classes)
    right = [(logits.argmax(1) == classes).numpy().astype(float) for logits in (reference, candidate)]
    assert found["change"] == pytest.approx(found["candidate"] - found["reference"]) and found["change"] != 0
    assert found["error"] == pytest.approx(100 * stats.sem(right[1] - right[0]), rel=1e-4)
    p, q = (torch.softmax(logits.double(), 1).numpy() for logits in (reference, candidate))
    nats = np.mean([stats.entropy(*pair) for pair in zip(p, q, strict=True)])
    assert found["divergence"] == pytest.approx(nats, rel=1e-4)


def test_means_take_errors_as_independent() -> None:
    assert change(pd.DataFrame({"change": [-1.0, 0.5], "error": [0.3, 0.4]})) == "-0.25 ± 0.25"


def rows(int8_change: float) -> list[dict]:
    return [{"network": name, "format": form, "degree": degree, "sheets": 512, "reference": 90.0,
             "candidate": 90.0 + int8_change, "change": int8_change, "error": 0.1, "equal": 99.0,
             "divergence": 0.001 * (1 + degree)}
            for form in ("int8", "fp8") for name in ("example", "board-0", "board-1")
            for degree in (0, 16)]  # fmt: skip


@pytest.mark.parametrize(("int8_change", "words"), [
    (-0.1, "loses no more than 0.3 points at any degree: at the most -0.10 ± 0.06, at r = 0"),
    (-0.6, "loses **more than 0.3 points at some degree**: at the most -0.60 ± 0.06"),
])  # fmt: skip
def test_the_page_says_what_the_results_say(int8_change: float, words: str, tmp_path: Path) -> None:
    setup = {"command": "it", "date": "2026-01-01", "machine": "", "libraries": "torch 2", "seeds": [0, 1]}
    write_page({"setup": setup, "rows": rows(int8_change)}, tmp_path / "quantize.md")
    text = (tmp_path / "quantize.md").read_text()
    assert words in text and text.count("**no**") == (2 if int8_change < -0.3 else 0)
    lines = re.sub(r" *\| *", "|", text)
    assert f"|FP8|512|{int8_change:+.2f} ± 0.06|{int8_change:+.2f} ± 0.06|0.001|0.017|" in lines
    assert "|0|90.0, " in lines and "`board`: the most frequent digit" in text
    assert (tmp_path / "quantize-default.png").stat().st_size > 5000


def test_finished_networks_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def accuracy(subject: str, formats: dict) -> list[dict]:
        calls.append((subject, sorted(formats)))
        return [each for each in rows(0.0) if each["network"] == "example"]

    monkeypatch.setattr(accuracy_module, "accuracy", accuracy)
    monkeypatch.setattr("bench.quantize.subjects.subject_named", lambda name: name)
    for _ in range(2):
        with pytest.raises(SystemExit) as left:
            main("it", quantize, arguments=["--quick", "--work", str(tmp_path)])
        assert left.value.code == 0
    assert calls == [("example", ["fp8", "int8", "int8-weights"])]
    assert (tmp_path / "quick" / "quantize.json").exists()


def test_a_network_that_does_not_exist_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main("it", quantize, arguments=["--only", "example,speed", "--work", str(tmp_path)])
    assert left.value.code == 2 and "'speed'" in capsys.readouterr().err
