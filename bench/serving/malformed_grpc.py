"""Malformed messages of gRPC, and the draw among all kinds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from tritonclient.grpc import service_pb2

from bench.serving.accounts import Reply
from bench.serving.clients import INFER, split_http
from bench.serving.malformed_http import HTTP_KINDS, Bad, Make, bad_image
from bench.serving.subject import MODEL, grpc_message

_LONGEST = 2000
_GRPC_SHARE = 0.3


def malformed(seed: int, number: int, sheets: Sequence[bytes]) -> Bad:
    """A malformed request: always the same for a seed, a number and the sheets.

    Args:
        seed: Of all of them.
        number: Of this one.
        sheets: Valid images, that it may be made of.
    """
    draw = random.Random(f"{seed} {number}")
    kinds = GRPC_KINDS if draw.random() < _GRPC_SHARE else HTTP_KINDS
    return draw.choice(kinds)(draw, sheets)


def _message(kind: str, tensor: dict[str, Any], parameters: dict[str, Any] | None = None, *, model: str = MODEL,
             raw: Sequence[bytes] = (), contents: dict[str, Any] | None = None, **flags: Any) -> Bad:  # fmt: skip
    request = service_pb2.ModelInferRequest(model_name=model, raw_input_contents=raw)
    added = request.inputs.add(**tensor)
    for name, values in (contents or {}).items():
        getattr(added.contents, name).extend(values)
    for name, (field, value) in (parameters or {}).items():
        setattr(request.parameters[name], field, value)
    return Bad(kind, "grpc", request.SerializeToString(), method=INFER, **flags)


def _noise(draw: random.Random, sheets: Sequence[bytes]) -> Bad:
    whole = grpc_message([draw.choice(sheets)], {})
    content = draw.choice((draw.randbytes(draw.randint(1, 2000)), whole[: draw.randrange(20, len(whole) - 20)], b""))
    return Bad("no message", "grpc", content, method=INFER)


def _raw(draw: random.Random, _sheets: Sequence[bytes]) -> Bad:
    tensor = {"name": "pixel_values", "datatype": "FP32", "shape": [1, 3, 32, 32]}
    # with two entries for one input the second is nobody's, which MLServer leaves unread
    raw = draw.choice(([draw.randbytes(4 * 3072 - 1)], [b""], [draw.randbytes(7)], [b"\xff" * (4 * 3072)]))
    return _message("raw contents that do not fit", tensor, raw=raw)


def _raw_bytes(draw: random.Random, _sheets: Sequence[bytes]) -> Bad:
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1]}
    raw = draw.choice((b"\xff\xff\xff\xff", b"\x05\x00\x00\x00ab", b"\x01", draw.randbytes(50)))
    return _message("raw bytes that do not fit", tensor, raw=[raw])


def _shape(draw: random.Random, _sheets: Sequence[bytes]) -> Bad:
    shape = draw.choice(([], [-1], [2**62, 3, 32, 32], [1, 3, 31, 32], [0, 3, 32, 32], [1] * 30, [-(2**63)]))
    tensor = {"name": "pixel_values", "datatype": "FP32", "shape": shape}
    return _message("wrong shape", tensor, contents={"fp32_contents": [0.0] * 3072})


def _numbers(draw: random.Random, _sheets: Sequence[bytes]) -> Bad:
    tensor = {"name": "pixel_values", "datatype": "FP32", "shape": [1, 3, 32, 32]}
    value = draw.choice((float("nan"), float("inf"), float("-inf")))
    return _message("not finite numbers", tensor, contents={"fp32_contents": [value] * 3072})


def _type(draw: random.Random, _sheets: Sequence[bytes]) -> Bad:
    name = draw.choice(("FP64", "INT64", "BOOL", "", "STRING", "fp32", "x" * 3000))
    tensor = {"name": draw.choice(("pixel_values", "image")), "datatype": name, "shape": [1, 3, 32, 32]}
    return _message("wrong datatype", tensor, contents={"fp32_contents": [0.0] * 3072})


def _name(draw: random.Random, sheets: Sequence[bytes]) -> Bad:
    tensor = {"name": draw.choice(("", "images", "x" * 4000, "\x00", "ü")), "datatype": "BYTES", "shape": [1]}
    return _message("wrong name", tensor, contents={"bytes_contents": [draw.choice(sheets)]})


def _image(draw: random.Random, sheets: Sequence[bytes]) -> Bad:
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1]}
    return _message("no image", tensor, contents={"bytes_contents": [bad_image(draw, sheets)]})


def _field(draw: random.Random, _sheets: Sequence[bytes]) -> Bad:
    tensor = {"name": "pixel_values", "datatype": "FP32", "shape": [1, 3, 32, 32]}
    contents = draw.choice(({}, {"bytes_contents": [b"x"]}, {"bool_contents": [True]}, {"fp32_contents": [1.0]},
                            {"int64_contents": [2**62] * 10}))  # fmt: skip
    return _message("contents of another type", tensor, contents=contents)


def _degree(draw: random.Random, sheets: Sequence[bytes]) -> Bad:
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1]}
    value = draw.choice((("int64_param", -1), ("int64_param", 99), ("string_param", "eight"), ("bool_param", True),
                         ("int64_param", 2**62)))  # fmt: skip
    parameters = {draw.choice(("degree", "min_degree")): value}
    return _message("degree out of range", tensor, parameters, contents={"bytes_contents": [draw.choice(sheets)]})


def _model(draw: random.Random, sheets: Sequence[bytes]) -> Bad:
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1]}
    model = draw.choice(("", "other", "x" * 3000, "../digits", "digits\n"))
    return _message("unknown model", tensor, model=model, contents={"bytes_contents": [draw.choice(sheets)]})


def _method(draw: random.Random, _sheets: Sequence[bytes]) -> Bad:
    method = draw.choice(("/inference.GRPCInferenceService/Nothing", "/x/y", "/inference.GRPCInferenceService/"))
    return Bad("unknown method", "grpc", draw.randbytes(20), method=method)


def _size(_draw: random.Random, _sheets: Sequence[bytes]) -> Bad:
    return Bad("too large", "grpc", bytes(17 << 20), method=INFER)


GRPC_KINDS: tuple[Make, ...] = (_noise, _raw, _raw_bytes, _shape, _numbers, _type, _name, _image, _field, _degree,
                                _model, _method, _size)  # fmt: skip


def judge_http(bad: Bad, raw: object) -> tuple[str, str]:
    """How a malformed request was answered: "refused", "closed", "answered", "busy", or a fault; and what was said.

    Args:
        bad: It.
        raw: See `bench.serving.clients.exchange`.
    """
    if isinstance(raw, ConnectionError) and bad.may_close:
        return "closed", ""
    if isinstance(raw, Exception):
        return "no answer", f"{type(raw).__name__}: {raw}"
    found = split_http(raw)
    if found is None:
        closed = not raw and bad.may_close
        return ("closed" if closed else "no answer"), raw[:100].decode("latin-1")
    status, headers, body = found
    text = body.decode("utf-8", "replace")
    if 200 <= status < 300:
        return ("answered" if bad.harmless else "answered as if valid"), text
    return _refusal(status, text, busy="retry-after" in headers)


def judge_grpc(bad: Bad, reply: Reply) -> tuple[str, str]:
    """The same for gRPC.

    Args:
        bad: It.
        reply: What came.
    """
    if reply.status == 200:
        return ("answered" if bad.harmless else "answered as if valid"), "an answer"
    # what is no message is refused by gRPC itself, which has this one word for it
    if "deserializing" in reply.text:
        return "refused", reply.text
    return _refusal(reply.status, reply.text, busy=True)


def _refusal(status: int, text: str, *, busy: bool) -> tuple[str, str]:
    if status in (429, 503):
        return ("busy" if busy else "refused unclearly"), text
    if not 400 <= status < 500:
        return "no answer" if status == 0 else "fault of the server", f"{status} {text}"
    readable = text.strip() and "\n" not in text.strip() and "Traceback" not in text and len(text) <= _LONGEST
    return ("refused" if readable else "refused unclearly"), text
