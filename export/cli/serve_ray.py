"""`tocom serve-ray`: a family behind Ray Serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from tocom.export.cli.console import open_console
from tocom.runtime.errors import InputError, one_line


def serve_ray_command(
    engines: Annotated[Path, typer.Argument(help="Folder of the family, at the same place on every node.")],
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray cluster to join, e.g. auto or 10.0.0.1:6379. Default: a Ray on this machine, for as long as the "
            "command runs, whose ports nobody else reaches."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. The default is reached from this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of HTTP: the protocol and the page.")] = 8080,
    name: Annotated[str | None, typer.Option(help="Of the model in the protocol. Default: the folder's name.")] = None,
    objective_ms: Annotated[
        float | None,
        typer.Option(
            metavar="MS",
            help="What 99 of 100 requests are to take at most. Each replica's degree rises while its load is too high "
            "for it, and falls back when the load does. Default: the degree never changes.",
        ),
    ] = None,
    degree: Annotated[
        int | None, typer.Option(metavar="R", help="Where the degree begins. Default: the lowest there is.")
    ] = None,
    fixed: Annotated[
        str | None,
        typer.Option(
            metavar="R,R",
            help="Degrees that get replicas of their own, e.g. 0,16; a request is answered by the first that it "
            "allows. Instead of --objective-ms and --degree.",
        ),
    ] = None,
    min_replicas: Annotated[int, typer.Option(min=1, help="Processes that hold the engines, without load.")] = 1,
    max_replicas: Annotated[int, typer.Option(min=1, help="The same under load; see --target.")] = 1,
    target: Annotated[
        float, typer.Option(help="Requests in each replica, on average, beyond which replicas are added.")
    ] = 16,
    num_cpus: Annotated[float, typer.Option(min=0, help="Cores of each replica, and threads of its engines.")] = 1,
    num_gpus: Annotated[float, typer.Option(min=0, help="GPUs of each replica.")] = 0,
    max_batch: Annotated[int, typer.Option(min=1, help="Images that run together.")] = 32,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Images that wait in each replica; more are refused with 503.")
    ] = 256,
    max_wait_s: Annotated[float, typer.Option(help="After waiting so long a request is refused.")] = 30.0,
    max_body_mib: Annotated[int, typer.Option(min=1, max=1024, help="Size of a request.")] = 16,
    object_store_mib: Annotated[
        int, typer.Option(min=76, help="Shared memory of a Ray on this machine, for requests on their way.")
    ] = 256,
) -> None:
    """Serve a family by Ray Serve, on one machine or on a cluster: Open Inference Protocol over HTTP, and the page.

    A replica that dies is started again, and its requests are asked of another. kill -HUP has every replica take over
    the family that was compiled into the folder meanwhile, once all of its engines run. For a service that outlives
    this command, give tocom.serving.ray.app:app to `serve deploy`: docs/ray.md.

    Exit status: 0 ended by Ctrl-C or SIGTERM after what was accepted is answered, 2 bad input.
    """
    from tocom.serving.ray.local_cluster import prepare_environment

    if address is None:
        prepare_environment()
    try:
        import pydantic

        from tocom.serving.ray.app import FamilyArgs
        from tocom.serving.ray.run import Where, serve_family
    except ModuleNotFoundError as error:
        raise InputError(f"serving by Ray needs {error.name}, which is not installed: pip install 'tocom[ray]'") \
            from None  # fmt: skip
    try:
        arguments = FamilyArgs(
            engines=str(engines.resolve()), name=name, objective_ms=objective_ms, degree=degree, fixed=fixed,
            min_replicas=min_replicas, max_replicas=max_replicas, target_ongoing_requests=target,
            num_cpus=num_cpus, num_gpus=num_gpus, max_batch=max_batch, max_queue=max_queue, max_wait_s=max_wait_s,
            max_body_mib=max_body_mib,
        )  # fmt: skip
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place, value = ".".join(map(str, first["loc"])), one_line(first["input"])
        raise InputError(f"{place}: {one_line(first['msg'])}, got {value}") from None
    console = open_console()
    console.print(f"[green]starting[/] Ray Serve with {escape(one_line(engines))} ...", highlight=False)
    where = Where(address, host, port, object_store_mib=object_store_mib)
    serve_family(arguments.model_dump(), where, lambda line: console.print(escape(line), highlight=False))
