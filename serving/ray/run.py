"""A family under Ray Serve for as long as this process runs: what `tocom serve-ray` does.

For a Ray of this machine `.local_cluster.prepare_environment` has to be called before this is imported.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve

from tocom.runtime.errors import InputError, one_line, readable
from tocom.serving.ray.app import FamilyArgs, family_app
from tocom.serving.ray.local_cluster import local_ray

APPLICATION = "tocom"
_CONTROLLER = "SERVE_CONTROLLER_ACTOR"


@dataclass(frozen=True)
class Where:
    """Which Ray runs the replicas, and where requests come in.

    Attributes:
        address: Of a Ray that runs, as `ray.init` takes it; None starts one on this machine, for this process only.
        host: That the proxies listen on; not used where Serve runs already.
        port: Likewise.
        num_cpus: Cores that a Ray of this machine hands out to replicas; the machine's by default.
        object_store_mib: Its shared memory, in MiB.
    """

    address: str | None = None
    host: str = "127.0.0.1"
    port: int = 8080
    num_cpus: int | None = None
    object_store_mib: int = 256


def serve_family(arguments: dict[str, Any], where: Where, tell: Callable[[str], None]) -> None:
    """Serves until the process is told to end (SIGINT or SIGTERM), and answers what was accepted.

    SIGHUP has every replica look for another family in the folder.

    Args:
        arguments: Of `tocom.serving.ray.app.FamilyArgs`.
        where: See there.
        tell: Given a line when something changes.

    Raises:
        InputError: The family cannot be served so.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    family_app(FamilyArgs(**arguments))  # what is wrong is found before Ray starts
    if where.address is None:
        _ensure_free(where.host, where.port)
    with _ray(where):
        signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(0))  # Ray would abort, with a trace
        taken = _listen(where)
        generation = 0
        try:
            _deploy(arguments)
            with _caught_signals() as signals:
                tell("Ray Serve ran there already, and listens where it did" if taken
                     else f"listening on http://{where.host}:{where.port}")  # fmt: skip
                while signals.get() == signal.SIGHUP:
                    generation += 1
                    tell(_reloaded({**arguments, "generation": generation}))
            tell("ending: answering what was accepted")
            _deploy({**arguments, "generation": generation}, draining=True)
        finally:
            serve.delete(APPLICATION)


def _reloaded(arguments: dict[str, Any]) -> str:
    """Has the replicas look for another family; returns a line that says whether they could."""
    try:
        _deploy(arguments)
    except InputError as error:
        return f"the family on disk cannot be served, the old one goes on: {error}"
    return "every replica has looked for another family in the folder"


def _ensure_free(host: str, port: int) -> None:
    """Looks first: Ray starts its proxy again and again where it cannot listen.

    Raises:
        InputError: Nothing can listen there.
    """
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, number) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise InputError(
            f"{one_line(host)}:{port} cannot be listened on ({one_line(error.strerror or error)}): choose another "
            "--port or --host"
        ) from None


@contextlib.contextmanager
def _ray(where: Where) -> Iterator[None]:
    if where.address is None:
        with local_ray(num_cpus=where.num_cpus, object_store_mib=where.object_store_mib):
            yield
        return
    try:
        ray.init(address=where.address, log_to_driver=False, configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"no Ray can be joined at {one_line(where.address)}: {readable(error)}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _listen(where: Where) -> bool:
    """Starts Serve; returns whether it ran already, with an address of its own."""
    try:
        ray.get_actor(_CONTROLLER, namespace="serve")
    except ValueError:
        serve.start(proxy_location="HeadOnly" if where.address is None else "EveryNode",
                    http_options={"host": where.host, "port": where.port})  # fmt: skip
        return False
    return True


def _deploy(arguments: dict[str, Any], *, draining: bool = False) -> None:
    """Gives Ray the application, and waits until it runs, or is drained.

    Raises:
        InputError: No replica can be started.
    """
    try:
        serve.run(family_app(FamilyArgs(**arguments), draining=draining), name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        application = serve.status().applications.get(APPLICATION)
        deployments = application.deployments.values() if application else ()
        messages = [deployment.message.strip() for deployment in deployments]
        reasons = [message.splitlines()[-1] for message in messages if message]
        reason = readable(reasons[0] if reasons else error).removeprefix("tocom.runtime.errors.InputError: ")
        raise InputError(f"Ray Serve cannot run the family: {reason}") from None


@contextlib.contextmanager
def _caught_signals() -> Iterator[queue.SimpleQueue[int]]:
    """Queues SIGHUP, SIGINT and SIGTERM instead of being ended by them; afterwards a second Ctrl-C ends at once."""
    signals: queue.SimpleQueue[int] = queue.SimpleQueue()
    caught = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda which, _frame: signals.put(which)) for number in caught}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
