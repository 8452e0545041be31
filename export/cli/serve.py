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

from cyclopts import Group

from tocom.export.cli.console import open_console
from tocom.export.cli.extras import require_engine, require_extra
from tocom.export.cli.options import FamilyFolder, flag, number, option, whole
from tocom.runtime.errors import InputError, one_line

if TYPE_CHECKING:
    from tocom.serving.mlserver.app import ServerOptions
    from tocom.serving.service.options import ServeOptions

ADDRESS = Group("Address", sort_key=1)
LOAD = Group("Degree and load", sort_key=2)
RUNNING = Group("Processes", sort_key=3)
LIMITS = Group("Limits of requests", sort_key=4)

# what `tocom serve` and `tocom serve-ray` have in common
Host = Annotated[
    str,
    option("Address to listen on. The default is reached from this machine only.", panel=ADDRESS, metavar="ADDRESS"),
]
ModelName = Annotated[
    str | None, option("Name of the model in the protocol. Default: the folder's name.", metavar="NAME")
]
ObjectiveMs = Annotated[
    float | None,
    number(
        "Time that 99 of 100 requests may take. While the load is too high for it the degree rises, and falls back "
        "when the load does. Default: the degree never changes.",
        panel=LOAD, metavar="MS",
    ),
]  # fmt: skip
FirstDegree = Annotated[
    int | None, whole("Degree to begin with. Default: the lowest there is.", panel=LOAD, metavar="R")
]
MaxBatch = Annotated[int, whole("How many images run together at most.", 1, panel=LIMITS)]
MaxWait = Annotated[
    float, number("How long a request may wait, in seconds; then it is refused.", panel=LIMITS, metavar="S")
]
MaxBody = Annotated[int, whole("Largest size of a request, in MiB.", 1, 1024, panel=LIMITS, metavar="MIB")]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def serve_command(
    family: FamilyFolder,
    /,
    *,
    host: Host = "127.0.0.1",
    port: Annotated[
        int, whole("Port of HTTP: the protocol, the page, /metrics.", 1, 65535, panel=ADDRESS)
    ] = 8080,
    grpc_port: Annotated[int, whole("Port of gRPC.", 1, 65535, panel=ADDRESS)] = 8081,
    name: ModelName = None,
    objective_ms: ObjectiveMs = None,
    degree: FirstDegree = None,
    budget_ms: Annotated[
        float | None,
        number("Instead of --degree: begin with the most accurate one that answers an image in this time.", panel=LOAD,
               metavar="MS"),
    ] = None,
    min_accuracy: Annotated[
        float | None,
        number("Least top-1 of a degree that the load may choose, as measured when it was compiled.", panel=LOAD,
               metavar="SHARE"),
    ] = None,
    workers: Annotated[
        int,
        whole(
            "Processes that hold the engines, each running one batch at a time; one that dies is started again. 0: the "
            "engines run in the server's own process, which saves small networks some time.",
            0, 64, panel=RUNNING,
        ),
    ] = 1,
    threads: Annotated[
        int | None, whole("CPU threads of each worker. Default: the engine's choice.", 1, panel=RUNNING)
    ] = None,
    engine_timeout_s: Annotated[
        float,
        number("After so many seconds a batch counts as hung, and its worker is replaced.", panel=RUNNING, metavar="S"),
    ] = 60.0,
    max_batch: MaxBatch = 32,
    max_queue: Annotated[int, whole("How many images may wait; more are refused with 503.", 1, panel=LIMITS)] = 256,
    max_wait_s: MaxWait = 30.0,
    max_body_mib: MaxBody = 16,
    max_megapixels: Annotated[float, number("Largest size of an image, in megapixels.", panel=LIMITS)] = 40.0,
    verbose: Annotated[bool, flag("Log every request.")] = False,
) -> None:  # fmt: skip
    """Serve a family: Open Inference Protocol over HTTP and gRPC, a page to look at, Prometheus metrics.

    The family's folder can be compiled anew while it is served: POST /v2/repository/models/NAME/load takes it over once
    all of its engines run. Writes nothing.

    Examples of use:

        tocom serve engines/my
        tocom serve engines/my --objective-ms 50 --workers 2 --threads 4
        tocom serve engines/my --host 0.0.0.0 --port 80 --name my-model

    Exit status: 0 ended by Ctrl-C or SIGTERM after what was accepted is answered, 2 bad input.

    See also: `tocom serve-ray`, `tocom export-triton`, docs/serving.md.
    """
    name = family.resolve().name if name is None else name
    if not _NAME.fullmatch(name):
        raise InputError(f"a model's name must be letters, digits, _, - and ., got {one_line(name)}: give --name")
    if port == grpc_port:
        raise InputError(f"--port and --grpc-port must differ, got {port} for both")
    if not max_megapixels > 0:
        raise InputError(f"--max-megapixels must be more than 0, got {max_megapixels:g}")
    require_extra("serve", "serving")
    require_engine()
    from tocom.serving.mlserver.app import Addresses, ServerOptions
    from tocom.serving.protocol.http_guard import HttpLimits
    from tocom.serving.service.options import Limits, ServeOptions

    for name_of_option, wanted_port in (("--port", port), ("--grpc-port", grpc_port)):
        _require_free(host, name_of_option, wanted_port)
    options = ServeOptions(
        objective_ms=objective_ms, degree=degree, budget_ms=budget_ms, min_accuracy=min_accuracy, workers=workers,
        threads=threads,
        limits=Limits(max_batch, max_queue, max_wait_s), max_pixels=int(max_megapixels * 1e6),
        engine_timeout_s=engine_timeout_s,
    )  # fmt: skip
    _serve(family, options, ServerOptions(name, Addresses(host, port, grpc_port), HttpLimits(max_body_mib << 20),
                                           verbose))  # fmt: skip


def _serve(family: Path, options: ServeOptions, server: ServerOptions) -> None:
    """Opens the family, says where it is to be found, and serves it."""
    from rich.markup import escape

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
            service = Service(family, options, metrics.batch, metrics.ended)
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
