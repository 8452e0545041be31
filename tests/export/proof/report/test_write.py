"""report.json for machines, report.md and report.html for people: valid, complete, and on their own."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tocom.export.artifacts import Engine, OnnxGraph, Report
from tocom.export.proof.findings import Accuracy, Fault, PairFindings
from tocom.export.proof.gates import GATES
from tocom.export.proof.reference import TorchObserver, in_format
from tocom.export.proof.report.about import About
from tocom.export.proof.report.pictures import MergePicture
from tocom.export.proof.report.plots import as_png, block_figure, merge_figure
from tocom.export.proof.report.tables import beside_table, block_table, degree_table, faults_of, percent
from tocom.export.proof.report.write import finite, to_json, write_report
from tocom.export.proof.validate import validate_observer
from tocom.export.source.images import default_images
from tocom.runtime.errors import InputError
from tocom.vit import ReducedViT

VOID = {"meta", "img", "br", "link", "input"}
ABOUT = About(
    title="engines/<digits>",
    model="deit_tiny_patch16_224",
    candidate="onnxruntime fp32",
    against="torch fp64",
    date="2026-01-05",
    versions={"torch": "2.15.0"},
    checkpoint_sha256="a" * 64,
    command="tocom validate --engines 'my `engines`|<b>'",
)


@pytest.fixture(scope="module")
def passing(make_vit):
    """Degrees 0 and 8 of a tiny network, proven: float32 against float64."""
    model, reports = make_vit("deit_tiny"), {}
    engine = Engine(Path("r08.onnx"), "onnxruntime", "fp32", {}, OnnxGraph(Path("r08.onnx"), {}, (), 0.0, None))
    for degree in (0, 8):
        reference = ReducedViT(model, degree).eval()
        observer = TorchObserver(reference, "fp32")
        found = validate_observer(observer, in_format(reference, "fp64"), default_images((3, 64, 64), 2))
        reports[degree] = Report(engine, found.passed, found)
    assert all(reports.values())
    return reports


@pytest.fixture
def failing(passing):
    """The same with a broken block, numbers that are none among what was found."""
    found, inf = passing[8].findings, float("inf")
    broken = replace(
        found.blocks[1], parts={**found.blocks[1].parts, "reduction": float("nan")},
        margin=inf, unexplained=2, equal=3, output_error=inf,
    )  # fmt: skip
    worst = "logits of the worst image"
    found = replace(
        found, passed=False, unexplained=2, max_logit_error=inf, blocks={**found.blocks, 1: broken},
        gates={**found.gates, worst: replace(found.gates[worst], found=inf)},
        faults=(Fault(1, "reduction", float("nan"), 1.9e-06), Fault(None, worst, inf, 2.9e-06)),
    )  # fmt: skip
    return {**passing, 8: replace(passing[8], passed=False, findings=found)}


def random_pictures(blocks, grid, seed=0, image=None):
    """An image, of noise if none is given, whose patches merge at random, otherwise in both; a sixteenth per block."""
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (64, 64, 3), dtype=np.uint8) if image is None else image

    def merged(block):
        groups = np.arange(grid * grid)
        groups[random.permutation(grid * grid)[: grid * grid * (block + 1) // 16]] = random.integers(0, 8)
        return groups.reshape(grid, grid)

    names = ("onnxruntime fp32", "reference")
    return tuple(
        MergePicture(name, "merge", image, {block: merged(block) for block in range(blocks)}) for name in names
    )


class Page(HTMLParser):
    """Checks that elements nest, and keeps what the tests ask for."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.fetched, self.images, self.texts = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.fetched += [attrs[name] for name in ("src", "href", "xlink:href", "srcset", "data") if name in attrs]
        if tag in ("img", "svg"):
            self.images.append(attrs.get("alt") or attrs.get("aria-label"))
        assert tag not in ("script", "link", "iframe", "object")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}>"

    def handle_data(self, data):
        self.texts.append(data)


def test_three_files(tmp_path, passing):
    written = write_report(tmp_path / "new" / "folder", passing, ABOUT)
    assert [file.name for file in written] == ["report.json", "report.md", "report.html"]
    assert sorted(written) == sorted((tmp_path / "new" / "folder").iterdir())  # nothing else is left there

    found = json.loads(written[0].read_text())
    assert found["format"] == 1 and found["passed"] is True
    assert list(found) == ["format", "passed", "title", "model", "candidate", "against", "date", "versions",
                           "checkpoint_sha256", "compensator_sha256", "command", "degrees"]  # fmt: skip
    assert found["degrees"]["8"]["findings"] == json.loads(json.dumps(passing[8].findings.to_json()))
    assert found["degrees"]["8"]["faults"] == [] and found["degrees"]["0"]["passed"] is True

    text = written[1].read_text()
    assert text.splitlines()[2] == "**PASS**: All 2 degrees hold every gate (r=0, r=8)."
    assert "FAIL" not in text
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_numbers_that_are_none_are_valid_json(failing):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    found = json.loads(json.dumps(to_json(failing, ABOUT, {}), allow_nan=False), parse_constant=refuse)
    assert found["passed"] is False and found["degrees"]["0"]["passed"] is True
    block = found["degrees"]["8"]["findings"]["blocks"]["1"]
    assert block["margin"] == "inf" and block["parts"]["reduction"] == "nan"
    assert float(block["margin"]) == float("inf")
    assert found["degrees"]["8"]["faults"] == list(map(str, failing[8].findings.faults))


