"""Tiny random ViTs of every family, photographs, exports made once, and oracles for the token reductions."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from filelock import FileLock
from hypothesis import settings
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from timm.layers import Attention
from torch import Tensor, nn

import tocom.export.engine.measure_latency
from tests.oracles import naive_match, naive_merge, naive_prune, naive_select
from tocom.compensator import Compensator, CompensatorInfo
from tocom.export.artifacts import Engine, FusedCheckpoint, OnnxGraph
from tocom.export.family.compile import compile_family
from tocom.export.graph.lower import lower
from tocom.export.graph.weight_store import WeightStore
from tocom.export.source.options import CompileOptions
from tocom.reduction import MERGE, PRUNE, Reduction
from tocom.vit import schedule_for

# An example that takes long on a busy machine is no fault; `make test` tries the same examples everywhere, and
# `make test-full` others every time
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("others", deadline=None, print_blob=True)
settings.load_profile("same")


SPREAD = ("proof/test_matrix.py", "graph/test_lower.py", "graph/test_half_precision.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object | None:
    """A file's tests run in one process, so that what they share is made once.

    Those of a few long files that share nothing are handed out last, one by one, so that all processes end together.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return nodeid if file.endswith(SPREAD) else file

    return ByFile(config, log) if config.getvalue("dist") == "load" else None  # else it was asked for another one


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says in a line what was skipped and why."""
    skipped = terminalreporter.stats.get("skipped", ())
    told = (str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped)
    reasons = Counter("needs a CUDA device" if "CUDA device" in reason else reason for reason in told)
    if reasons:
        why = "; ".join(f"{count}x {reason}" for reason, count in reasons.most_common())
        terminalreporter.write_line(f"skipped {len(skipped)}: {why}")


torch.set_num_threads(1)  # the models are tiny, and worker processes share the cores
os.environ["TOCOM_BACKEND"] = "onnxruntime"  # trying every engine library is tested once
tocom.export.engine.measure_latency._SECONDS, tocom.export.engine.measure_latency._ROUNDS = (
    0.0,
    3,
)  # no test looks at how fast anything is

CLASSES = 10
TINY = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": CLASSES}


def randomize_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every parameter a random value: an untrained LayerScale, norm or bias would hide that it is left out."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        kind = name.rsplit(".", maxsplit=1)[-1]
        if kind == "weight" and parameter.ndim > 1:
            noise = noise / math.sqrt(parameter[0].numel())
        elif kind == "weight":
            noise = 1 + 0.3 * noise
        elif kind == "gamma":
            noise = 0.6 + 0.2 * noise
        else:  # biases, tokens, positions
            noise = 0.4 * noise
        parameter.data.copy_(noise)
    return model.eval().requires_grad_(False)


def tiny_vit(name: str, **overrides: object) -> nn.Module:
    """A real timm architecture in miniature: 64 patches, width 48, random weights."""
    return randomize_(timm.create_model(name, **{**TINY, **overrides}))


def gated_vit() -> nn.Module:
    """A ViT whose attention output is gated, which no timm name offers for a plain VisionTransformer."""
    model = timm.create_model("vit_tiny_patch16_224", **TINY)
    for block in model.blocks:
        block.attn = Attention(TINY["embed_dim"], num_heads=TINY["num_heads"], qkv_bias=True, gated=True)
    return randomize_(model)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "deit_tiny": partial(tiny_vit, "deit_tiny_patch16_224", depth=4),  # at r = 16 its last merge is clamped
    "deit_small": partial(tiny_vit, "deit_small_patch16_224", img_size=(56, 72)),  # an odd number of patches
    "deit_base": partial(tiny_vit, "deit_base_patch16_224", img_size=(48, 80)),
    "deit_distilled": partial(tiny_vit, "deit_tiny_distilled_patch16_224", depth=3),
    "deit3": partial(tiny_vit, "deit3_small_patch16_224"),
    "augreg": partial(tiny_vit, "vit_base_patch16_224"),
    "augreg_384": partial(tiny_vit, "vit_small_patch16_384", img_size=96, patch_size=16, dynamic_img_size=True),
    "gap": partial(tiny_vit, "vit_base_patch16_siglip_gap_224", img_size=72, depth=3),
    "map": partial(tiny_vit, "vit_base_patch16_siglip_224", depth=3),
    "reg4_dinov2": partial(tiny_vit, "vit_small_patch14_reg4_dinov2", depth=3),
    "reg4_dinov2_swiglu": partial(tiny_vit, "vit_giant_patch14_reg4_dinov2"),
    "reg1_gap": partial(tiny_vit, "vit_little_patch16_reg1_gap_256"),
    "reg4_gap": partial(tiny_vit, "vit_so150m_patch16_reg4_gap_256", img_size=(72, 56)),
    "clip": partial(tiny_vit, "vit_base_patch16_clip_224"),  # a norm before the blocks
    "normed": partial(
        tiny_vit, "vit_tiny_patch16_224", qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True, init_values=0.1
    ),
    "gated": gated_vit,
    "avgmax_with_class": partial(tiny_vit, "vit_tiny_patch16_224", global_pool="avgmax"),
    "avg_with_prefix": partial(tiny_vit, "vit_tiny_patch16_224", global_pool="avg", pool_include_prefix=True),
    "max": partial(tiny_vit, "vit_tiny_patch16_224", global_pool="max", class_token=False),
    "hybrid": partial(tiny_vit, "vit_tiny_r_s16_p8_224", img_size=128, patch_size=2),
}
OTHERS = {"two_patches": partial(tiny_vit, "deit_tiny_patch16_224", img_size=(8, 16))}
WITHOUT_CLASS_TOKEN = ("gap", "map", "reg1_gap", "reg4_gap", "max")
LIKE_OTHERS = ("deit_base", "augreg", "reg1_gap")  # what they have others have too: exported in the full run only
DEGREES = (0, 1, 4, 8, 13, 16)
DEFAULT_DEGREES = {"deit_tiny": (0, 8, 16), "deit_distilled": (8,), "map": (16,), "reg4_dinov2": (13,)}
DEFAULT_PRUNED = {"deit_tiny": (8,), "reg4_dinov2": (13,)}


def _export_grid() -> list[object]:
    """Every family at every degree, merging and pruning.

    By default the structurally different ones at several degrees, the others at one each; a few pruning.
    """
    grid = []
    for index, family in enumerate(FAMILIES):
        degrees = () if family in LIKE_OTHERS else DEFAULT_DEGREES.get(family, ((8, 16, 4, 13, 1)[index % 5],))
        default = {MERGE: degrees, PRUNE: DEFAULT_PRUNED.get(family, ())}
        for reduction in (MERGE,) if family in WITHOUT_CLASS_TOKEN else (MERGE, PRUNE):
            for degree in DEGREES:
                marks = () if degree in default[reduction] else pytest.mark.full
                name = f"{family}-r{degree}" + ("" if reduction is MERGE else f"-{reduction.name}")
                grid.append(pytest.param((family, degree, reduction), id=name, marks=marks))
    return grid


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each family's name in turn."""
    return request.param


