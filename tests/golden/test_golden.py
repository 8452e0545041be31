"""Golden values hold; where one does not, the message says which libraries changed and which command shows it."""

from __future__ import annotations

import copy
import json

import onnx
import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from tests.golden import __main__ as command
from tests.golden import values
from tests.golden.values import COMMAND, changed_versions, compute, differences, fill_, read


@pytest.fixture(scope="module")
def now(exported):
    return compute(lambda *which: onnx.load(exported(*which).file, load_external_data=False))


def complaint(golden, now):
    """What a failed comparison says; nothing where all is the same."""
    found = differences(golden["values"], now)
    if not found:
        return ""
    lines = [f"{each.where}: {each.old} -> {each.new}" for each in found[:12]]
    changed = ", ".join(changed_versions(golden["versions"])) or "none"
    return "\n".join(
        [*lines, f"{len(found)} golden values differ; libraries that changed: {changed}.",
         f"`{COMMAND}` shows all of them, `{COMMAND} --write` keeps them."]
    )  # fmt: skip


def test_golden_values_hold(now):
    said = complaint(read(), now)
    assert not said, said


@pytest.mark.parametrize(
    ("place", "tampered"),
    [
        (("networks", "map", "logits", 0, 3), lambda value: value * (1 + 1e-7) + 1e-8),
        (("example", "r=8", "decisions", "block 2"), lambda value: value[::-1]),
        (("graphs", "deit", "operators", "MatMul"), lambda value: value + 1),
        (("graphs", "prune", "values"), lambda value: value + " block.9.tokens"),
        (("preprocessing", "bicubic, center", "pixels", 1), lambda value: value + 1 / 255),
    ],
    ids=["logit", "decision", "operators", "names", "pixel"],
)
def test_a_tampered_value_is_told(now, place, tampered):
    golden = copy.deepcopy(read())
    holder = golden["values"]
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = tampered(holder[place[-1]])
    golden["versions"]["numpy"] = "1.0.0"
    said = complaint(golden, now)
    assert said.startswith("/".join(map(str, place)) + ": ")
    assert "1 golden values differ" in said and "numpy 1.0.0 -> " in said and COMMAND in said


def test_what_is_missing_or_new_differs():
    (one,) = differences({"a": 1, "b": 2}, {"a": 1})
    (other,) = differences({"a": 1}, {"a": 1, "b": 2})
    assert (one.where, one.old, one.new) == ("b", 2, None)
    assert (other.where, other.old, other.new) == ("b", None, 2)


def test_the_command_shows_and_keeps(now, tmp_path, monkeypatch):
    file = tmp_path / "golden.json"
    monkeypatch.setattr(values, "FILE", file)
    monkeypatch.setattr(command, "FILE", file)
    monkeypatch.setattr(command, "compute", lambda: now)
    app, run = Typer(), CliRunner().invoke
    app.command()(command.main)
    old = read_as(values, now)
    old["values"]["networks"]["gap"]["logits"][1][2] += 0.5
    file.write_text(json.dumps(old))
    shown = run(app, [])
    assert shown.exit_code == 1 and "1 values differ" in shown.stdout
    assert run(app, ["--write"]).exit_code == 0
    assert run(app, []).exit_code == 0


def read_as(module, now):
    return copy.deepcopy({"versions": module.versions(), "values": now})


def test_weights_belong_to_their_names(make_vit):
    """Filling twice, from whatever was there, gives the same; no two tensors are alike."""
    one, other = (fill_(make_vit(family)).state_dict() for family in ("deit_tiny", "deit_distilled"))
    for name in one.keys() & other.keys():
        if one[name].shape == other[name].shape:
            assert torch.equal(one[name], other[name])
    assert not torch.equal(one["blocks.0.attn.proj.weight"], one["blocks.1.attn.proj.weight"])
    assert all(tensor.abs().max() > 0.1 for tensor in one.values())
