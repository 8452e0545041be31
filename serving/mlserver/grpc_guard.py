"""What every message of gRPC passes before MLServer reads it: one that cannot be read is the client's fault.

MLServer would call a message whose bytes are none, or whose tensors have not the bytes that their shapes say, a fault
of its own, and write a trace.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError
from grpc.aio import ServerInterceptor, ServicerContext

from tocom.runtime.errors import readable

_INFER = "/inference.GRPCInferenceService/ModelInfer"
_SIZES = {"BOOL": 1, "INT8": 1, "UINT8": 1, "INT16": 2, "UINT16": 2, "FP16": 2, "INT32": 4, "UINT32": 4, "FP32": 4,
          "INT64": 8, "UINT64": 8, "FP64": 8}  # fmt: skip
_UNREADABLE = object()  # stands for a message that is none


class MessageGuard(ServerInterceptor):
    """Refuses what cannot be read, other models, and streams, each in one line."""

    def __init__(self, name: str) -> None:
        """Guards one server.

        Args:
            name: Of the model that is served.
        """
        self._name = name

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[grpc.RpcMethodHandler]], handler_call_details: Any
    ) -> grpc.RpcMethodHandler:
        """Wraps what answers a call."""
        handler = await continuation(handler_call_details)
        if handler is None:  # there is no such method, which gRPC tells
            return handler
        if handler.unary_unary is None:
            return grpc.stream_stream_rpc_method_handler(_refuse_stream)
        infers = handler_call_details.method == _INFER

        async def answer(request: Any, context: ServicerContext) -> Any:
            if request is _UNREADABLE:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the message is none of this method")
            named = getattr(request, "model_name", self._name)
            if named != self._name:
                text = f"there is no model {readable(named)[:80]}, only {self._name}"
                await context.abort(grpc.StatusCode.NOT_FOUND, text)
            if infers and (why := _misfit(request)):
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, why)
            return await handler.unary_unary(request, context)

        def read(message: bytes) -> Any:
            try:
                return handler.request_deserializer(message)
            except DecodeError:
                return _UNREADABLE

        return grpc.unary_unary_rpc_method_handler(answer, read, handler.response_serializer)


def _misfit(request: Any) -> str:
    """Why the raw contents of a request cannot be its inputs; nothing where they can."""
    contents = request.raw_input_contents
    if not contents:
        return ""
    if len(contents) != len(request.inputs):
        return f"raw contents must be one for each input, got {len(contents)} for {len(request.inputs)}"
    for tensor, content in zip(request.inputs, contents, strict=True):
        size = _SIZES.get(tensor.datatype)
        if not (_are_elements(content) if size is None else math.prod(tensor.shape) * size == len(content)):
            claim = readable(f"{tensor.datatype[:20]} {list(tensor.shape)[:8]}")
            return f"raw contents must have the bytes that datatype and shape say, {claim}, got {len(content)}"
    return ""


def _are_elements(content: bytes) -> bool:
    """Whether these are elements of BYTES, each behind its length."""
    at = 0
    while at + 4 <= len(content):
        at += 4 + int.from_bytes(content[at : at + 4], "little")
    return at == len(content)


async def _refuse_stream(_requests: Any, context: ServicerContext) -> NoReturn:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "streams are not answered: call ModelInfer for each request")
