"""`tocom serve-ray`: a family behind Ray Serve."""

from __future__ import annotations

from typing import Annotated

from tocom.export.cli.console import open_console
from tocom.export.cli.extras import require_engine, require_extra
from tocom.export.cli.options import FamilyFolder, number, option, whole
from tocom.export.cli.serve import (
    ADDRESS,
    LIMITS,
    LOAD,
    RUNNING,
    FirstDegree,
    Host,
    MaxBatch,
    MaxBody,
    MaxWait,
    ModelName,
    ObjectiveMs,
)
from tocom.runtime.errors import InputError, one_line


def serve_ray_command(
    family: FamilyFolder,
    /,
    *,
    address: Annotated[
        str | None,
        option(
            "Ray cluster to join, e.g. auto or 10.0.0.1:6379. Default: a Ray on this machine, for as long as the "
            "command runs, whose ports no other machine reaches.",
            panel=ADDRESS, metavar="ADDRESS",
        ),
    ] = None,
    host: Host = "127.0.0.1",
    port: Annotated[int, whole("Port of HTTP: the protocol and the page.", 1, 65535, panel=ADDRESS)] = 8080,
    name: ModelName = None,
    objective_ms: ObjectiveMs = None,
    degree: FirstDegree = None,
    fixed: Annotated[
        str | None,
        option(
            "Degrees that get replicas of their own, e.g. 0,16; a request is answered by the first that it allows. "
            "Instead of --objective-ms and --degree.",
            panel=LOAD, metavar="R,R",
        ),
    ] = None,
    min_replicas: Annotated[
        int, whole("Processes that hold the engines, at least.", 1, panel=RUNNING)
    ] = 1,
    max_replicas: Annotated[int, whole("The same under load, at most; see --target-requests.", 1, panel=RUNNING)] = 1,
    target_requests: Annotated[
        float, number("Requests in each replica, on average, beyond which replicas are added.", panel=RUNNING)
    ] = 16,
    num_cpus: Annotated[
        float, number("CPU cores of each replica, and threads of its engines.", 0, panel=RUNNING)
    ] = 1,
    num_gpus: Annotated[float, number("GPUs of each replica.", 0, panel=RUNNING)] = 0,
    max_batch: MaxBatch = 32,
    max_queue: Annotated[
        int, whole("How many images may wait in each replica; more are refused with 503.", 1, panel=LIMITS)
    ] = 256,
    max_wait_s: MaxWait = 30.0,
    max_body_mib: MaxBody = 16,
    object_store_mib: Annotated[
        int,
        whole("MiB of shared memory of a Ray on this machine, for requests on their way.", 76, panel=LIMITS,
              metavar="MIB"),
    ] = 256,
) -> None:  # fmt: skip
    """Serve a family by Ray Serve, on one machine or on a cluster: Open Inference Protocol over HTTP, and the page.

    The family's folder must be at the same place on every node. A replica that dies is started again, and its requests
    are asked of another. kill -HUP has every replica take over the family that was compiled into the folder meanwhile,
    once all of its engines run. Writes nothing. For a service that outlives this command, give
    tocom.serving.ray.app:app to `serve deploy`: docs/ray.md.

    Examples of use:

        tocom serve-ray engines/my
        tocom serve-ray engines/my --address auto --min-replicas 2 --max-replicas 8 --objective-ms 50
        tocom serve-ray engines/my --fixed 0,16 --num-cpus 2

    Exit status: 0 ended by Ctrl-C or SIGTERM after what was accepted is answered, 2 bad input.

    See also: `tocom serve`, docs/ray.md.
    """
    require_extra("ray", "serving by Ray")
    require_engine()
    from tocom.serving.ray.local_cluster import prepare_environment

    if address is None:
        prepare_environment()
    import pydantic
    from rich.markup import escape

    from tocom.serving.ray.app import FamilyArgs
    from tocom.serving.ray.run import Where, serve_family

    try:
        arguments = FamilyArgs(
            engines=str(family.resolve()), name=name, objective_ms=objective_ms, degree=degree, fixed=fixed,
            min_replicas=min_replicas, max_replicas=max_replicas, target_ongoing_requests=target_requests,
            num_cpus=num_cpus, num_gpus=num_gpus, max_batch=max_batch, max_queue=max_queue, max_wait_s=max_wait_s,
            max_body_mib=max_body_mib,
        )  # fmt: skip
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place, value = ".".join(map(str, first["loc"])), one_line(first["input"])
        raise InputError(f"{place}: {one_line(first['msg'])}, got {value}") from None
    console = open_console()
    console.print(f"[green]starting[/] Ray Serve with {escape(one_line(family))} ...", highlight=False)
    where = Where(address, host, port, object_store_mib=object_store_mib)
    serve_family(arguments.model_dump(), where, lambda line: console.print(escape(line), highlight=False))
