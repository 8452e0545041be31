"""`tocom serve` as a process of its own, and what can be seen of it from outside."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from bench.serving.subject import MODEL
from tocom.runtime.errors import InputError, one_line


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    held = [socket.socket() for _ in range(count)]
    for each in held:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in held]
    for each in held:
        each.close()
    return ports


class Server:
    """A running server; a context manager that ends it.

    Attributes:
        http: Port.
        grpc: Port.
        log: What it says.
    """

    def __init__(
        self,
        folder: Path,
        log: Path,
        arguments: Sequence[object] = (),
        *,
        cores: Collection[int] | None = None,
        environment: Mapping[str, str] | None = None,
        start_s: float = 180.0,
    ) -> None:
        """Starts it and waits until it is ready."""
        self.http, self.grpc = free_ports(2)
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [str(Path(sys.executable).with_name("tocom")), "serve", str(folder), "--name", MODEL,
                   "--port", str(self.http), "--grpc-port", str(self.grpc), *map(str, arguments)]  # fmt: skip
        own = os.sched_getaffinity(0)
        with log.open("wb") as out:
            os.sched_setaffinity(0, cores or own)  # what is started here inherits it
            try:
                self.process = subprocess.Popen(
                    command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                    env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}, start_new_session=True,
                )  # fmt: skip
            finally:
                os.sched_setaffinity(0, own)
        try:
            self._wait(start_s)
        except BaseException:  # Ctrl-C while it starts, too, must not leave it behind
            self.kill()
            raise

    def _wait(self, start_s: float) -> None:
        until = time.monotonic() + start_s
        while time.monotonic() < until and self.process.poll() is None:
            with suppress(OSError):
                self.get("/v2/health/ready")
                return
            time.sleep(0.1)
        raise InputError(f"tocom serve does not start: {one_line(self.log.read_text()[-300:])}")

    def get(self, path: str) -> str:
        """What a GET brings."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http}{path}", timeout=10) as answer:
            return answer.read().decode()

    def metric(self, name: str) -> float:
        """One number of /metrics, summed over its labels."""
        lines = [line for line in self.get("/metrics").splitlines() if line.split("{")[0].split(" ")[0] == name]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    @property
    def _processes(self) -> list[psutil.Process]:
        """The server and all that it started."""
        with suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.process.pid)
            return [own, *own.children(recursive=True)]
        return []

    @property
    def workers(self) -> list[int]:
        """Processes that hold engines: the server's own children of this kind, not what these start themselves."""
        found = []
        with suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children():
                with suppress(psutil.Error):
                    found += [child.pid] if "spawn_main" in " ".join(child.cmdline()) else []
        return sorted(found)

    def sample(self) -> dict[str, float]:
        """Memory in MiB, open files and threads, of all processes together."""
        found = {"rss_mib": 0.0, "files": 0, "threads": 0, "processes": 0}
        for process in self._processes:
            with suppress(psutil.Error), process.oneshot():
                each = {"rss_mib": process.memory_info().rss / (1 << 20), "files": process.num_fds(),
                        "threads": process.num_threads(), "processes": 1}  # fmt: skip
                found = {name: found[name] + value for name, value in each.items()}
        return found

    def faults(self) -> list[str]:
        """Lines of its log that no server should write."""
        words = ("Traceback", "Exception in", "Unhandled", "Task exception", "never awaited")
        return [line for line in self.log.read_text(errors="replace").splitlines() if any(w in line for w in words)]

    def stop(self, wait_s: float = 60.0) -> int | None:
        """Asks it to end (SIGTERM), and waits; its exit status, None where it does not end."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(wait_s)
        self.kill()
        return None

    def kill(self) -> None:
        """Ends it and all that it started, at once."""
        for process in reversed(self._processes):
            with suppress(psutil.Error):
                process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.alive:
            self.stop(40.0 if kind is None else 10.0)
