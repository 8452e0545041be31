"""`tocom export-triton`: a family as a model repository of Triton Inference Server."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from tocom.export.cli.console import open_console
from tocom.export.cli.options import read_degrees
from tocom.runtime.errors import InputError, one_line

if TYPE_CHECKING:
    from tocom.serving.triton.repository import Written

_MIB = 1 << 20


def export_triton_command(
    engines: Annotated[Path, typer.Argument(help="Folder of the family.")],
    out: Annotated[Path, typer.Option(help="Folder of the repository.")],
    degrees: Annotated[str | None, typer.Option(help="Degrees to serve, e.g. 0,8. Default: all.")] = None,
    name: Annotated[
        str | None, typer.Option(help="What models' names begin with: NAME_r08. Default: the family's folder.")
    ] = None,
    preprocess: Annotated[
        str,
        typer.Option(
            metavar="WHO",
            help="Who turns images into the network's input: client, or ensemble, which adds a model NAME_r08_image "
            "per degree that takes encoded images.",
        ),
    ] = "client",
    backend: Annotated[
        str | None,
        typer.Option(
            help="onnxruntime: serve the graphs of another library's engines by ONNX Runtime. Default: the engine's "
            "own library, where Triton has it."
        ),
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(help="Images of one call, at most. Default: 32, or what the plan allows; not for openvino."),
    ] = None,
    instances: Annotated[int, typer.Option(help="Calls of a model that run at the same time.")] = 1,
    max_queue: Annotated[int, typer.Option(help="Requests of a model that wait at most; others are refused.")] = 128,
    queue_delay_us: Annotated[
        int, typer.Option(help="Microseconds that a request waits for others to share a call with.")
    ] = 1000,
    queue_timeout_ms: Annotated[
        int, typer.Option(help="Milliseconds that a request waits at most before it is refused.")
    ] = 10_000,
    gpu: Annotated[bool, typer.Option("--gpu", help="Run ONNX Runtime's models on a GPU.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Delete another model repository that is in the folder.")
    ] = False,
) -> None:
    """Write a model repository for Triton Inference Server: one model per degree.

    Every file's hash is checked first. The repository is there whole or not at all.

    Exit status: 0 done, 2 bad input.
    """
    wanted = read_degrees(degrees) if degrees else ()
    from tocom.serving.triton.config import TritonOptions
    from tocom.serving.triton.repository import RepositoryOptions, write_repository

    running = TritonOptions(max_batch, instances, max_queue, queue_delay_us, queue_timeout_ms, gpu)
    options = RepositoryOptions(wanted, name, preprocess, backend, replace, running)
    written = write_repository(engines, out, options, _inlined)
    console = open_console()
    console.print(_table(written))
    console.print(_notes(written), soft_wrap=True)
    where = shlex.quote(str(out.resolve()))
    console.print(f"serve it:  tritonserver --model-repository={escape(where)} --disable-auto-complete-config "
                  "--http-address=127.0.0.1 --grpc-address=127.0.0.1 --metrics-address=127.0.0.1\n"
                  "           docs/triton.md has more, and clients", soft_wrap=True)  # fmt: skip


def _inlined(graph: Path) -> bytes:
    """A graph's content without model-local functions.

    Raises:
        InputError: It is no graph.
    """
    import onnx
    from google.protobuf.message import DecodeError

    from tocom.export.graph.inline import inline

    try:
        return inline(onnx.load(graph, load_external_data=False)).SerializeToString()
    except (DecodeError, ValueError, RuntimeError) as error:  # the last two: what the inliner makes of a broken one
        raise InputError(f"{one_line(graph)} is not a graph that can be read: {one_line(error)}") from error


def _table(written: tuple[Written, ...]) -> Table:
    table = Table("model", "degree", "backend", "max batch", "preferred", "instances", "MiB", "of its own")
    for name in ("degree", "max batch", "preferred", "instances", "MiB", "of its own"):
        next(column for column in table.columns if column.header == name).justify = "right"
    for each in written:
        config = each.model.config
        best = config.get("dynamic_batching", {}).get("preferred_batch_size", [])
        table.add_row(
            escape(each.model.name),
            "-" if each.model.degree is None else str(each.model.degree),
            each.model.backend,
            str(config["max_batch_size"]) if config["max_batch_size"] else "the request's",
            ", ".join(map(str, best)) or "-",
            str(config["instance_group"]["count"]) if "instance_group" in config else "-",
            f"{each.size / _MIB:.2f}",
            f"{(each.size - each.linked) / _MIB:.2f}",
        )
    return table


def _notes(written: tuple[Written, ...]) -> str:
    own = sum(each.size - each.linked for each in written)
    notes = [f"On disk {own / _MIB:.2f} MiB in all: what several models read is stored once."]
    if any(each.model.backend == "openvino" for each in written):
        notes.append(
            "Triton's openvino backend pads what it batches, so requests are not batched there. It runs the function\n"
            "bodies, not the native operator, and where the processor has bf16 it computes in that, also what was\n"
            "compiled for fp32. --backend onnxruntime serves the same graphs, batched."
        )
    return "\n".join(notes)
