"""`tocom serve`: a family behind MLServer."""

from __future__ import annotations

import ipaddress
import re
import shutil
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from tocom.export.cli.console import open_console
from tocom.runtime.errors import InputError, one_line

if TYPE_CHECKING:
    from tocom.serving.mlserver.app import ServerOptions
    from tocom.serving.service.options import ServeOptions

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def serve_command(
    engines: Annotated[Path, typer.Argument(help="Folder of the family.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on. The default is reached from this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of HTTP: the protocol, the page, /metrics.")] = 8080,
    grpc_port: Annotated[int, typer.Option(min=1, max=65535, help="Of gRPC.")] = 8081,
    name: Annotated[str | None, typer.Option(help="Of the model in the protocol. Default: the folder's name.")] = None,
    objective_ms: Annotated[
        float | None,
        typer.Option(
            metavar="MS",
            help="What 99 of 100 requests are to take at most. While the load is too high for it the degree rises, and "
            "falls back when the load does. Default: the degree never changes.",
        ),
    ] = None,
    degree: Annotated[
        int | None, typer.Option(metavar="R", help="Where the degree begins. Default: the lowest there is.")
    ] = None,
    budget_ms: Annotated[
        float | None,
        typer.Option(
            metavar="MS", help="In place of --degree: begin at the most accurate one that answers an image in time."
        ),
    ] = None,
    min_accuracy: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", help="Least top-1 of a degree that the load may choose, as measured when it was compiled."
        ),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(
            min=0,
            max=64,
            help="Processes that hold the engines, each running one batch at a time; one that dies is started again. "
            "0: the engines run in the server's own process, which saves small networks some time.",
        ),
    ] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of each worker. Default: the engine's choice.")
    ] = None,
    engine_timeout_s: Annotated[
        float, typer.Option(help="After so long a batch counts as hung, and its worker is replaced.")
    ] = 60.0,
    max_batch: Annotated[int, typer.Option(min=1, help="Images that run together.")] = 32,
    max_queue: Annotated[int, typer.Option(min=1, help="Images that wait; more are refused with 503.")] = 256,
    max_wait_s: Annotated[float, typer.Option(help="After waiting so long a request is refused.")] = 30.0,
    max_body_mib: Annotated[int, typer.Option(min=1, max=1024, help="Size of a request.")] = 16,
    max_megapixels: Annotated[float, typer.Option(help="Size of an image, decoded.")] = 40.0,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log every request.")] = False,
) -> None:
    """Serve a family: Open Inference Protocol over HTTP and gRPC, a page to look at, Prometheus metrics.

    The family's folder can be compiled anew while it is served: POST /v2/repository/models/NAME/load takes it over once
    all of its engines run.

    Exit status: 0 ended by Ctrl-C or SIGTERM after what was accepted is answered, 2 bad input.
    """
    name = engines.resolve().name if name is None else name
    if not _NAME.fullmatch(name):
        raise InputError(f"a model's name must be letters, digits, _, - and ., got {one_line(name)}: give --name")
    if port == grpc_port:
        raise InputError(f"--port and --grpc-port must differ, got {port} for both")
    if not max_megapixels > 0:
        raise InputError(f"--max-megapixels must be more than 0, got {max_megapixels:g}")
    try:
        from tocom.serving.mlserver.app import Addresses, ServerOptions
    except ModuleNotFoundError as error:
        raise InputError(f"serving needs {error.name}, which is not installed: pip install 'tocom[serve]'") from None
    from tocom.serving.protocol.http_guard import HttpLimits
    from tocom.serving.service.options import Limits, ServeOptions

    for option, number in (("--port", port), ("--grpc-port", grpc_port)):
        _require_free(host, option, number)
    options = ServeOptions(
        objective_ms=objective_ms, degree=degree, budget_ms=budget_ms, min_accuracy=min_accuracy, workers=workers,
        threads=threads,
        limits=Limits(max_batch, max_queue, max_wait_s), max_pixels=int(max_megapixels * 1e6),
        engine_timeout_s=engine_timeout_s,
    )  # fmt: skip
    _serve(engines, options, ServerOptions(name, Addresses(host, port, grpc_port), HttpLimits(max_body_mib << 20),
                                           verbose))  # fmt: skip


def _serve(engines: Path, options: ServeOptions, server: ServerOptions) -> None:
    """Opens the family, says where it is to be found, and serves it."""
    from tocom.serving.mlserver.app import serve
    from tocom.serving.mlserver.metrics import ServiceMetrics
    from tocom.serving.service.arenas import limit_arenas
    from tocom.serving.service.scratch import own_scratch
    from tocom.serving.service.service import Service

    limit_arenas()
    # while engines are opened: the first process of a container has no default
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(0))
    metrics, console = ServiceMetrics(), open_console()
    scratch = own_scratch()  # what a server leaves that is killed, the next one clears away
    try:
        with console.status("opening every engine ..."):
            service = Service(engines, options, metrics.batch, metrics.ended)
        degrees = ", ".join(str(entry.degree) for entry in service.family.engines)
        objective_ms, where = options.objective_ms, server.addresses
        load = "fixed" if objective_ms is None else f"chosen by the load for {objective_ms:g} ms"
        place = f"{where.host}:{where.http_port}"
        console.print(f"[green]serving[/] {escape(server.name)}: degrees {degrees}, {load}")
        console.print(f"page     http://{place}/", highlight=False)
        console.print(f"infer    POST http://{place}/v2/models/{escape(server.name)}/infer, gRPC {where.host}:"
                      f"{where.grpc_port}", highlight=False)  # fmt: skip
        console.print(f"metrics  http://{place}/metrics", highlight=False)
        if not _is_loopback(where.host):
            console.print("[yellow]reached from other machines[/]: whoever reaches it may ask it, and have it reload")
        serve(service, server, metrics)
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _require_free(host: str, option: str, port: int) -> None:
    """Finds out before engines are opened, which takes a while.

    Raises:
        InputError: Nothing can listen there.
    """
    try:
        with socket.create_server((host, port)):
            return
    except (OSError, OverflowError, UnicodeError) as error:
        reason = one_line(error.strerror or error) if isinstance(error, OSError) else one_line(error)
        raise InputError(f"{one_line(host)}:{port} cannot be listened on ({reason}): choose another {option} or "
                         "--host") from error  # fmt: skip
