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

from bench.serving.subject import MODEL
from tocom.runtime.errors import InputError, one_line

_PAGE = os.sysconf("SC_PAGE_SIZE")


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
        """Starts it and waits until it is ready.

        Args:
            folder: Of the family.
            log: Where its output goes.
            arguments: Of `tocom serve`, beside the family and the ports.
            cores: It may run on; all by default.
            environment: Beside this process's.
            start_s: How long that may take.

        Raises:
            InputError: It does not start.
        """
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
        """What a GET brings.

        Raises:
            OSError: Another status than 200, or no answer.
        """
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http}{path}", timeout=10) as answer:
            return answer.read().decode()

    def metric(self, name: str) -> float:
        """One number of /metrics, summed over its labels.

        Raises:
            OSError: There is no answer.
        """
        lines = [line for line in self.get("/metrics").splitlines() if line.split("{")[0].split(" ")[0] == name]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    @property
    def pids(self) -> list[int]:
        """Of the server and all that it started, in the order of their numbers."""
        found, look = [], [self.process.pid]
        while look:
            pid = look.pop()
            found.append(pid)
            look += _children(pid)
        return sorted(found)

    @property
    def workers(self) -> list[int]:
        """Processes that hold engines: the server's own children of this kind, not what these start themselves."""
        return sorted(pid for pid in _children(self.process.pid) if b"spawn_main" in _read(f"/proc/{pid}/cmdline"))

    def sample(self) -> dict[str, float]:
        """Memory in MiB, open files and threads, of all processes together."""
        pids = self.pids
        memory = [_read(f"/proc/{pid}/statm").split() for pid in pids]
        files, threads = 0, 0
        for pid in pids:
            with suppress(OSError):
                files += sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
                threads += sum(1 for _ in Path(f"/proc/{pid}/task").iterdir())
        rss = sum(int(each[1]) for each in memory if len(each) > 1) * _PAGE / (1 << 20)
        return {"rss_mib": rss, "files": files, "threads": threads, "processes": len(pids)}

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
        for pid in reversed(self.pids if self.alive else [self.process.pid]):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.alive:
            self.stop(40.0 if kind is None else 10.0)


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                found += map(int, (task / "children").read_text().split())
    return found


def _read(path: str) -> bytes:
    with suppress(OSError):
        return Path(path).read_bytes()
    return b""
