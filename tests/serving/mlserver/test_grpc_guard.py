"""Messages of gRPC that cannot be read, through a real server of gRPC with the guard in front of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
import grpc.aio
import pytest
from tritonclient.grpc import service_pb2

from tocom.serving.mlserver.grpc_guard import MessageGuard

pytestmark = pytest.mark.timing

SERVICE = "inference.GRPCInferenceService"


async def _echo(request: service_pb2.ModelInferRequest, context: grpc.aio.ServicerContext) -> object:
    return service_pb2.ModelInferResponse(model_name=request.model_name)


async def _stream(requests: object, context: grpc.aio.ServicerContext) -> object:
    async for _ in requests:
        yield service_pb2.ModelStreamInferResponse()


async def _call(message: bytes, method: str = "ModelInfer") -> object:
    server = grpc.aio.server(interceptors=[MessageGuard("digits")])
    answers = service_pb2.ModelInferResponse.SerializeToString
    reads = service_pb2.ModelInferRequest.FromString
    handlers = {"ModelInfer": grpc.unary_unary_rpc_method_handler(_echo, reads, answers),
                "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(_stream, reads, answers)}  # fmt: skip
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            if method == "ModelStreamInfer":
                return [each async for each in channel.stream_stream(f"/{SERVICE}/{method}")(iter([message]))]
            return await channel.unary_unary(f"/{SERVICE}/{method}")(message, timeout=60)
        except grpc.aio.AioRpcError as error:
            return error
        finally:
            await server.stop(0)


def call(message: bytes, method: str = "ModelInfer") -> object:
    return asyncio.run(_call(message, method))


def message(datatype: str, shape: list[int], *raw: bytes, name: str = "digits") -> bytes:
    request = service_pb2.ModelInferRequest(model_name=name, raw_input_contents=raw)
    request.inputs.add(name="x", datatype=datatype, shape=shape)
    return request.SerializeToString()


@pytest.mark.parametrize("content", [
    message("FP32", [1, 3], bytes(12)), message("FP32", [0], b""), message("UINT8", [2, 2], b"abcd"),
    message("BYTES", [2], b"\x01\x00\x00\x00a\x00\x00\x00\x00"), message("BYTES", [0], b""), message("FP32", [1]),
])  # fmt: skip
def test_what_fits_is_passed_on(content: bytes) -> None:
    assert isinstance(call(content), bytes)


@pytest.mark.parametrize("content", [
    message("FP32", [1, 3], bytes(11)), message("FP32", [2**62, 4], bytes(12)), message("FP32", [-1, -3], bytes(13)),
    message("FP16", [1], b""), message("BYTES", [1], b"\x01"), message("BYTES", [1], b"\x05\x00\x00\x00ab"),
    message("BYTES", [1], b"\xff\xff\xff\xff"), message("FP32", [1], bytes(4), bytes(4)), b"\xff\xff", b"\x0a\x7fx",
    message("NOTHING", [1], b"abc"), message("\n" * 90, [1] * 3000, b"abc"),
])  # fmt: skip
def test_what_does_not_fit_is_the_clients_fault(content: bytes) -> None:
    error = call(content)
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "\n" not in error.details() and 0 < len(error.details()) < 400


@pytest.mark.parametrize("name", ["", "other", "digits\n", "x" * 5000])
def test_there_is_one_model(name: str) -> None:
    error = call(message("FP32", [1], bytes(4), name=name))
    assert error.code() == grpc.StatusCode.NOT_FOUND
    assert "\n" not in error.details() and len(error.details()) < 200


def test_no_streams_and_no_other_methods() -> None:
    found: Callable[[str], object] = lambda method: call(message("FP32", [1], bytes(4)), method).code()  # noqa: E731
    assert found("ModelStreamInfer") == found("Nothing") == grpc.StatusCode.UNIMPLEMENTED
