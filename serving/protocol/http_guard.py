"""What every HTTP request passes before anything reads it: bounds on its size and time, and on how many there are.

A slow client holds a connection, never more: headers have a time limit here, bodies one in `Guard`, and there is a
limit on connections. What is refused gets a status, one line, and where it helps a Retry-After.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_DRAINED = 4  # times the largest body that is read of one that is larger, and thrown away


@dataclass(frozen=True)
class HttpLimits:
    """Bounds of the HTTP server.

    Attributes:
        max_body_bytes: Of a request.
        body_s: Within which a request's body must have come, in seconds.
        header_s: Within which its headers must have come.
        max_header_bytes: Of all of them.
        max_requests: That are being answered at the same time.
        max_connections: That are open at the same time.
    """

    max_body_bytes: int = 16 << 20
    body_s: float = 20.0
    header_s: float = 10.0
    max_header_bytes: int = 64 << 10
    max_requests: int = 512
    max_connections: int = 1024


class Guard:
    """ASGI middleware that holds `HttpLimits`."""

    def __init__(self, app: App, limits: HttpLimits) -> None:
        self._app, self._limits = app, limits
        self._running = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._running >= self._limits.max_requests:
            await refuse(send, 503, f"{self._running} requests are being answered, which is the limit", 1.0)
            return
        self._running += 1
        try:
            await _Exchange(self._limits, receive, send).run(self._app, scope)
        finally:
            self._running -= 1


class _Exchange:
    """One request that is passed on, and its response."""

    def __init__(self, limits: HttpLimits, receive: Receive, send: Send) -> None:
        self._limits, self._receive, self._send = limits, receive, send
        self._came, self._whole = 0, False
        self._until = asyncio.get_running_loop().time() + limits.body_s
        self._started = self._refused = False

    async def run(self, app: App, scope: Message) -> None:
        headers = dict(scope["headers"])
        if b"content-encoding" in headers:  # a small body could become a large one
            await refuse(self._send, 415, "a request's body must not be compressed: send it without Content-Encoding")
            return
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._limits.max_body_bytes:
            await refuse(self._send, 413, self._too_large(), before_end=self._drain)
            return
        try:
            await app(scope, self.receive, self.send)
        except Exception:
            if not self._refused:  # else it is what the application makes of a request that ends early
                raise

    async def receive(self) -> Message:
        """The request's next message, as long as its body keeps to size and time."""
        if self._refused:
            return {"type": "http.disconnect"}
        if self._whole:  # from here on it only waits for the end of the connection
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            return await self._refuse(408, f"a request's body must come within {self._limits.body_s:g} s")
        self._came += len(message.get("body", b""))
        self._whole = message["type"] != "http.request" or not message.get("more_body", False)
        if self._came > self._limits.max_body_bytes:
            return await self._refuse(413, self._too_large(), self._drain)
        return message

    async def send(self, message: Message) -> None:
        """Passes on what the application answers, unless the request was refused meanwhile."""
        if not self._refused:
            self._started = True
            await self._send(message)

    async def _refuse(
        self, status: int, message: str, before_end: Callable[[], Awaitable[None]] | None = None
    ) -> Message:
        """Answers in the application's place; to the application it looks as if the client had left."""
        self._refused = True
        if not self._started:
            await refuse(self._send, status, message, before_end=before_end)
        return {"type": "http.disconnect"}

    async def _drain(self) -> None:
        """Reads on for a while: a client that is still sending would see no answer, only a connection that ends."""
        came = 0
        try:
            async with asyncio.timeout_at(self._until):
                while came <= _DRAINED * self._limits.max_body_bytes:
                    message = await self._receive()
                    came += len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return
        except TimeoutError:
            return

    def _too_large(self) -> str:
        return f"a request's body must be {self._limits.max_body_bytes} bytes at most"


async def refuse(
    send: Send,
    status: int,
    message: str,
    retry_after_s: float | None = None,
    before_end: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Answers with a status and one line, and ends the connection, whose body nobody will read.

    Args:
        send: Of the request.
        status: Of HTTP.
        message: The line.
        retry_after_s: When asking again may help, in seconds.
        before_end: Waited for when the answer is on its way, before the connection ends.
    """
    content = json.dumps({"error": message}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
        (b"connection", b"close"),
    ]
    if retry_after_s is not None:
        headers.append((b"retry-after", retry_after(retry_after_s).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content, "more_body": before_end is not None})
    if before_end is not None:
        await before_end()
        await send({"type": "http.response.body", "body": b""})


def retry_after(seconds: float) -> str:
    """The value of a Retry-After header: whole seconds, 1 at least.

    >>> retry_after(0.2)
    '1'
    """
    return str(max(math.ceil(seconds), 1))


def guarded_protocol(limits: HttpLimits) -> type[HttpToolsProtocol]:
    """The HTTP protocol of uvicorn, with a limit on connections, and on how long a request's headers may take.

    Args:
        limits: Of both.
    """

    class GuardedProtocol(HttpToolsProtocol):
        _awaited: asyncio.TimerHandle | None = None
        _header_bytes = 0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > limits.max_connections:
                transport.write(b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\n"
                                b"content-length: 0\r\n\r\n")  # fmt: skip
                transport.close()
                return
            self._expect_headers()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._awaited is not None:  # headers are still not complete
                self._header_bytes += len(data)
                if self._header_bytes > limits.max_header_bytes:
                    self._give_up()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            if self._awaited is None:
                self._expect_headers()

        def on_headers_complete(self) -> None:
            self._forget()
            super().on_headers_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            super().connection_lost(exc)

        def _expect_headers(self) -> None:
            self._header_bytes = 0
            self._awaited = self.loop.call_later(limits.header_s, self._give_up)

        def _give_up(self) -> None:
            if not self.transport.is_closing():
                self.transport.close()

        def _forget(self) -> None:
            if self._awaited is not None:
                self._awaited.cancel()
                self._awaited = None

    return GuardedProtocol
