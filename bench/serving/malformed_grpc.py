"""Malformed messages of gRPC."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from tritonclient.grpc import service_pb2

from bench.serving.clients import INFER
from bench.serving.malformed_http import bad_image
from bench.serving.subject import MODEL, grpc_message

Make = Callable[[random.Random, bytes], tuple[bytes, str]]
"""(draw, a valid image) -> a message, and the method that it is for."""

_IMAGE = {"name": "image", "datatype": "BYTES", "shape": [1]}
_PIXELS = {"name": "pixel_values", "datatype": "FP32", "shape": [1, 3, 32, 32]}
_ZEROS = {"fp32_contents": [0.0] * 3072}


def _infer(tensor: dict[str, Any], contents: dict[str, Any] | None = None, *, model: str = MODEL, raw: Any = (),
           parameter: tuple[str, str, Any] | None = None) -> tuple[bytes, str]:  # fmt: skip
    request = service_pb2.ModelInferRequest(model_name=model, raw_input_contents=raw)
    added = request.inputs.add(**tensor)
    for name, values in (contents or {}).items():
        getattr(added.contents, name).extend(values)
    if parameter is not None:
        name, field, value = parameter
        setattr(request.parameters[name], field, value)
    return request.SerializeToString(), INFER


def _noise(draw: random.Random, sheet: bytes) -> tuple[bytes, str]:
    whole = grpc_message([sheet], {})
    content = (draw.randbytes(draw.randint(1, 2000)), whole[: draw.randrange(20, len(whole) - 20)], b"")
    return draw.choice(content), INFER


_SHAPES = ([], [-1], [2**62, 3, 32, 32], [1, 3, 31, 32], [0, 3, 32, 32], [1] * 30, [-(2**63)])
_OTHER_CONTENTS = ({}, {"bytes_contents": [b"x"]}, {"bool_contents": [True]}, {"fp32_contents": [1.0]},
                   {"int64_contents": [2**62] * 10})  # fmt: skip
_DEGREES = (("int64_param", -1), ("int64_param", 99), ("string_param", "eight"), ("bool_param", True),
            ("int64_param", 2**62))  # fmt: skip

GRPC_KINDS: dict[str, Make] = {
    "no message": _noise,
    # with two entries for one input the second is nobody's, which MLServer leaves unread
    "raw contents that do not fit": lambda draw, _: _infer(_PIXELS, raw=draw.choice(
        ([draw.randbytes(4 * 3072 - 1)], [b""], [draw.randbytes(7)], [b"\xff" * (4 * 3072)]))),
    "raw bytes that do not fit": lambda draw, _: _infer(_IMAGE, raw=[draw.choice(
        (b"\xff\xff\xff\xff", b"\x05\x00\x00\x00ab", b"\x01", draw.randbytes(50)))]),
    "wrong shape": lambda draw, _: _infer(_PIXELS | {"shape": draw.choice(_SHAPES)}, _ZEROS),
    "not finite numbers": lambda draw, _: _infer(
        _PIXELS, {"fp32_contents": [draw.choice((float("nan"), float("inf"), float("-inf")))] * 3072}),
    "wrong datatype": lambda draw, _: _infer(_PIXELS | {
        "name": draw.choice(("pixel_values", "image")),
        "datatype": draw.choice(("FP64", "INT64", "BOOL", "", "STRING", "fp32", "x" * 3000))}, _ZEROS),
    "wrong name": lambda draw, sheet: _infer(
        _IMAGE | {"name": draw.choice(("", "images", "x" * 4000, "\x00", "ü"))}, {"bytes_contents": [sheet]}),
    "no image": lambda draw, sheet: _infer(_IMAGE, {"bytes_contents": [bad_image(draw, sheet)]}),
    "contents of another type": lambda draw, _: _infer(_PIXELS, draw.choice(_OTHER_CONTENTS)),
    "degree out of range": lambda draw, sheet: _infer(
        _IMAGE, {"bytes_contents": [sheet]}, parameter=(draw.choice(("degree", "min_degree")), *draw.choice(_DEGREES))),
    "unknown model": lambda draw, sheet: _infer(
        _IMAGE, {"bytes_contents": [sheet]}, model=draw.choice(("", "other", "x" * 3000, "../digits", "digits\n"))),
    "unknown method": lambda draw, _: (draw.randbytes(20), draw.choice(
        ("/inference.GRPCInferenceService/Nothing", "/x/y", "/inference.GRPCInferenceService/"))),
    "too large": lambda _draw, _sheet: (bytes(17 << 20), INFER),
}  # fmt: skip
