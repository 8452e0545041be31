"""The bounds of the HTTP server, by raw sockets against a real one."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tests.waiting import SAFETY_S, eventually
from tocom.serving.protocol.http_guard import Guard, HttpLimits, guarded_protocol, retry_after

pytestmark = pytest.mark.timing

LIMITS = HttpLimits(max_body_bytes=1000, body_s=600, header_s=600, max_header_bytes=4096, max_requests=2,
                    max_connections=6)  # fmt: skip


class Served:
    """A real server, its state, and an application that a test can hold up."""

    def __init__(self, limits: HttpLimits) -> None:
        self.begun, self.release = threading.Semaphore(0), threading.Event()
        routes = [Route("/length", self._length, methods=["POST"]), Route("/slow", self._slow, methods=["POST"])]
        config = uvicorn.Config(Guard(Starlette(routes=routes), limits), http=guarded_protocol(limits), ws="none",
                                lifespan="off", log_config=None, port=0)  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        eventually(lambda: self._server.started, "the server's start")
        self.port = self._server.servers[0].sockets[0].getsockname()[1]

    async def _length(self, request: Request) -> Response:
        self.begun.release()
        return Response(str(len(await request.body())))

    async def _slow(self, request: Request) -> Response:
        await request.body()
        self.begun.release()
        assert await asyncio.to_thread(self.release.wait, SAFETY_S)
        return Response("done")

    def wait_for_connections(self, count: int) -> None:
        """Waits until the server knows of so many open connections."""
        eventually(lambda: len(self._server.server_state.connections) == count, f"{count} connections")

    def close(self) -> None:
        self.release.set()
        self._server.should_exit = True
        self._thread.join(SAFETY_S)
        assert not self._thread.is_alive()


@pytest.fixture
def serve() -> Iterator[Callable[[HttpLimits], Served]]:
    made: list[Served] = []

    def build(limits: HttpLimits) -> Served:
        made.append(Served(limits))
        return made[-1]

    yield build
    for server in made:
        server.close()


@pytest.fixture
def server(serve: Callable[[HttpLimits], Served]) -> Served:
    """One whose limits on time are never reached."""
    return serve(LIMITS)


@pytest.fixture
def connect() -> Iterator[Callable[[Served], socket.socket]]:
    with contextlib.ExitStack() as stack:

        def dial(server: Served) -> socket.socket:
            made = socket.create_connection(("127.0.0.1", server.port), timeout=SAFETY_S)
            return stack.enter_context(contextlib.closing(made))

        yield dial


@pytest.fixture
def dial(server: Served, connect: Callable[[Served], socket.socket]) -> Callable[[], socket.socket]:
    return lambda: connect(server)


def post(body: bytes, path: str = "/length", headers: str = "", length: int | None = None) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body) if length is None else length}\r\n{headers}"
    return head.encode() + b"\r\n" + body


def answer(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of one response; status 0 where the connection ends without one."""
    stream = connection.makefile("rb")
    line = stream.readline()
    if not line:
        return 0, {}, b""
    headers = {}
    while (header := stream.readline()) not in (b"\r\n", b""):
        name, _, value = header.decode().partition(":")
        headers[name.lower()] = value.strip()
    return int(line.split()[1]), headers, stream.read(int(headers.get("content-length", 0)))


