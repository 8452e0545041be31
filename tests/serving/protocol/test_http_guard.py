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

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tocom.serving.protocol.http_guard import Guard, HttpLimits, guarded_protocol, retry_after

LIMITS = HttpLimits(
    max_body_bytes=1000, body_s=0.5, header_s=0.4, max_header_bytes=4096, max_requests=2, max_connections=6
)


async def _length(request: Request) -> Response:
    return Response(str(len(await request.body())))


async def _slow(request: Request) -> Response:
    await request.body()
    await asyncio.sleep(0.8)
    return Response("done")


@pytest.fixture
def port() -> Iterator[int]:
    app = Starlette(routes=[Route("/length", _length, methods=["POST"]), Route("/slow", _slow, methods=["POST"])])
    config = uvicorn.Config(Guard(app, LIMITS), http=guarded_protocol(LIMITS), ws="none", lifespan="off",
                            log_config=None, port=0)  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(5)


@pytest.fixture
def dial(port: int) -> Iterator[Callable[[], socket.socket]]:
    with contextlib.ExitStack() as stack:

        def connect() -> socket.socket:
            made = socket.create_connection(("127.0.0.1", port), timeout=5)
            return stack.enter_context(contextlib.closing(made))

        yield connect


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


def test_a_slow_body(dial: Callable[[], socket.socket]) -> None:
    connection = dial()
    connection.sendall(post(b"a", length=10))
    began = time.monotonic()
    status, _, _ = answer(connection)
    assert status == 408
    assert 0.3 < time.monotonic() - began < 3


def test_slow_headers(dial: Callable[[], socket.socket]) -> None:
    silent, trickling = dial(), dial()
    began = time.monotonic()
    with contextlib.suppress(OSError):
        for byte in b"POST /length HTTP/1.1\r\n" * 3:
            trickling.sendall(bytes([byte]))
            time.sleep(0.05)
            if time.monotonic() - began > 2:
                pytest.fail("a connection that sends a byte now and then is kept")
    with contextlib.suppress(OSError):
        assert answer(silent)[0] == 0


def test_endless_headers(dial: Callable[[], socket.socket]) -> None:
    connection = dial()
    connection.sendall(b"POST /length HTTP/1.1\r\nHost: x\r\nX: ")
    with pytest.raises(OSError), contextlib.suppress(AssertionError):
        for _ in range(1000):
            connection.sendall(b"y" * 1024)
            time.sleep(0.001)
        pytest.fail("a header without an end is read")


def test_too_many_requests_at_once(dial: Callable[[], socket.socket]) -> None:
    busy = [dial(), dial()]
    for connection in busy:
        connection.sendall(post(b"x", path="/slow"))
    time.sleep(0.2)
    third = dial()
    third.sendall(post(b"x"))
    status, headers, body = answer(third)
    assert status == 503
    assert headers["retry-after"] == "1"
    assert "2 requests" in json.loads(body)["error"]
    assert [answer(connection)[::2] for connection in busy] == [(200, b"done")] * 2
    again = dial()
    again.sendall(post(b"xyz"))
    assert answer(again)[::2] == (200, b"3")


def test_too_many_connections(dial: Callable[[], socket.socket]) -> None:
    idle = [dial() for _ in range(6)]
    time.sleep(0.1)
    seventh = dial()
    status, headers, _ = answer(seventh)
    assert (status, headers["retry-after"]) == (503, "1")
    for connection in idle:
        connection.close()
    time.sleep(0.2)
    again = dial()
    again.sendall(post(b"xy"))
    assert answer(again)[::2] == (200, b"2")


def test_a_client_that_leaves_halfway_leaves_nothing_behind(dial: Callable[[], socket.socket]) -> None:
    for _ in range(10):
        connection = dial()
        connection.sendall(post(b"abc", length=100))
        connection.close()
    time.sleep(0.2)
    connection = dial()
    connection.sendall(post(b"abcd"))
    assert answer(connection)[::2] == (200, b"4")


def test_retry_after_is_whole_seconds() -> None:
    assert [retry_after(seconds) for seconds in (0.0, 0.2, 1.0, 1.1)] == ["1", "1", "1", "2"]
