"""Sending what was encoded before: cheap, and never raising; what fails is a reply that says how."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import numpy as np

from bench.serving.accounts import Reply

INFER = "/inference.GRPCInferenceService/ModelInfer"
_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400, grpc.StatusCode.NOT_FOUND: 404, grpc.StatusCode.UNIMPLEMENTED: 405,
    grpc.StatusCode.PERMISSION_DENIED: 403, grpc.StatusCode.RESOURCE_EXHAUSTED: 413, grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.FAILED_PRECONDITION: 409, grpc.StatusCode.DEADLINE_EXCEEDED: 0,
}  # fmt: skip
Raw = Callable[[bytes], Awaitable[object]]


class GrpcClient:
    """One channel; messages are bytes, read only afterwards."""

    def __init__(self, port: int, timeout_s: float) -> None:
        # connections of its own: by default channels of a process to one address share theirs
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 64 << 20)]
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options)
        self._timeout_s = timeout_s

    async def send(self, message: bytes, method: str = INFER) -> object:
        """Sends a message; the response, or the error that says why there is none."""
        try:
            return await self._channel.unary_unary(method)(message, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            return error

    async def close(self) -> None:
        """Closes the channel."""
        await self._channel.close()


class BlockingGrpcClient:
    """The same on threads: two event loops of gRPC in one process get in each other's way."""

    def __init__(self, port: int, timeout_s: float) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}", options)
        self._timeout_s = timeout_s

    async def send(self, message: bytes, method: str = INFER) -> object:
        """See `GrpcClient`."""
        try:
            return await asyncio.to_thread(self._channel.unary_unary(method), message, timeout=self._timeout_s)
        except grpc.RpcError as error:
            return error

    async def close(self) -> None:
        """Closes the channel."""
        self._channel.close()


def read_grpc(raw: object) -> Reply:
    """Reads what `GrpcClient.send` brought."""
    from tritonclient.grpc import service_pb2

    if isinstance(raw, grpc.RpcError):
        text = raw.details() or ""
        # what never reached the server, or was cut off, is not the server's word
        broken = raw.code() == grpc.StatusCode.UNAVAILABLE and _of_transport(text)
        status = 0 if broken else _STATUS.get(raw.code(), 500)
        return Reply(status, f"{raw.code().name}: {text}")
    response = service_pb2.ModelInferResponse.FromString(raw)
    output = response.outputs[0]
    given = output.contents.fp32_contents
    logits = np.array(given, np.float32) if given else np.frombuffer(response.raw_output_contents[0], np.float32)
    logits = logits.reshape(tuple(output.shape))
    return Reply(200, logits=logits, degree=response.parameters["degree"].int64_param)


def _of_transport(text: str) -> bool:
    return any(word in text for word in ("failed to connect", "Socket closed", "Connection reset", "recvmsg", "sendmsg",
                                         "RST_STREAM", "GOAWAY", "Broken pipe", "End of TCP"))  # fmt: skip


async def exchange(port: int, request: bytes, timeout_s: float, *, end: bool = False) -> bytes | Exception:
    """Sends bytes on a connection of their own; all that comes back, or how it failed.

    `end` tells whether to end the sending side afterwards.
    """
    writer = None
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.suppress(ConnectionError):  # it may refuse before it has read everything
                writer.write(request)
                await writer.drain()
                if end:
                    writer.write_eof()
            return await _read_all(reader)
    except (OSError, TimeoutError) as error:
        return error
    finally:
        if writer is not None:
            writer.close()


async def _read_all(reader: asyncio.StreamReader) -> bytes:
    """Until the response is whole, or the server ends the connection."""
    got = bytearray()
    while True:
        try:
            part = await reader.read(1 << 16)
        except ConnectionError:
            if got:
                return bytes(got)
            raise
        got += part
        if not part or _whole(got):
            return bytes(got)


def _whole(got: bytearray) -> bool:
    head, _, body = bytes(got).partition(b"\r\n\r\n")
    length = next((line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), None)
    return length is not None and len(body) >= int(length.partition(b":")[2])


def split_http(raw: bytes) -> tuple[int, dict[str, str], bytes] | None:
    """Status, headers and body of a response; None where it is none."""
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    parts = first.split(" ", 2)
    if len(parts) < 2 or not parts[0].startswith("HTTP/") or not parts[1].isdigit():
        return None
    pairs = (line.partition(":") for line in lines)
    return int(parts[1]), {name.lower(): value.strip() for name, _, value in pairs}, body


def read_http(raw: object) -> Reply:
    """Reads what `exchange` brought for a valid request: of the protocol, or of the page."""
    if isinstance(raw, Exception):
        return Reply(0, f"{type(raw).__name__}: {raw}")
    found = split_http(raw)
    if found is None:
        return Reply(0, "the connection ended without an answer")
    status, headers, body = found
    if status != 200:
        return Reply(status, _error_text(body), "retry-after" in headers)
    try:
        return _read_json(json.loads(body))
    except (ValueError, KeyError, IndexError, TypeError) as error:
        return Reply(200, f"an answer that cannot be read: {error!r}")


def _read_json(answer: dict[str, Any]) -> Reply:
    if "predictions" in answer:
        return Reply(200, classes=(answer["predictions"][0]["class"],), degree=answer["degree"])
    output = answer["outputs"][0]
    logits = np.array(output["data"], np.float32).reshape(output["shape"])
    return Reply(200, logits=logits, degree=answer["parameters"]["degree"])


def _error_text(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return body.decode("utf-8", "replace")
