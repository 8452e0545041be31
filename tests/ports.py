"""Ports for servers that cannot be asked which port they bound: leased, so that no other test gets them meanwhile.

They lie below the range that the kernel takes the ports of outgoing connections from, and above those of Ray's
workers; a lock on a file keeps other test processes of this user away. A program that has nothing to do with the tests
may still take one between the look and the server's own bind: a server that says so is started again by its test.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

HOST = "127.0.0.1"
_RAY_ENDS = 20_000
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def _candidates() -> list[int]:
    first = int(_RANGE.read_text().split()[0]) if _RANGE.exists() else 32_768
    ports = list(range(_RAY_ENDS, first)) or list(range(_RAY_ENDS, 60_000))
    random.SystemRandom().shuffle(ports)
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


@contextlib.contextmanager
def leased_ports(count: int) -> Iterator[list[int]]:
    """So many ports of the loopback address that are free, and that no other test is given until the end."""
    folder = Path(tempfile.gettempdir()) / f"tocom-test-ports-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    ports: list[int] = []
    with contextlib.ExitStack() as held:
        for port in _candidates():
            if len(ports) == count:
                break
            lock = (folder / str(port)).open("w")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.close()
                continue
            held.enter_context(lock)
            if _is_free(port):
                ports.append(port)
        assert len(ports) == count, "no free ports"
        yield ports
