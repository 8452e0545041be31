"""`tocom export-triton`: a family as a model repository of Triton Inference Server."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group
from rich.markup import escape
from rich.table import Table

from tocom.export.cli.console import open_console
from tocom.export.cli.extras import require_extra
from tocom.export.cli.options import Degrees, FamilyFolder, flag, option, whole
from tocom.runtime.errors import InputError, one_line

if TYPE_CHECKING:
    from tocom.serving.triton.repository import Written

TRITON = Group("Triton", sort_key=1)
_MIB = 1 << 20


def export_triton_command(
    family: FamilyFolder,
    /,
    *,
    out: Annotated[Path, option("Folder of the repository.", metavar="FOLDER")],
    degrees: Degrees = (),
    name: Annotated[
        str | None,
        option(
            "What the models' names begin with: `NAME_r08`. Default: the name of the family's folder.", metavar="NAME"
        ),
    ] = None,
    preprocess: Annotated[
        str,
        option(
            "Who turns images into the network's input: client, or ensemble, which adds a model `NAME_r08_image` per "
            "degree that takes encoded images.",
            metavar="WHO",
        ),
    ] = "client",
    backend: Annotated[
        str | None,
        option(
            "onnxruntime: serve the graphs of another library's engines by ONNX Runtime. Default: the engine's own "
            "library, where Triton has it.",
            metavar="NAME",
        ),
    ] = None,
    max_batch: Annotated[
        int | None,
        whole(
            "How many images a call takes at most. Default: 32, or what the plan allows; not for openvino.",
            panel=TRITON,
        ),
    ] = None,
    instances: Annotated[int, whole("Calls of a model that run at the same time.", panel=TRITON)] = 1,
    max_queue: Annotated[int, whole("How many requests of a model may wait; others are refused.", panel=TRITON)] = 128,
    queue_delay_us: Annotated[
        int, whole("Microseconds that a request waits for others to share a call with.", panel=TRITON, metavar="US")
    ] = 1000,
    queue_timeout_ms: Annotated[
        int, whole("Milliseconds that a request waits at most before it is refused.", panel=TRITON, metavar="MS")
    ] = 10_000,
    gpu: Annotated[bool, flag("Run ONNX Runtime's models on a GPU.", panel=TRITON)] = False,
    replace: Annotated[bool, flag("Delete another model repository that is in the folder.")] = False,
) -> None:
    """Write a model repository for Triton Inference Server: one model per degree.

    Writes the repository to --out, whole or not at all. Every file's hash is checked first.

    Examples of use:

        tocom export-triton engines/my --out repository
        tocom export-triton engines/my --out repository --degrees 0,8 --preprocess ensemble --gpu

    Exit status: 0 done, 2 bad input.

    See also: `tocom serve`, docs/triton.md.
    """
    require_extra("compile", "reading graphs")
    from tocom.serving.triton.config import TritonOptions
    from tocom.serving.triton.repository import RepositoryOptions, write_repository

    running = TritonOptions(max_batch, instances, max_queue, queue_delay_us, queue_timeout_ms, gpu)
    options = RepositoryOptions(degrees, name, preprocess, backend, replace, running)
    written = write_repository(family, out, options, _inlined)
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
    for entry in written:
        config = entry.model.config
        best = config.get("dynamic_batching", {}).get("preferred_batch_size", [])
        table.add_row(
            escape(entry.model.name),
            "-" if entry.model.degree is None else str(entry.model.degree),
            entry.model.backend,
            str(config["max_batch_size"]) if config["max_batch_size"] else "the request's",
            ", ".join(map(str, best)) or "-",
            str(config["instance_group"]["count"]) if "instance_group" in config else "-",
            f"{entry.size / _MIB:.2f}",
            f"{(entry.size - entry.linked) / _MIB:.2f}",
        )
    return table


def _notes(written: tuple[Written, ...]) -> str:
    distinct = sum(entry.size - entry.linked for entry in written)
    notes = [f"On disk {distinct / _MIB:.2f} MiB in all: what several models read is stored once."]
    if any(entry.model.backend == "openvino" for entry in written):
        notes.append(
            "Triton's openvino backend pads what it batches, so requests are not batched there. It runs the function\n"
            "bodies, not the native operator, and where the processor has bf16 it computes in that, also what was\n"
            "compiled for fp32. --backend onnxruntime serves the same graphs, batched."
        )
    return "\n".join(notes)
