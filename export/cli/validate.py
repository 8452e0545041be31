"""`tocom validate`: validates a family, says where one goes wrong, and writes the report."""

from __future__ import annotations

import shlex
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter
from rich.markup import escape

from tocom.export.cli.console import complain, open_console, stages
from tocom.export.cli.exits import Exit
from tocom.export.cli.extras import require_extra
from tocom.export.cli.options import (
    MEASURING,
    Checkpoint,
    CompensatorFile,
    Degrees,
    FamilyFolder,
    Limit,
    Model,
    ModelArgs,
    NumClasses,
    existing,
    flag,
    option,
    whole,
)
from tocom.export.cli.reading import read_model_args
from tocom.export.proof.side import ENGINES, REFERENCE, Side
from tocom.runtime.errors import InputError, one_line

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tocom.export.artifacts import Engine, Report
    from tocom.export.proof.validate_family import FamilyValidation, ValidatedDegree, ValidateOptions
    from tocom.export.source.options import CompileOptions

COMPARISON = Group("What is compared", sort_key=7)
FINDINGS = Group("What is found", sort_key=8)
_SIDE = (
    "engines (as listed), torch:fp64|fp32|bf16|fp16, BACKEND:PRECISION (the same graph there), or the folder of "
    "another family of the checkpoint"
)


