"""Choosing scales with a real network, and compiling at what was chosen."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from tocom.calib.scale_choice import PAPER_SCALES
from tocom.calib.scales_file import ScaleChoices
from tocom.checkpoint import LoadedModel, load_model
from tocom.compensator import Compensator
from tocom.export.cli import __main__ as cli
from tocom.export.cli.family_table import family_table
from tocom.export.family.compile import compile_family
from tocom.export.family.scales import at_chosen_scales, choose_family_scales
from tocom.export.proof.validate_family import ValidateOptions, validate_family
from tocom.export.source.load import load_source
from tocom.export.source.options import CompileOptions
from tocom.reduction import REDUCTIONS
from tocom.runtime.errors import InputError
from tocom.runtime.manifest import Family
from tocom.runtime.preprocess import find_images, load_image, preprocess
from tocom.schedule import ScheduleFamily
from tocom.vit import ReducedViT, schedule_for

NAME = "deit_tiny_patch16_224"
ARGS = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
BEST, ANSWERING = 0.12, (8, 0.12)  # the images' labels are the network's answers at this degree and scale
TRAINING_SCALE = 0.15


def load(folder: Path) -> tuple[LoadedModel, Compensator]:
    loaded = load_model(NAME, checkpoint=folder / "model.safetensors", **ARGS)
    return loaded, Compensator.load(folder / "compensator.safetensors")


def logits(
    folder: Path, images: Path, degree: int, scale: float, schedule: str = "constant", reduction: str = "merge"
) -> np.ndarray:
    """Of every image below a folder: the unfused compensator beside the untouched weights, image by image."""
    from tocom.export.source.load import input_spec

    loaded, compensator = load(folder)
    spread = schedule_for(loaded.model, degree, ScheduleFamily(schedule))
    compensation = compensator.between(0, degree, scale)
    reference = ReducedViT(loaded.model, spread, compensation, reduction=REDUCTIONS[reduction])
    found = []
    with torch.no_grad():
        for path in find_images([images]):
            pixels = torch.from_numpy(preprocess(load_image(path), input_spec(loaded)))[None]
            found.append(reference(pixels)[0].double().numpy())
    return np.stack(found)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, make_tiny: Callable, make_compensator: Callable) -> Path:
    """A checkpoint, a compensator, and 60 images to choose on, labelled so that one scale is right on all of them."""
    folder = tmp_path_factory.mktemp("given")
    torch.manual_seed(0)
    weights = make_tiny(NAME).state_dict()
    save_file(weights, folder / "model.safetensors")
    compensator = make_compensator(48, 2, backbone=NAME, training_scale=TRAINING_SCALE)
    (folder / "compensator.safetensors").write_bytes(compensator.to_safetensors())
    draw = np.random.default_rng(0)
    (folder / "unsorted").mkdir()
    for index in range(60):
        pixels = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 64)).save(folder / f"unsorted/{index:02d}.png")
    # a random network prefers some classes: they are made equal, so that its answers vary
    weights["head.bias"] -= torch.from_numpy(logits(folder, folder / "unsorted", *ANSWERING).mean(axis=0)).float()
    save_file(weights, folder / "model.safetensors")
    answers = logits(folder, folder / "unsorted", *ANSWERING).argmax(axis=1)
    assert len(set(answers)) > 4
    for index, answer in enumerate(answers):
        split = folder / ("report" if index % 3 == 2 else "images") / str(answer)
        split.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / f"unsorted/{index:02d}.png", split)
    return folder


@pytest.fixture
def options(given: Path, tmp_path: Path) -> CompileOptions:
    return CompileOptions(
        model=NAME,
        out=tmp_path / "out",
        degrees=(8, 4),
        checkpoint=given / "model.safetensors",
        compensator=given / "compensator.safetensors",
        source_degree=0,
        images=given / "images",
        model_args=ARGS,
    )


@pytest.fixture
def chosen(options: CompileOptions, given: Path, tmp_path_factory: pytest.TempPathFactory) -> ScaleChoices:
    """The choice of degrees 4 and 8, made once, copied into this test's folder."""
    once = given / "chosen"
    if not once.exists():
        choose_family_scales(replace(options, out=once))
    options.out.mkdir()
    shutil.copy(once / "scales.json", options.out)
    return ScaleChoices.read(options.out)


