"""Requests of HTTP that no server must answer as if they were fine; each follows from a seed and its number."""

from __future__ import annotations

import base64
import gzip
import json
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from bench.serving.subject import MODEL, http_request

INFER = f"/v2/models/{MODEL}/infer"
_SIZE = (3, 32, 32)  # of the digits' network


@dataclass(frozen=True)
class Bad:
    """A malformed request.

    Attributes:
        kind: What is wrong with it.
        protocol: "http" or "grpc".
        content: Bytes of a connection, or a message.
        method: Of gRPC.
        ends: Whether the sending side ends behind it, so that what it promised never comes.
        may_close: Whether ending the connection without a word is an answer: to what is no HTTP, or ends early.
        harmless: Whether it may be answered as well: what is wrong with it is bounded and touches nothing.
    """

    kind: str
    protocol: str
    content: bytes
    method: str = ""
    ends: bool = False
    may_close: bool = False
    harmless: bool = False


Make = Callable[[random.Random, Sequence[bytes]], Bad]


def _plain(kind: str, content: bytes, **flags: Any) -> Bad:
    return Bad(kind, "http", content, **flags)


def _infer(kind: str, payload: object, **flags: Any) -> Bad:
    return _plain(kind, http_request(INFER, json.dumps(payload).encode()), **flags)


def tensor(draw: random.Random, sheets: Sequence[bytes]) -> dict[str, Any]:
    """A valid input, to be broken."""
    content = base64.b64encode(draw.choice(sheets)).decode()
    return {"name": "image", "datatype": "BYTES", "shape": [1], "data": [content],
            "parameters": {"content_type": "base64"}}  # fmt: skip


def _pixels(shape: Sequence[int], data: object) -> dict[str, Any]:
    return {"inputs": [{"name": "pixel_values", "datatype": "FP32", "shape": list(shape), "data": data}]}


def _cut_json(draw: random.Random, sheets: Sequence[bytes]) -> Bad:
    text = json.dumps({"inputs": [tensor(draw, sheets)]}).encode()
    return _plain("JSON cut off", http_request(INFER, text[: draw.randrange(len(text) - 1)]))


def _flipped_json(draw: random.Random, sheets: Sequence[bytes]) -> Bad:
    text = bytearray(json.dumps({"inputs": [{**tensor(draw, sheets), "datatype": "INT8"}]}).encode())
    for _ in range(draw.randint(1, 8)):
        text[draw.randrange(len(text))] = draw.randrange(256)
    return _plain("JSON with flipped bytes", http_request(INFER, bytes(text)))


def _other_json(draw: random.Random, _sheets: Sequence[bytes]) -> Bad:
    payloads = [None, 1, "x", [], {}, {"inputs": None}, {"inputs": {}}, {"inputs": []}, {"inputs": [None]},
                {"inputs": [[]]}, {"inputs": "pixel_values"}, {"outputs": []}, {"inputs": [{}]}, True]  # fmt: skip
    return _infer("JSON of another shape", draw.choice(payloads))


def _wrong_name(draw: random.Random, sheets: Sequence[bytes]) -> Bad:
    names = ("", "images", "pixel_value", "../image", "\u0000", "x" * 5000, "Ünïcode", "{}", "%s%n")
    return _infer("wrong name", {"inputs": [{**tensor(draw, sheets), "name": draw.choice(names)}]})


def _wrong_type(draw: random.Random, sheets: Sequence[bytes]) -> Bad:
    types = ("FP64", "INT8", "UINT8", "BOOL", "FP16", "fp32", "", "STRING", "x" * 3000, None, 7)
    return _infer("wrong datatype", {"inputs": [{**tensor(draw, sheets), "datatype": draw.choice(types)}]})


def _wrong_shape(draw: random.Random, _sheets: Sequence[bytes]) -> Bad:
    shapes: list[Any] = [[], [0], [2], [-1], [1, 3, 31, 32], [1, 3072], [3, 32, 32], [0, *_SIZE], [2, *_SIZE], "1",
                         None, [1.5, *_SIZE], [1] * 40, [1, "x", 32, 32], [1, 1, 3, 32, 32]]  # fmt: skip
    return _infer("wrong shape", _pixels([], [0.0] * 3072) | {"inputs": [
        {"name": "pixel_values", "datatype": "FP32", "shape": draw.choice(shapes), "data": [0.0] * 3072}]})  # fmt: skip


def _huge_shape(draw: random.Random, _sheets: Sequence[bytes]) -> Bad:
    many = draw.choice((10**6, 2**31, 2**63, 10**30, 2**31 * 3))
    return _infer("huge shape", _pixels([many, *_SIZE], [0.0] * draw.choice((0, 1, 3072))))