@pytest.fixture(params=[family for family in FAMILIES if family not in WITHOUT_CLASS_TOKEN])
def class_family(request: pytest.FixtureRequest) -> str:
    """The name of each family with a class token in turn."""
    return request.param


@pytest.fixture(params=_export_grid())
def case(request: pytest.FixtureRequest) -> tuple[str, int, Reduction]:
    """Each family at each of its degrees in turn, with each reduction that it supports."""
    return request.param


KINDS = [
    ("deit_tiny", 0, MERGE),
    ("deit_tiny", 16, MERGE),
    ("deit_tiny", 8, PRUNE),
    ("deit_distilled", 8, MERGE),
    ("map", 16, MERGE),
    ("reg4_dinov2", 13, MERGE),
    ("gap", 4, MERGE),
    ("hybrid", 1, MERGE),
]


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0]}-r{kind[1]}-{kind[2].name}")
def kind(request: pytest.FixtureRequest) -> tuple[str, int, Reduction]:
    """A few of the cases, as different from each other as they get."""
    return request.param


@pytest.fixture(scope="session")
def make_vit() -> Callable[[str], nn.Module]:
    """Builds the tiny model of a family, frozen, in evaluation mode."""
    return lambda name: (FAMILIES | OTHERS)[name]()


@pytest.fixture(scope="session")
def make_tiny() -> Callable[..., nn.Module]:
    """`tiny_vit`, for tests that need a model of their own."""
    return tiny_vit