_VERSIONS = ("torch", "timm", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino")  # of the report, where installed


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Origin:
    """What the family was made from, where its compile.toml does not say, or files have moved."""

    model: Model | None = None
    checkpoint: Checkpoint = None
    compensator: CompensatorFile | None = None
    num_classes: NumClasses = None
    model_arg: ModelArgs = ()

    def files_of(self, family: Path, degrees: tuple[int, ...], images: Path | None, limit: int) -> CompileOptions:
        """What the family's engines are compared with is made from these.

        Raises:
            InputError: If a model argument is no pair.
        """
        from tocom.export.source.options import CompileOptions

        return CompileOptions(
            model=self.model, out=family, degrees=degrees, checkpoint=self.checkpoint, compensator=self.compensator,
            images=images, limit=limit, num_classes=self.num_classes, model_args=read_model_args(self.model_arg),
        )  # fmt: skip


def _read_side(text: str) -> str:
    """Checks that a side of a comparison can be meant."""
    Side.read(text)
    return text


_AS_RECORDED = Origin()


def validate_command(
    family: FamilyFolder,
    /,
    *,
    origin: Origin = _AS_RECORDED,
    degrees: Degrees = (),
    images: Annotated[
        Path | None,
        existing("Folder of images; with one folder per class, top-1 is measured too.", panel=MEASURING,
                 metavar="FOLDER"),
    ] = None,
    limit: Limit = 500,
    candidate: Annotated[
        str, option(f"What is validated: {_SIDE}.", panel=COMPARISON, read=_read_side, metavar="WHO")
    ] = ENGINES,
    against: Annotated[
        str,
        option(
            "What it is compared with, likewise. Beside anything but torch:fp64 or fp32 both are validated against "
            "float64, then compared with each other.",
            panel=COMPARISON, read=_read_side, metavar="WHO",
        ),
    ] = REFERENCE,
    batch: Annotated[
        int | None,
        whole("Images per call; engines are prepared for that many. Default: for any number.", 1, panel=COMPARISON),
    ] = None,
    compare: Annotated[
        bool,
        flag("Also compare each degree across all engine libraries that run here (Polygraphy).", panel=COMPARISON),
    ] = False,
    per_block: Annotated[
        bool, flag("Also show decisions and errors block by block.", panel=FINDINGS)
    ] = False,
    report: Annotated[
        Path | None, option("Write report.json, report.md and report.html there.", panel=FINDINGS, metavar="FOLDER")
    ] = None,
    image: Annotated[
        Path | None,
        option(
            "An image whose merged patches the report shows, reference beside candidate.", panel=FINDINGS,
            metavar="FILE",
        ),
    ] = None,
    bisect: Annotated[
        Path | None,
        option(
            "For each degree that fails, say which operator of which block is the first to be wrong, and which blocks "
            "kept in float32 bring it back; and write the smallest piece of its graph that its engine library fails on "
            "there, as rNN.onnx (Polygraphy).",
            panel=FINDINGS, metavar="FOLDER",
        ),
    ] = None,
) -> None:  # fmt: skip
    """Validate the engines of a family once more, against the reference made from the original files.

    The family's compile.toml says where these lie; name the ones that have moved. Decisions and values are checked
    apart: an engine that decides otherwise at a tie passes, one that computes otherwise does not, however small the
    difference in its logits. Writes nothing but the report and what --bisect finds.

    Examples of use:

        tocom validate engines/my
        tocom validate engines/my --images val-images --report report --per-block
        tocom validate engines/my --checkpoint moved/my.safetensors --degrees 8
        tocom validate engines/my --candidate openvino:bf16 --bisect pieces

    Exit status: 0 all pass, 1 an engine fails, 2 bad input.

    See also: `tocom compile`, `tocom inspect`.
    """
    _require_folder("--bisect", bisect)
    _require_report(report, image)
    require_extra("compile", "validating")
    if compare:
        require_extra("polygraphy", "--compare")
    if report is not None:
        require_extra("report", "--report")
    files = origin.files_of(family, degrees, images, limit)
    from tocom.export.proof.report.terminal import block_table, fault_lines, pair_table, verdict_table
    from tocom.export.proof.validate_family import ValidateOptions, validate_family

    options = ValidateOptions(files, candidate, against, batch)
    with stages(len(degrees) or None) as notify:
        validation = validate_family(options, notify)
    console = open_console()
    console.print(verdict_table(validation.reports, escape(f"validation of {family}")))
    for line in fault_lines(validation.reports):
        console.print(f"[red]{escape(one_line(line))}[/]")
    if any(each.findings.pair for each in validation.reports.values()):
        console.print(pair_table(validation.reports))
    if per_block:
        console.print(block_table(validation.reports))
    if report is not None:
        _write_report(report, image, validation, options)
    if bisect is not None:
        for degree, validated in validation.degrees.items():
            if validation.reports[degree].findings.faults:
                _locate(degree, validated, validation.reports[degree], candidate)
    _examine(validation.reports, comparing=compare, folder=bisect)
    if not all(validation.reports.values()):
        raise Exit(1)


def _require_folder(option: str, folder: Path | None) -> None:
    """Refuses, before work begins, what can be no folder."""
    if folder is not None and folder.exists() and not folder.is_dir():
        raise InputError(f"{option} must be a folder, got the file {one_line(folder)}")


def _examine(reports: Mapping[int, Report], *, comparing: bool, folder: Path | None) -> None:
    """What Polygraphy does; where it is not installed, --bisect has said all but the smallest piece of the graph."""
    if not comparing and (folder is None or all(reports.values())):
        return
    try:
        from tocom.export.cli.inspect_graph import examine
    except InputError as missing:
        complain(f"no smallest failing piece: {missing}")
        return
    examine(reports, comparing=comparing, folder=folder)


def _require_report(report: Path | None, image: Path | None) -> None:
    """Refuses, before work begins, what can be no report."""
    _require_folder("--report", report)
    if image is not None and report is None:
        raise InputError("--image is for the report: name its folder with --report.")
    if image is not None and not image.is_file():
        raise InputError(f"--image must be an image file, got {one_line(image)}")


def _locate(degree: int, validated: ValidatedDegree, report: Report, candidate: str) -> None:
    """Says which operator of the block at fault is the first to be wrong, and which blocks in float32 bring it back."""
    from tocom.export.proof.bisect.operators import operators_of_block
    from tocom.export.proof.reference import EXACT, in_format
    from tocom.export.proof.sides import engine_of
    from tocom.export.source.load import validation_batches

    console, side = open_console(), Side.read(candidate)
    if side.kind == "torch":
        return
    block = report.findings.faults[0].block
    with engine_of(side, validated.engine) as engine:
        if block is not None:
            exact = in_format(validated.reference, EXACT)
            operators = operators_of_block(engine, exact, validation_batches(validated.inputs), block)
            wrong = [each for each in operators if each.is_wrong]
            for each in wrong[:3]:
                console.print(f"r={degree}: {each}")
            if not wrong:
                console.print(f"r={degree}: every operator of block {block} is right where its value is put out: what "
                              "goes wrong is what the library makes of several of them at once")  # fmt: skip
        console.print(f"r={degree}: {_recovery(degree, validated, engine)}")


def _recovery(degree: int, validated: ValidatedDegree, engine: Engine) -> str:
    from tocom.export.proof.bisect.recovery import can_keep_blocks, recover, remaker
    from tocom.export.source.load import validation_batches

    plain, can_keep = validated.plain or validated.reference, can_keep_blocks(engine)
    with tempfile.TemporaryDirectory(prefix="tocom-") as folder, stages(None) as notify:
        remake = remaker(validated.inputs, engine, plain, lambda: validation_batches(validated.inputs), Path(folder))
        most = len(plain.model.blocks) if can_keep else 0
        recovery = recover(remake, most, lambda text: notify(degree, text))
    blocks = ",".join(map(str, recovery.blocks))
    if recovery.report and not recovery.blocks:
        return "made anew from the same files it passes, so the listed file is what is wrong: compile it again"
    if recovery.report and validated.plain is not None:
        return f"it passes with the products of blocks {blocks} in float: tocom quantize --keep-float"
    if recovery.report:
        return f"it passes with blocks {blocks} in float32: tocom compile --float-blocks {blocks}"
    if can_keep:
        return "no blocks in float32 bring it back"
    return f"made anew it fails too: {one_line(recovery.report.findings.faults[0])}"


def _write_report(folder: Path, image: Path | None, validation: FamilyValidation, options: ValidateOptions) -> None:
    """Writes the report, and says where."""
    from tocom.export.proof.report.about import About
    from tocom.export.proof.report.pictures import merge_pictures
    from tocom.export.proof.report.write import write_report
    from tocom.export.proof.sides import open_side
    from tocom.runtime.preprocess import load_image, preprocess

    pictures = {}
    for degree, validated in validation.degrees.items() if image is not None else ():
        spec = validated.inputs.family.input
        pixels = preprocess(load_image(image), spec)[None]
        with open_side(Side.read(options.candidate), validated.engine, validated.reference, options.batch) as observer:
            pictures[degree] = merge_pictures(observer, validated.reference, pixels, spec)
    first, found = next(iter(validation.degrees.values())), next(iter(validation.reports.values())).findings
    family = first.inputs.family
    about = About(
        title=f"{family.model}: {options.files.out}",
        model=family.model,
        candidate=found.candidate,
        against=found.reference if found.against is None else found.against.candidate,
        date=datetime.now(UTC).date().isoformat(),
        versions=_installed_versions(),
        checkpoint_sha256=family.checkpoint_sha256,
        compensator_sha256=family.compensator_sha256,
        command=shlex.join(["tocom", *sys.argv[1:]]),
    )
    for file in write_report(folder, validation.reports, about, pictures):
        open_console().print("[green]wrote[/]", str(file), markup=True)


def _installed_versions() -> dict[str, str]:
    versions = {}
    for name in _VERSIONS:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