def _ragged(draw: random.Random, _sheets: Sequence[bytes]) -> Bad:
    rows: list[Any] = [[0.0] * 32 for _ in range(96)]
    rows[draw.randrange(96)] = draw.choice(([0.0] * 31, [], [[0.0]], 0.0, None, "x", {}))
    return _infer("ragged lists", _pixels([1, *_SIZE], rows))


def _not_numbers(draw: random.Random, _sheets: Sequence[bytes]) -> Bad:
    value = draw.choice(("NaN", "Infinity", "-Infinity", "1e999", '"1"', "null", "{}", "true", "1e39"))
    numbers = ["0"] * 3072
    numbers[draw.randrange(3072)] = value
    text = (
        f'{{"inputs":[{{"name":"pixel_values","datatype":"FP32","shape":[1,3,32,32],"data":[{",".join(numbers)}]}}]}}'
    )
    # text and truth values of a number are what numpy, and MLServer, read as that number
    return _plain("not finite numbers", http_request(INFER, text.encode()), harmless=value in ('"1"', "true", "null"))


def _bad_base64(draw: random.Random, sheets: Sequence[bytes]) -> Bad:
    text = draw.choice(("!!!", "AAA", "=", "ÿÿ", "A" * 5001, "data:image/png;base64,AAAA", " ", "\n\n"))
    return _infer("no base64", {"inputs": [{**tensor(draw, sheets), "data": [text]}]})


def bad_image(draw: random.Random, sheets: Sequence[bytes]) -> bytes:
    """Bytes that are no usable image: cut off, flipped, of another kind, or with too many pixels."""
    sheet = draw.choice(sheets)
    return draw.choice((
        sheet[: draw.randrange(60)],
        sheet[:16] + draw.randbytes(8) + sheet[24:],  # sizes that its checksum does not cover
        draw.randbytes(draw.randrange(1, 400)),
        b"",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        bomb(),
        b"GIF89a" + draw.randbytes(7),
        b"BM" + draw.randbytes(40),
        b"II*\x00" + draw.randbytes(60),
        b"\xff\xd8\xff\xe0" + draw.randbytes(60),
        b"RIFF\xff\xff\xff\xffWEBPVP8 " + draw.randbytes(30),
    ))  # fmt: skip