@pytest.fixture(scope="session")
def make_compensator() -> Callable[..., Compensator]:
    """Builds a compensator with random weights, both sides of every pair."""

    def make(width: int, depth: int, *, seed: int = 0, size: float = 0.3, **info: object) -> Compensator:
        compensator = Compensator(CompensatorInfo(width=width, depth=depth, **info))
        draw = torch.Generator().manual_seed(seed)
        for weight in compensator.parameters():
            weight.data.copy_(size * torch.randn(weight.shape, generator=draw))
        return compensator.eval().requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def photographs() -> Callable[[int, int], np.ndarray]:
    """Five normalized views of scikit-learn's two photographs, float32 [5, 3, H, W]."""
    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    boxes = [(0, 0, 640, 427), (0, 0, 213, 142), (200, 100, 500, 400)]
    views = [photo.crop(box) for box in boxes for photo in photos][:5]

    def sized(height: int, width: int) -> np.ndarray:
        pixels = [np.asarray(view.resize((width, height), Image.Resampling.BICUBIC), np.float32) for view in views]
        return np.ascontiguousarray(((np.stack(pixels) / 255 - 0.5) / 0.25).transpose(0, 3, 1, 2))

    return sized


@pytest.fixture(scope="session")
def noise() -> Callable[..., np.ndarray]:
    """Random images, float32 [B, 3, H, W]."""

    def images(batch: int, height: int, width: int, seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).standard_normal((batch, 3, height, width), dtype=np.float32)

    return images


@pytest.fixture(scope="session")
def fused_of() -> Callable[[nn.Module, int], FusedCheckpoint]:
    """A model's own weights as the weights of a degree: nothing compensated."""

    def fused(model: nn.Module, degree: int) -> FusedCheckpoint:
        return FusedCheckpoint(model.state_dict(), "tiny", degree, 0, None, "a" * 64, None)

    return fused


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Makes a folder once per session: of several test processes the first one makes it, and the others wait for it.

    It is shared, so nobody may change what is in it.
    """
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "shared"
    root.mkdir(exist_ok=True)

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder = root / name
        with FileLock(root / f"{name}.lock"):
            if not folder.exists():
                making = root / f".{name}"
                shutil.rmtree(making, ignore_errors=True)  # of a process that failed on it
                making.mkdir()
                make(making)
                making.rename(folder)
        return folder

    return made


@pytest.fixture(scope="session")
def exported(
    once: Callable[[str, Callable[[Path], object]], Path], fused_of: Callable[[nn.Module, int], FusedCheckpoint]
) -> Callable[..., Engine]:
    """Exports a family at a degree, once per session."""

    @cache
    def export(family: str, degree: int, reduction: Reduction = MERGE) -> Engine:
        model = (FAMILIES | OTHERS)[family]()
        fused = fused_of(model, degree)

        def make(making: Path) -> None:
            store = WeightStore(making)
            graph = lower(model, schedule_for(model, degree), fused, store, "model.onnx", reduction)
            (making / "graph.json").write_text(json.dumps([dict(graph.files), graph.tokens, graph.gmacs]))

        folder = once(f"export-{family}-r{degree}-{reduction.name}", make)
        files, tokens, gmacs = json.loads((folder / "graph.json").read_text())
        graph = OnnxGraph(folder / "model.onnx", files, tuple(tokens), gmacs, fused)
        return Engine(graph.file, "onnxruntime", "fp32", files, graph)

    return export


EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "digits"
SMALL = "vit_tiny_patch16_224"
SMALL_ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="session")
def small_family(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A folder with `model.safetensors`, of SMALL with SMALL_ARGS, and `family`, compiled from it at degree 4.

    To be copied by who changes anything.
    """

    def make(folder: Path) -> None:
        torch.manual_seed(0)
        save_file(timm.create_model(SMALL, num_classes=10, **SMALL_ARGS).state_dict(), folder / "model.safetensors")
        checkpoint = folder / "model.safetensors"
        options = CompileOptions(SMALL, folder / "family", (4,), checkpoint=checkpoint, model_args=SMALL_ARGS)
        assert not compile_family(options).failed

    return once("small-family", make)