def naive_choice(given: Path, images: Path, degree: int, *how: str) -> tuple[float, dict[float, tuple]]:
    labels = np.array([int(path.parent.name) for path in find_images([images])])
    measured = {}
    for scale in (0.0, *PAPER_SCALES):
        rows = logits(given, images, degree, scale, *how)
        log_sums = np.log(np.exp(rows).sum(axis=1))
        loss = (log_sums - rows[np.arange(len(rows)), labels]).mean()
        measured[scale] = ((rows.argmax(axis=1) == labels).sum() / len(labels), loss)
    best = max(share for scale, (share, _) in measured.items() if scale)
    equal = [scale for scale, (share, _) in measured.items() if scale and share == best]
    closest = sorted(equal, key=lambda scale: (abs(scale - TRAINING_SCALE), scale))[0]
    return (0.0 if measured[0.0][0] > best else closest), measured


@pytest.mark.parametrize(("schedule", "reduction"), [("constant", "merge"), ("decreasing", "prune")])
def test_the_choice_is_the_naive_one(
    options: CompileOptions, given: Path, tmp_path: Path, make_compensator: Callable, schedule: str, reduction: str
) -> None:
    how = {"schedule": schedule, "reduction": reduction}
    trained = make_compensator(48, 2, backbone=NAME, training_scale=TRAINING_SCALE, **how)
    (tmp_path / "trained.safetensors").write_bytes(trained.to_safetensors())
    options = replace(options, compensator=tmp_path / "trained.safetensors", **how)
    result = choose_family_scales(options)
    assert result.degrees == (4, 8) and result.images == 40
    assert result.choices == ScaleChoices.read(options.out)
    for degree, choice in result.choices.degrees.items():
        scale, measured = naive_choice(given, options.images, degree, schedule, reduction)
        assert choice.scale == scale
        assert {trial.scale: trial.top1 for trial in choice.tried} == {key: top1 for key, (top1, _) in measured.items()}
        for trial in choice.tried:
            assert trial.cross_entropy == pytest.approx(measured[trial.scale][1], abs=1e-5)
        assert len(set(measured.values())) == 6
    if schedule == "constant":
        shares = {trial.scale: trial.top1 for trial in result.choices.degrees[8].tried}
        assert result.choices.degrees[8].scale == BEST and shares[BEST] == 1 and min(shares.values()) < 0.9


def test_the_source_degree_needs_no_choice(options: CompileOptions) -> None:
    result = choose_family_scales(replace(options, degrees=(0,)))
    assert result.degrees == () and not options.out.exists()


def test_compile_takes_the_choice(options: CompileOptions, chosen: ScaleChoices) -> None:
    """The fused weights are those of the formula at the chosen scale; degrees without a choice take the training's."""
    source = at_chosen_scales(load_source(replace(options, degrees=(4, 8, 12), images=None)))
    assert source.scales == {0: TRAINING_SCALE, 4: chosen.degrees[4].scale, 8: BEST, 12: TRAINING_SCALE}
    before = source.loaded.model.state_dict()
    weights = source.compensator.state_dict()
    for degree in (4, 8, 12):
        fused = source.fused(degree)
        assert fused.delta_scale == source.scales[degree]
        for block in range(2):
            expected = before[f"blocks.{block}.attn.qkv.weight"].double().clone()
            for which, first in (("q", 0), ("v", 96)):
                pair = f"blocks.{block}.attn.{which}_tocom.adapter_"
                ranks = slice(2 * (16 - degree), 32)  # of the last groups
                up, down = (weights[f"{pair}{side}.weight"].double() for side in ("up", "down"))
                expected[first : first + 48] += source.scales[degree] * up[:, ranks] @ down[ranks]
            found = fused.weights[f"blocks.{block}.attn.qkv.weight"].double()
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
            if fused.delta_scale:
                assert (found - before[f"blocks.{block}.attn.qkv.weight"]).abs().max() > 1e-3