@cache
def bomb(side: int = 30_000) -> bytes:
    """A small PNG that would be gigabytes when decoded."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        whole = kind + content
        return len(content).to_bytes(4, "big") + whole + zlib.crc32(whole).to_bytes(4, "big")

    head = side.to_bytes(4, "big") * 2 + bytes((8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(1 << 22)))
        + chunk(b"IEND", b"")
    )


def _bad_image(draw: random.Random, sheets: Sequence[bytes]) -> Bad:
    content = bad_image(draw, sheets)
    if draw.random() < 0.5:
        return _plain("no image", http_request("/api/predict", content))
    data = [base64.b64encode(content).decode()]
    return _infer("no image", {"inputs": [{**tensor(draw, sheets), "data": data}]})


def _bad_degree(draw: random.Random, sheets: Sequence[bytes]) -> Bad:
    name = draw.choice(("degree", "min_degree", "max_degree"))
    value = draw.choice((-1, 99 if name != "max_degree" else -3, 1.5, True, "eight", [8], {}, 10**30, "-1", "8.0"))
    return _infer("degree out of range", {"inputs": [tensor(draw, sheets)], "parameters": {name: value}})


def _bad_query(draw: random.Random, sheets: Sequence[bytes]) -> Bad:
    query = draw.choice(("degree=99", "degree=x", "degree=-1", "degree=8&max_degree=4", "top_k=0", "top_k=x", "degree=",
                         "min_degree=17", "degree=%00", "degree=" + "9" * 400))  # fmt: skip
    route = draw.choice(("/api/predict", "/api/merges"))
    # what a route does not read it does not refuse
    return _plain("bad query", http_request(f"{route}?{query}", draw.choice(sheets)), harmless=True)


def _gzip(draw: random.Random, _sheets: Sequence[bytes]) -> Bad:
    headers = [f"Content-Encoding: {draw.choice(('gzip', 'deflate', 'br', 'gzip, gzip'))}"]
    return _plain("compressed body", http_request(INFER, _gzip_bomb(), headers=headers))


@cache
def _gzip_bomb() -> bytes:
    return gzip.compress(bytes(64 << 20))


def _long_promise(draw: random.Random, sheets: Sequence[bytes]) -> Bad:
    content = json.dumps({"inputs": [tensor(draw, sheets)]}).encode()
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content) + draw.randint(1, 10**6)}\r\n\r\n"
    return _plain("Content-Length too long", head.encode() + content, ends=True, may_close=True)


def _short_promise(draw: random.Random, sheets: Sequence[bytes]) -> Bad:
    content = json.dumps({"inputs": [tensor(draw, sheets)]}).encode()
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {draw.randrange(len(content) - 1)}\r\n\r\n"
    return _plain("Content-Length too short", head.encode() + content)


def _odd_length(draw: random.Random, _sheets: Sequence[bytes]) -> Bad:
    value = draw.choice(("-1", "x", "1e9", str(10**12), str(10**40), "5, 6", "+5", "0x10", ""))
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {value}\r\n\r\n"
    return _plain("odd Content-Length", head.encode() + b"{}", ends=True, may_close=True)


def _chunks(draw: random.Random, _sheets: Sequence[bytes]) -> Bad:
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    tail = draw.choice((b"zz\r\n{}\r\n0\r\n\r\n", b"ffffffffffffffff\r\n{}", b"2\r\n{}", b"-2\r\n{}\r\n0\r\n\r\n",
                        b"2\r\n{}\r\n0\r\n\r\n"))  # fmt: skip
    return _plain("broken chunks", head + tail, ends=True, may_close=True)


def _method(draw: random.Random, _sheets: Sequence[bytes]) -> Bad:
    method = draw.choice(("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"))
    return _plain("wrong method", http_request(INFER, b"{}", method))


def _headers(draw: random.Random, _sheets: Sequence[bytes]) -> Bad:
    many = [f"X-{number}: {'a' * draw.choice((10, 200))}" for number in range(draw.choice((500, 2000)))]
    return _plain("flood of headers", http_request(INFER, b"{}", headers=many), may_close=True)


def _nested(draw: random.Random, _sheets: Sequence[bytes]) -> Bad:
    deep = draw.choice((200, 2000, 100_000))
    text = draw.choice(("[" * deep + "]" * deep, '{"a":' * deep + "1" + "}" * deep))
    whole = draw.choice((text, f'{{"inputs":{text}}}', f'{{"inputs":[{{"name":"image","datatype":"BYTES","shape":[1],'
                         f'"data":{text}}}]}}'))  # fmt: skip
    return _plain("deep nesting", http_request(INFER, whole.encode()))


def _encoding(draw: random.Random, _sheets: Sequence[bytes]) -> Bad:
    content = draw.choice((b'{"inputs": "\xff\xfe"}', '{"inputs": []}'.encode("utf-16"), b"\xc3\x28", b'{"\x80": 1}'))
    return _plain("not UTF-8", http_request(INFER, content))


_PATHS = (
    "/v2/models/other/infer", "/v2/models/digits%00/infer", "/v2/models//infer", "/v3", "/page/../../x",
    f"/v2/models/{MODEL}/generate", f"/v2/models/{MODEL}/generate_stream", "/page/%2e%2e/%2e%2e/etc/passwd",
    "/v2/repository/models/other/load", "/v2/models/x/ready", f"/v2/repository/models/{MODEL}/unload", "/" + "a" * 4000,
)  # fmt: skip


def _unknown(draw: random.Random, _sheets: Sequence[bytes]) -> Bad:
    return _plain("unknown path or model", http_request(draw.choice(_PATHS), b'{"inputs": []}'))


def _noise(draw: random.Random, _sheets: Sequence[bytes]) -> Bad:
    content = draw.choice((draw.randbytes(draw.randint(1, 3000)), b"\x16\x03\x01\x02\x00" + draw.randbytes(300),
                           b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET\r\n\r\n",
                           b"POST / HTTP/9.9\r\n\r\n"))  # fmt: skip
    return _plain("noise", content, ends=True, may_close=True)


def _two_inputs(draw: random.Random, sheets: Sequence[bytes]) -> Bad:
    one = tensor(draw, sheets)
    return _infer("another number of inputs", {"inputs": [one] * draw.choice((2, 3, 50))})


def _count(draw: random.Random, sheets: Sequence[bytes]) -> Bad:
    one = tensor(draw, sheets)
    shape, copies = draw.choice((([3], 1), ([1], 2), ([], 1), ([1, 2], 1), ([1, 1, 1], 1), ([0], 0), ([500], 500)))
    return _infer("elements and shape differ", {"inputs": [{**one, "shape": shape, "data": one["data"] * copies}]})


HTTP_KINDS: tuple[Make, ...] = (
    _cut_json, _flipped_json, _other_json, _wrong_name, _wrong_type, _wrong_shape, _huge_shape, _ragged, _not_numbers,
    _bad_base64, _bad_image, _bad_degree, _bad_query, _gzip, _long_promise, _short_promise, _odd_length, _chunks,
    _method, _headers, _nested, _encoding, _unknown, _noise, _two_inputs, _count,
)  # fmt: skip