@pytest.fixture(scope="session")
def small_example(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The digits example in miniature: a model folder with random weights, `compensator.safetensors` beside them."""

    def make(folder: Path) -> None:
        config = json.loads((EXAMPLE / "config.json").read_text())
        config["model_args"]["depth"] = depth = 2
        (folder / "config.json").write_text(json.dumps(config))
        model = randomize_(timm.create_model(config["architecture"], num_classes=10, **config["model_args"]))
        save_file(model.state_dict(), folder / "model.safetensors")
        torch.manual_seed(0)
        width = config["model_args"]["embed_dim"]
        compensator = Compensator(CompensatorInfo(width=width, depth=depth, backbone=config["architecture"]))
        for weight in compensator.parameters():
            weight.data.normal_(0, 0.3)
        (folder / "compensator.safetensors").write_bytes(compensator.to_safetensors())

    return once("small-example", make)


@pytest.fixture(scope="session")
def engine_at() -> Callable[[Engine, Path], Engine]:
    """An engine whose graph is another file: for graphs that were tampered with."""
    return lambda engine, file: replace(engine, file=file, graph=replace(engine.graph, file=file))


@pytest.fixture
def in_own_folder(engine_at: Callable[[Engine, Path], Engine], tmp_path: Path) -> Callable[[Engine], Engine]:
    """An engine in a folder that no other test uses: for tests that look at what is left there."""

    def copy_of(engine: Engine) -> Engine:
        folder = tmp_path / "own" / engine.file.parent.name
        shutil.copytree(engine.file.parent, folder, ignore=shutil.ignore_patterns(".*"), dirs_exist_ok=True)
        return engine_at(engine, folder / engine.file.name)

    return copy_of


@pytest.fixture(scope="session")
def naive() -> SimpleNamespace:
    """Token reduction with Python loops: deciding for one image, and carrying it out on one image's tokens."""
    return SimpleNamespace(match=naive_match, merge=naive_merge, select=naive_select, prune=naive_prune)


@pytest.fixture(scope="session")
def tied_attention() -> Callable[..., np.ndarray]:
    """Attention full of exact ties and zeros, float32 [B, N]; dyadic, so that every number format holds it."""

    def draw(batch: int, tokens: int, seed: int, dtype: type = np.float32) -> np.ndarray:
        random = np.random.default_rng(seed)
        return random.choice([0, 1 / 64, 1 / 32, 3 / 64, 1 / 4], (batch, tokens), p=[0.3, 0.3, 0.2, 0.1, 0.1]).astype(
            dtype
        )

    return draw


@pytest.fixture(scope="session")
def tied_metric() -> Callable[..., np.ndarray]:
    """Metrics full of exact ties and zero vectors, whose cosines every number format computes without rounding.

    Every vector has 0, 1, 4 or 16 entries of one power of two, so its length is a power of two as well.
    """

    def draw(batch: int, tokens: int, seed: int, dtype: type = np.float32) -> np.ndarray:
        random = np.random.default_rng(seed)
        metric = np.zeros((batch, tokens, 16), dtype)
        for vector in metric.reshape(-1, 16):
            count = random.choice([0, 1, 4, 16], p=[0.1, 0.4, 0.4, 0.1])
            where = random.choice(6 if count < 6 else 16, count, replace=False)
            vector[where] = random.choice([-1, 1], count, p=[0.3, 0.7]) * 2.0 ** random.integers(-20, 11)
        return metric

    return draw


@pytest.fixture(scope="session")
def copy_of() -> Callable[[nn.Module], nn.Module]:
    """A deep copy, for tests that alter a model."""
    return copy.deepcopy


@pytest.fixture(scope="session")
def as_tensor() -> Callable[[np.ndarray], Tensor]:
    """numpy -> torch, sharing memory."""
    return torch.from_numpy