def test_the_recipe_holds_the_effective_scale(options: CompileOptions, chosen: ScaleChoices) -> None:
    options = replace(options, images=None)
    taken = at_chosen_scales(load_source(options))
    plain = load_source(options)
    given = at_chosen_scales(load_source(replace(options, delta_scale=BEST)))
    assert given.scales == {0: BEST, 4: BEST, 8: BEST}
    assert taken.recipe(8) == given.recipe(8) != plain.recipe(8)
    assert taken.recipe(0) == plain.recipe(0)


def test_compile_end_to_end(options: CompileOptions, given: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a source degree of 8 to 0, so that one engine is all there is to compile."""
    options = replace(options, source_degree=8, degrees=(0,))
    scale = choose_family_scales(options).choices.degrees[0].scale
    assert scale != TRAINING_SCALE
    kept = (options.out / "scales.json").read_bytes()
    result = compile_family(replace(options, images=given / "report"))
    assert not result.failed and result.family.entry(0).accuracy["images"] == 20
    assert [entry.scale for entry in result.family.engines] == [scale]
    assert (options.out / "scales.json").read_bytes() == kept  # nothing sweeps it away
    assert all(validate_family(ValidateOptions(replace(options, images=None))).reports.values())
    with pytest.raises(InputError, match="must not be chosen on the images that are reported on.*report"):
        choose_family_scales(replace(options, images=given / "report"))
    assert (options.out / "scales.json").read_bytes() == kept

    def shown(family: Family) -> str:
        Console(width=200).print(family_table(family, options.out))
        return capsys.readouterr().out

    assert "scale" not in shown(result.family)
    another = replace(result.family.entry(0), degree=4, scale=0.07)
    source_degree = replace(another, degree=8, scale=0.1)
    table = shown(result.family.with_entry(another).with_entry(source_degree))
    assert "scale" in table and "0.07" in table and f"{scale:g}" in table and "0.1 " not in table


def test_merging_only_can_be_the_choice(options: CompileOptions, chosen: ScaleChoices) -> None:
    none = chosen.with_choice(8, replace(chosen.degrees[8], scale=0.0), chosen.images_of([8]))
    none.write(options.out)
    source = at_chosen_scales(load_source(replace(options, images=None)))
    plain = source.loaded.model.state_dict()
    fused = source.fused(8)
    assert fused.delta_scale == 0 and all(torch.equal(fused.weights[name], plain[name]) for name in plain)


def test_images_of_the_choice_are_not_reported_on(
    options: CompileOptions, chosen: ScaleChoices, given: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="40 of the 40 images to report on were used to choose the scales"):
        compile_family(options)
    mixed = Path(shutil.copytree(given / "report", tmp_path / "mixed"))
    used = next((given / "images").rglob("*.png"))
    shutil.copy(used, mixed / used.parent.name / "under_another_name.png")
    with pytest.raises(InputError, match="1 of the 21 images"):
        compile_family(replace(options, images=mixed))
    assert {file.name for file in options.out.iterdir()} == {"scales.json"}
    at_chosen_scales(load_source(replace(options, images=given / "report")))
    at_chosen_scales(load_source(replace(options, images=mixed, delta_scale=0.1)))  # the choice is not in use
    at_chosen_scales(load_source(replace(options, images=mixed, degrees=(12,))))  # nor here
    at_chosen_scales(load_source(replace(options, images=mixed, compensator=None)))
    at_chosen_scales(load_source(replace(options, images=given / "unsorted")))  # no labels, nothing to report


CHANGES: dict[str, Callable[[dict], object]] = {
    "another checkpoint": lambda content: content.update(checkpoint_sha256="0" * 64),
    "another compensator": lambda content: content.update(compensator_sha256="0" * 64),
    "source degree 2, not 0": lambda content: content.update(source_degree=2),
    "schedule decreasing, not constant": lambda content: content.update(schedule="decreasing"),
    "reduction prune, not merge": lambda content: content.update(reduction="prune"),
    "another input": lambda content: content["input"].update(crop_pct=0.5),
}


@pytest.mark.parametrize("what", CHANGES)
def test_choices_for_another_network(options: CompileOptions, chosen: ScaleChoices, what: str) -> None:
    file = options.out / "scales.json"
    content = json.loads(file.read_text())
    CHANGES[what](content)
    file.write_text(json.dumps(content))
    before = file.read_bytes()
    with pytest.raises(InputError, match=f"{what}.*--scale"):
        compile_family(options)
    with pytest.raises(InputError, match=f"{what}.*--replace"):
        choose_family_scales(options)
    assert file.read_bytes() == before
    assert at_chosen_scales(load_source(replace(options, delta_scale=0.1))).scales[8] == 0.1


def test_replacing_choices(options: CompileOptions, chosen: ScaleChoices) -> None:
    for content in (json.dumps({**chosen.to_json(), "checkpoint_sha256": "0" * 64}), "broken"):
        (options.out / "scales.json").write_text(content)
        result = choose_family_scales(replace(options, degrees=(4,), limit=8, replace=True))
        assert set(result.choices.degrees) == {4} and result.images == 8
        assert ScaleChoices.read(options.out) == result.choices


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["tocom", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code


def command(options: CompileOptions, name: str, *further: object) -> list[object]:
    model = ["--model", NAME, *(part for key, value in ARGS.items() for part in ("--model-arg", f"{key}={value}"))]
    files = ["--checkpoint", options.checkpoint, "--compensator", options.compensator, "--out", options.out]
    return [name, *model, *files, "--source-degree", 0, *further]


def test_the_command(options: CompileOptions, given: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    arguments = command(options, "choose-scale", "--images", given / "images", "--degrees", "0,8", "--scales", "0.2")
    assert run(monkeypatch, *arguments) == 0
    first = capsys.readouterr().out
    for word in ("merging only", "0.05", "0.2", "100.0% ", "*", "40 images", "standard error", "source degree"):
        assert word in first
    file = options.out / "scales.json"
    written = file.stat().st_mtime_ns
    assert run(monkeypatch, *arguments) == 0
    assert capsys.readouterr().out == first and file.stat().st_mtime_ns == written  # nothing measured again


def test_bad_input(options: CompileOptions, given: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def refused(*words: str, degrees: str = "8", images: Path = given / "images", further: tuple = ()) -> None:
        arguments = command(options, "choose-scale", "--images", images, "--degrees", degrees, *further)
        assert run(monkeypatch, *arguments) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tocom: ")]
        assert len(errors) == 1 and all(word in errors[0] for word in words), errors

    refused("one folder per class", "unsorted", images=given / "unsorted")
    refused("nowhere", images=given / "nowhere")
    refused("0..16", "17", degrees="17")
    refused("eight", degrees="eight")
    refused("scales must be numbers", "much", further=("--scales", "0.2,much"))
    refused("finite", "nan", further=("--scales", "nan"))
    refused("schedule", "decreasing", further=("--schedule", "decreasing"))
    assert not options.out.exists()
    options.out.mkdir()
    (options.out / "scales.json").write_text("{}")
    refused("scales.json", "format")
    assert run(monkeypatch, *command(options, "compile", "--degrees", 8)) == 2
    assert "scales.json: the key format is missing" in capsys.readouterr().err
    assert [file.name for file in options.out.iterdir()] == ["scales.json"]
