"""Ray on this machine only: every port on the loopback address, nothing sent anywhere, all files in one folder.

Ray trusts everybody who reaches its ports, so on one machine nobody else may. On a cluster they are open to the
machines of the cluster, and the network has to keep others out.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # in spite of its name, on any system: without it Ray binds to the machine's own address, also for one machine
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # replicas without GPUs of their own keep the variables of the process that starts Ray, as later versions do
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # how often scaling hears of the load, in seconds
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
}
# Ray's dashboard process, which also runs without a dashboard and without usage statistics, asks the metadata address
# of clouds which cloud this is. There is no setting for it, but it heeds the proxy: a port where nobody listens.
_NOWHERE = {"http_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.1,localhost"}
_LONGEST_FOLDER = 40  # characters; the names of unix sockets below it must stay shorter than 108


def prepare_environment() -> None:
    """Sets what Ray looks at when it is imported, for a Ray on this machine."""
    os.environ.update(_ENVIRONMENT)


@contextlib.contextmanager
def local_ray(*, num_cpus: int | None = None, object_store_mib: int = 256, **more: Any) -> Iterator[None]:
    """Starts a Ray of its own for as long as the context lasts.

    Nothing may have imported `ray` before `prepare_environment`.

    Args:
        num_cpus: What replicas can be given, in cores; the machine's by default.
        object_store_mib: Shared memory for requests on their way, in MiB; at least 76.
        more: Further arguments of `ray.init`.

    Raises:
        RuntimeError: Ray does not keep to the loopback address.
    """
    prepare_environment()
    import ray

    folder = _folder()
    try:
        with _environment(_NOWHERE):
            ray.init(
                address="local",
                num_cpus=num_cpus,
                object_store_memory=object_store_mib << 20,
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                _temp_dir=str(folder),
                **more,
            )
        address = ray.util.get_node_ip_address()
        if not ipaddress.ip_address(address).is_loopback:
            raise RuntimeError(f"Ray must listen on the loopback address, got {address}: it was imported too early")
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _folder() -> Path:
    named = tempfile.mkdtemp(prefix="tocom-ray-")
    if len(named) <= _LONGEST_FOLDER:
        return Path(named)
    Path(named).rmdir()
    return Path(tempfile.mkdtemp(prefix="tocom-ray-", dir="/tmp"))


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def keep_to_loopback() -> None:
    """Has the gRPC server that Ray starts in every replica listen where the rest of a local Ray does.

    It would listen on all addresses and take pickled objects from everybody who reaches it; there is no setting for it.
    On a node with another address nothing changes.
    """
    import ray.util
    from grpc.aio._server import Server  # the class that grpc.aio.Server only declares

    if not ipaddress.ip_address(ray.util.get_node_ip_address()).is_loopback:
        return
    add_port = Server.add_insecure_port

    def add_loopback_port(server: Server, address: str) -> int:
        return add_port(server, address.replace("[::]:", "127.0.0.1:"))

    Server.add_insecure_port = add_loopback_port