def test_faults_stand_first_and_in_words(tmp_path, failing):
    _, markdown, page = write_report(tmp_path, failing, ABOUT)
    lines = markdown.read_text().splitlines()
    assert lines[2] == "**FAIL**: 1 of 2 degrees fails: r=8."
    assert lines[4] == "- **r=8 FAILS**: block 1, reduction: nan, allowed 1.9e-06"
    assert "sizes that remain" in lines[6]
    assert "**nan**" in markdown.read_text()
    banner = re.search(r'<div class="banner fail".*?</div>', page.read_text(), flags=re.DOTALL)[0]
    for fault in failing[8].findings.faults:
        assert str(fault) in banner


def test_a_page_on_its_own(tmp_path, failing):
    text = write_report(tmp_path, failing, ABOUT, {8: random_pictures(3, 8)})[2].read_text()
    page = Page(text)
    assert {"r0", "r8"} <= set(page.ids) and len(page.ids) == len(set(page.ids))
    assert all(each.startswith(("data:image/png;base64,", "#")) for each in page.fetched)
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert {each[1:] for each in page.fetched if each.startswith("#")} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(page.ids)
    assert len(page.images) == 2 + 1 + 2 * 3 and all(page.images)  # plots, the image, two panels for each block
    assert "engines/<digits>" in "".join(page.texts) and "<digits>" not in text
    assert "<b>'" not in text


def test_pictures_are_counted_for_machines_too(passing):
    one, _ = random_pictures(2, 4)
    found = to_json(passing, ABOUT, {8: (one, replace(one, name="reference"))})
    assert found["degrees"]["8"]["pictures"] == {
        "one": "onnxruntime fp32", "other": "reference", "differing_patches": {"0": 0, "1": 0},
    }  # fmt: skip
    assert found["degrees"]["0"]["pictures"] is None


def test_a_large_page_stays_small(tmp_path, passing, photographs):
    """Three degrees, twelve blocks, a photograph each."""
    found = replace(passing[8].findings, blocks=dict.fromkeys(range(12), passing[8].findings.blocks[1]))
    reports = {degree: replace(passing[8], findings=found) for degree in (4, 8, 16)}
    images = (photographs(224, 224).transpose(0, 2, 3, 1) * 64 + 128).clip(0, 255).astype(np.uint8)
    pictures = {degree: random_pictures(12, 14, image=image) for degree, image in zip(reports, images, strict=False)}
    page = write_report(tmp_path, reports, ABOUT, pictures)[2]
    assert page.stat().st_size < 1.5e6


def test_without_matplotlib_the_others_are_written(tmp_path, passing, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'tocom\[report\]'") as raised:
        write_report(tmp_path, passing, ABOUT)
    assert "\n" not in str(raised.value)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_what_it_is_compared_with_may_fail_too(passing):
    against = replace(passing[8].findings, candidate="torch bf16", faults=(Fault(0, "mlp", 1.0, 2e-2),))
    report = replace(passing[8], passed=False, findings=replace(passing[8].findings, against=against))
    (fault,) = faults_of(report)
    assert fault.text == "torch bf16, block 0, mlp: 1.0e+00, allowed 2.0e-02" and "MLP" in fault.meaning
    assert faults_of(Report(report.engine, False, passing[8].findings))  # a failure is never without a word


def test_top1_is_shown_where_it_was_measured(passing):
    assert "top-1" not in degree_table(passing).header
    measured = replace(passing[8].findings, accuracy=Accuracy(top1=0.96, reference_top1=0.97, images=50))
    table = degree_table({**passing, 8: replace(passing[8], findings=measured)})
    assert table.header[-2:] == ("top-1", "reference's top-1")
    assert [[cell.text for cell in row[-2:]] for row in table.rows] == [["-", "-"], ["96.0%", "97.0%"]]


def test_beside_another_engine(passing):
    pair = PairFindings(
        one="openvino bf16", other="torch fp32", images=4, agreement=0.5, images_alike=3, first_difference={0: 1},
        logit_error_alike=1e-3, logit_error_otherwise=None, top1_agreement=1.0, cosine=0.99, kl=1e-4,
    )  # fmt: skip
    table = beside_table(replace(passing[8].findings, pair=pair))
    assert table.header == ("openvino bf16 beside", "torch fp32")
    assert ("logit error elsewhere", "-") in [(name.text, value.text) for name, value in table.rows]
    assert beside_table(passing[8].findings) is None


def test_tables_mark_what_breaks_a_gate(passing, failing):
    assert not any(cell.failing for row in block_table(passing[8].findings).rows for cell in row)
    table = block_table(failing[8].findings)
    marked = {table.header[place] for place, cell in enumerate(table.rows[1]) if cell.failing}
    assert marked == {"unexplained", "margin, u", "reduction"}
    gates = GATES["fp32"]
    assert dict(zip(table.header, table.gate, strict=True))["mlp"] == f"{gates.part:.1f}"
    assert percent(0.99996, 10**6) == "99.99%"
    assert finite({1: (float("-inf"), 2)}) == {"1": ["-inf", 2]}


@pytest.mark.parametrize("degree", [0, 8])
def test_figures_of_any_findings(passing, failing, degree):
    empty = replace(passing[degree].findings, blocks={}, gates={})
    for found in (passing[degree].findings, failing[degree].findings, empty):
        assert as_png(block_figure(found), dpi=20).startswith(b"\x89PNG")


def test_the_figure_of_merges(passing):
    candidate, reference = random_pictures(2, 4)
    figure = merge_figure(reference, candidate)
    assert len(figure.axes) == 2 * 2
    assert "of 16 patches differ" in figure.axes[1].get_title(loc="right")
    assert merge_figure(reference, reference, [1]).axes[1].get_title(loc="right") == "alike"
