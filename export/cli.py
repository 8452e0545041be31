"""The `tocom` command."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import runtime.errors
import tocom.errors

# Heavy imports (torch, timm) lie in the commands that need them: `tocom --help` and `tocom infer` answer at once.

app = typer.Typer(
    help="Compile a token-compressed Vision Transformer: one proven engine per degree r (tokens merged per block).",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
InputErrors = (runtime.errors.InputError, tocom.errors.InputError)

Model = Annotated[str, typer.Option(help="timm model name, or a folder in timm's hub layout (config.json, weights).")]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        help="Fine-tuned weights, .safetensors or .pth (bare, or under model or state_dict). Default: the model "
        "folder's, or timm's pretrained ones."
    ),
]
CompensatorFile = Annotated[Path | None, typer.Option(help="Compensator, .safetensors or the original .pth.")]
SourceDegree = Annotated[
    int | None, typer.Option(help="Degree the checkpoint was fine-tuned at; needed with a compensator.")
]
NumClasses = Annotated[int | None, typer.Option(help="Classes. Default: as many as the checkpoint's classifier has.")]
ModelArgs = Annotated[
    list[str] | None,
    typer.Option("--model-arg", metavar="NAME=VALUE", help="timm model argument, e.g. img_size=384; repeatable."),
]
Schedule = Annotated[
    str,
    typer.Option(
        help="How a degree r is spread over the blocks: constant (r in each), decreasing (2r down to 0), strided:K "
        "(K*r in every K-th block), or one number per block, each times r, like 0,3,0,0,3,0."
    ),
]
ReductionName = Annotated[
    str, typer.Option("--reduction", help="How tokens go: merge (ToMe) or prune (EViT, by class-token attention).")
]
Images = Annotated[
    Path | None,
    typer.Option(help="Folder of images to validate on; with one folder per class, top-1 is measured too."),
]
Limit = Annotated[int, typer.Option(min=1, help="Measure top-1 on at most this many images, evenly spread.")]


@app.command("compile")
def compile_command(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder of the family.")],
    degrees: Annotated[str, typer.Option(help="Degrees to compile, e.g. 8,16. 0 is always added, to compare with.")],
    checkpoint: Checkpoint = None,
    compensator: CompensatorFile = None,
    source_degree: SourceDegree = None,
    scale: Annotated[float, typer.Option(help="Weight of the compensator's change.")] = 0.1,
    precision: Annotated[str, typer.Option(help="Number format of the engines: fp32.")] = "fp32",
    backend: Annotated[str, typer.Option(help="Engine library: auto or onnxruntime.")] = "auto",
    images: Images = None,
    limit: Limit = 5000,
    num_classes: NumClasses = None,
    model_arg: ModelArgs = None,
    schedule: Schedule = "constant",
    reduction: ReductionName = "merge",
    replace: Annotated[
        bool, typer.Option("--replace", help="Overwrite another checkpoint's family in the folder.")
    ] = False,
) -> None:
    """Compile one engine per degree, prove each against the PyTorch reference, list them in family.json.

    Finished degrees are kept: run the same command again after an interruption, or with further degrees.

    Exit status: 0 done, 1 an engine failed validation, 2 bad input.
    """
    wanted = _degrees(degrees)
    arguments = _model_args(model_arg)
    from export.compile import compile_family
    from export.source import CompileOptions
    from export.table import family_table

    options = CompileOptions(
        model=model, out=out, degrees=wanted, checkpoint=checkpoint, compensator=compensator,
        source_degree=source_degree, delta_scale=scale, precision=precision, backend=backend, images=images,
        limit=limit, num_classes=num_classes, model_args=arguments, schedule=schedule,
        reduction=reduction, replace=replace,
    )  # fmt: skip
    with _stages(len({0, *wanted})) as notify:
        result = compile_family(options, notify)
    console = _console()
    console.print(family_table(result.family, out, {0, *wanted}))
    if result.failed:
        for degree, report in result.failed.items():
            _complain(f"degree {degree} failed validation, its new engine is not listed: {_verdict(report.findings)}")
        raise typer.Exit(1)
    console.print(f"[green]wrote[/] {out / 'family.json'}   try: python runtime/infer.py --engines {out} IMAGE...")


@app.command("validate")
def validate_command(
    engines: Annotated[Path, typer.Option(help="Folder of the family.")],
    model: Model,
    checkpoint: Checkpoint = None,
    compensator: CompensatorFile = None,
    degrees: Annotated[str | None, typer.Option(help="Degrees to validate. Default: all.")] = None,
    images: Images = None,
    num_classes: NumClasses = None,
    model_arg: ModelArgs = None,
) -> None:
    """Prove the engines of a family once more, against the reference made from the original files.

    Exit status: 0 all pass, 1 an engine fails, 2 bad input.
    """
    wanted = _degrees(degrees) if degrees else ()
    from export.compile import validate_family
    from export.source import CompileOptions

    options = CompileOptions(
        model=model, out=engines, degrees=wanted, checkpoint=checkpoint, compensator=compensator, images=images,
        num_classes=num_classes, model_args=_model_args(model_arg),
    )  # fmt: skip
    with _stages(len(wanted) or None) as notify:
        reports = validate_family(options, notify)
    table = Table(title=f"validation of {engines}")
    for name in ("degree", "verdict", "images", "agreement", "explained", "unexplained", "logit error", "top-1 equal"):
        table.add_column(name, justify="right")
    for degree, report in reports.items():
        found = report.findings
        table.add_row(
            str(degree), "[green]pass[/]" if report else "[red]FAIL[/]", str(found["images"]),
            f"{found['agreement']:.2%}", str(found["explained"]), str(found["unexplained"]),
            f"{found['max_logit_error']:.1e}", f"{found['top1_agreement']:.0%}",
        )  # fmt: skip
    _console().print(table)
    if not all(reports.values()):
        raise typer.Exit(1)


@app.command("distill")
def distill_command(
    model: Model,
    images: Annotated[Path, typer.Option(help="Folder of the images the backbone was pre-trained on.")],
    out: Annotated[Path, typer.Option(help="Compensator file to write (.safetensors).")],
    checkpoint: Checkpoint = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 2000,
    batch: Annotated[int, typer.Option(min=1, help="Images per step.")] = 128,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    rank: Annotated[int, typer.Option(min=1, help="Rank of each of the 16 groups.")] = 2,
    seed: Annotated[int, typer.Option(help="Of weights, degrees and image order.")] = 0,
    num_classes: NumClasses = None,
    model_arg: ModelArgs = None,
) -> None:
    """Train a compensator for a backbone by self-distillation, once; it then serves every checkpoint tuned from it."""
    from calib.distill import DistillOptions, distill
    from calib.image_batches import endless_batches
    from export.source import input_spec
    from runtime.artifacts import write_atomically
    from tocom.checkpoint import load_model

    options = DistillOptions(steps=steps, lr=lr, rank=rank, seed=seed)
    loaded = load_model(model, checkpoint=checkpoint, num_classes=num_classes, **_model_args(model_arg))
    batches = endless_batches(images, input_spec(loaded), batch, seed)
    if not out.absolute().parent.is_dir():
        raise runtime.errors.InputError(f"the compensator's folder must exist, got {out.absolute().parent}.")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_console(stderr=True)) as progress:
        task = progress.add_task("distilling", total=steps)
        trained = distill(
            loaded.model, batches, backbone=loaded.architecture, backbone_sha256=loaded.checkpoint_sha256,
            options=options,
            on_step=lambda step, loss: progress.update(task, completed=step, description=f"distilling, KL {loss:.4f}"),
        )  # fmt: skip
    write_atomically(out, trained.to_safetensors())
    typer.echo(f"wrote {out}")


@app.command("infer", add_help_option=False,
             context_settings={"allow_extra_args": True, "ignore_unknown_options": True})  # fmt: skip
def infer_command(context: typer.Context) -> None:
    """Classify images with an engine of a family (the same as python runtime/infer.py; see its --help)."""
    from runtime.infer import main as infer

    raise typer.Exit(infer(context.args))


@app.command("inspect")
def inspect_command(
    path: Annotated[Path, typer.Argument(help="Folder of a family, or a compensator file.")],
) -> None:
    """Show what a family or a compensator file holds, after checking every hash."""
    from export.table import family_table
    from runtime.manifest import Family

    console = _console()
    if path.is_file():
        from tocom.compensator import Compensator

        table = Table("compensator", str(path))
        for name, value in asdict(Compensator.load(path).info).items():
            table.add_row(name.replace("_", " "), "not recorded" if value is None else str(value))
        console.print(table)
        return
    family = Family.read(path)
    for entry in family.engines:
        family.check_files(path, entry)
    console.print(family_table(family, path))
    console.print(f"input {'x'.join(map(str, family.input.size))}, {family.classes} classes, checkpoint "
                  f"{(family.checkpoint_sha256 or 'unknown')[:12]}, all files as listed")  # fmt: skip


@app.command("doctor")
def doctor_command() -> None:
    """Say which engines can run on this machine, and why the others cannot."""
    from export.doctor import diagnose

    table = Table("part", "usable", "detail")
    for finding in diagnose():
        table.add_row(finding.name, "[green]yes[/]" if finding.usable else "[yellow]no[/]", finding.detail)
    _console().print(table)


def main() -> None:
    """Runs the command and leaves with its status: bad input is one line on stderr and status 2."""
    try:
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        raise SystemExit(status if isinstance(status, int) else 0)
    except typer.Exit as leave:
        raise SystemExit(leave.exit_code) from None
    except typer.TyperException as error:
        _complain(error.format_message())
    except InputErrors as error:
        _complain(error)
    except OSError as error:
        _complain(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
    except (KeyboardInterrupt, typer.Abort):
        _complain("interrupted; run the same command again to go on")
        raise SystemExit(130) from None
    raise SystemExit(2)


def _complain(message: object) -> None:
    print(f"tocom: {' '.join(str(message).split())}", file=sys.stderr)


def _verdict(found: dict[str, object]) -> str:
    return (f"{found['unexplained']} unexplained merge decisions (blocks {found['blocks_with_unexplained']}), "
            f"max logit error {found['max_logit_error']:.2e}")  # fmt: skip


def _degrees(text: str) -> tuple[int, ...]:
    degrees = []
    for part in text.split(","):
        try:
            degrees.append(int(part))
        except ValueError:
            raise runtime.errors.InputError(
                f"degrees must be whole numbers parted by commas, like 8,16, got {part.strip()!r} in {text!r}."
            ) from None
        if degrees[-1] < 0:
            raise runtime.errors.InputError(f"degree r must be 0 or more tokens per block, got {degrees[-1]}. "
                                            "Use 0 to export without merging.")  # fmt: skip
    return tuple(degrees)


def _model_args(pairs: list[str] | None) -> dict[str, object]:
    arguments: dict[str, object] = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise runtime.errors.InputError(f"a model argument must be NAME=VALUE, like img_size=384, got {pair!r}.")
        try:
            arguments[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[name] = value
    return arguments


def _console(*, stderr: bool = False) -> Console:
    """A console that is wide enough for a table where the output is no terminal."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=140)


@contextmanager
def _stages(total: int | None) -> Iterator:
    """Shows stages as they come: a bar on a terminal, a line each elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = _console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=total)

        def notify(degree: int | None, stage: str) -> None:
            text = stage if degree is None else f"r={degree}: {stage}"
            progress.update(task, description=text)
            if stage in ("done", "reused", "FAILED"):
                progress.advance(task)
            if not console.is_terminal:
                console.print(text)

        yield notify


if __name__ == "__main__":
    main()