def test_what_keeps_to_the_bounds_passes(dial: Callable[[], socket.socket]) -> None:
    connection = dial()
    for size in (0, 1, 1000):  # on one connection, that is kept alive
        connection.sendall(post(b"x" * size))
        assert answer(connection)[::2] == (200, str(size).encode())
    connection.sendall(b"POST /length HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
    assert answer(connection)[::2] == (200, b"3")


def test_too_large_by_its_own_word(dial: Callable[[], socket.socket]) -> None:
    connection = dial()
    connection.sendall(post(b"", length=10**12))
    status, headers, body = answer(connection)
    assert status == 413
    assert "1000 bytes" in json.loads(body)["error"]
    assert headers["connection"] == "close"


def test_too_large_in_chunks(dial: Callable[[], socket.socket]) -> None:
    connection = dial()
    connection.sendall(b"POST /length HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    connection.sendall(b"200\r\n" + b"x" * 512 + b"\r\n")
    connection.sendall(b"200\r\n" + b"x" * 512 + b"\r\n")
    assert answer(connection)[0] == 413


def test_a_compressed_body_is_refused(dial: Callable[[], socket.socket]) -> None:
    connection = dial()
    connection.sendall(post(gzip.compress(b"0" * 10**6)[:900], headers="Content-Encoding: gzip\r\n"))
    status, _, body = answer(connection)
    assert status == 415
    assert "Content-Encoding" in json.loads(body)["error"]


def test_a_slow_body(serve: Callable[[HttpLimits], Served], connect: Callable[[Served], socket.socket]) -> None:
    connection = connect(serve(replace(LIMITS, body_s=0.3)))
    began = time.monotonic()
    connection.sendall(post(b"a", length=10))
    status, _, body = answer(connection)
    assert status == 408 and "within 0.3 s" in json.loads(body)["error"]
    assert time.monotonic() - began > 0.2  # it was waited for


def test_slow_headers(serve: Callable[[HttpLimits], Served], connect: Callable[[Served], socket.socket]) -> None:
    server = serve(replace(LIMITS, header_s=0.3))
    silent, trickling = connect(server), connect(server)
    trickling.sendall(b"POST /length HTTP/1.1\r\nHost: x\r\nX: ")
    trickling.settimeout(0.05)
    sent = 0
    while not ended(trickling):
        with contextlib.suppress(OSError):
            sent += trickling.send(b"y")
        assert sent < 4000, "a connection that sends a byte now and then is kept"  # by time, not by size
    assert answer(silent)[0] == 0


def ended(connection: socket.socket) -> bool:
    """Whether the server has ended a connection, after waiting as long as the socket's timeout is."""
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def test_endless_headers(dial: Callable[[], socket.socket]) -> None:
    connection = dial()
    with contextlib.suppress(OSError):  # it may be ended before all of it is sent
        connection.sendall(b"POST /length HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 5000)
    assert ended(connection), "a header without an end is read"


def test_too_many_requests_at_once(server: Served, dial: Callable[[], socket.socket]) -> None:
    busy = [dial(), dial()]
    for connection in busy:
        connection.sendall(post(b"x", path="/slow"))
        assert server.begun.acquire(timeout=SAFETY_S)
    third = dial()
    third.sendall(post(b"x"))
    status, headers, body = answer(third)
    assert status == 503
    assert headers["retry-after"] == "1"
    assert "2 requests" in json.loads(body)["error"]
    server.release.set()
    assert [answer(connection)[::2] for connection in busy] == [(200, b"done")] * 2
    assert_answers(dial, b"xyz")


def assert_answers(dial: Callable[[], socket.socket], body: bytes) -> None:
    """A request is answered as soon as the server has noticed that others have ended."""

    def answered() -> bool:
        connection = dial()
        connection.sendall(post(body))
        status, _, content = answer(connection)
        connection.close()
        assert status in (200, 503)
        return status == 200 and content == str(len(body)).encode()

    eventually(answered, "an answer")


def test_too_many_connections(server: Served, dial: Callable[[], socket.socket]) -> None:
    idle = [dial() for _ in range(6)]
    server.wait_for_connections(6)
    seventh = dial()
    status, headers, _ = answer(seventh)
    assert (status, headers["retry-after"]) == (503, "1")
    for connection in idle:
        connection.close()
    assert_answers(dial, b"xy")


def test_a_client_that_leaves_halfway_leaves_nothing_behind(server: Served, dial: Callable[[], socket.socket]) -> None:
    for _ in range(10):
        connection = dial()
        connection.sendall(post(b"abc", length=100))
        assert server.begun.acquire(timeout=SAFETY_S)
        connection.close()
        server.wait_for_connections(0)
    assert_answers(dial, b"abcd")


def test_retry_after_is_whole_seconds() -> None:
    assert [retry_after(seconds) for seconds in (0.0, 0.2, 1.0, 1.1)] == ["1", "1", "1", "2"]
