"""Requests of HTTP that no server must answer as if they were fine."""

from __future__ import annotations

import base64
import gzip
import json
import random
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

from bench.serving.subject import MODEL, http_request

INFER = f"/v2/models/{MODEL}/infer"
_SIZE = (3, 32, 32)  # of the digits' network
_ZEROS = [0.0] * 3072
Make = Callable[[random.Random, bytes], bytes]
"""(draw, a valid image) -> all that is sent on a connection."""


def tensor(sheet: bytes) -> dict[str, Any]:
    """A valid input, to be broken."""
    return {"name": "image", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(sheet).decode()],
            "parameters": {"content_type": "base64"}}  # fmt: skip


def _body(sheet: bytes, **changes: Any) -> bytes:
    return json.dumps({"inputs": [tensor(sheet) | changes]}).encode()


def _pixels(shape: Any, data: object) -> dict[str, Any]:
    return {"inputs": [{"name": "pixel_values", "datatype": "FP32", "shape": shape, "data": data}]}


def _infer(payload: Callable[[random.Random, dict[str, Any]], object]) -> Make:
    """A request for inference whose JSON is made of a valid input."""
    return lambda draw, sheet: http_request(INFER, json.dumps(payload(draw, tensor(sheet))).encode())


def _changed(name: str, values: tuple[Any, ...]) -> Make:
    return _infer(lambda draw, one: {"inputs": [one | {name: draw.choice(values)}]})


def _counts(draw: random.Random, one: dict[str, Any]) -> object:
    shape, copies = draw.choice((([3], 1), ([1], 2), ([], 1), ([1, 2], 1), ([1, 1, 1], 1), ([0], 0), ([500], 500)))
    return {"inputs": [one | {"shape": shape, "data": one["data"] * copies}]}


def _degree(draw: random.Random, one: dict[str, Any]) -> object:
    name = draw.choice(("degree", "min_degree", "max_degree"))
    value = draw.choice((-1, 99 if name != "max_degree" else -3, 1.5, True, "eight", [8], {}, 10**30, "-1", "8.0"))
    return {"inputs": [one], "parameters": {name: value}}


def _ragged(draw: random.Random, _one: dict[str, Any]) -> object:
    rows: list[Any] = [[0.0] * 32 for _ in range(96)]
    rows[draw.randrange(96)] = draw.choice(([0.0] * 31, [], [[0.0]], 0.0, None, "x", {}))
    return _pixels([1, *_SIZE], rows)


def _numbers(*values: str) -> Make:
    def make(draw: random.Random, _sheet: bytes) -> bytes:
        numbers = ["0"] * 3072
        numbers[draw.randrange(3072)] = draw.choice(values)
        return http_request(
            INFER, json.dumps(_pixels([1, *_SIZE], "@")).replace('"@"', f"[{','.join(numbers)}]").encode()
        )

    return make


def _flipped(draw: random.Random, sheet: bytes) -> bytes:
    text = bytearray(_body(sheet, datatype="INT8"))
    for _ in range(draw.randint(1, 8)):
        text[draw.randrange(len(text))] = draw.randrange(256)
    return http_request(INFER, bytes(text))


def _nested(draw: random.Random, _sheet: bytes) -> bytes:
    deep = draw.choice((200, 2000, 100_000))
    text = draw.choice(("[" * deep + "]" * deep, '{"a":' * deep + "1" + "}" * deep))
    inside = f'{{"inputs":[{{"name":"image","datatype":"BYTES","shape":[1],"data":{text}}}]}}'
    return http_request(INFER, draw.choice((text, f'{{"inputs":{text}}}', inside)).encode())


def bad_image(draw: random.Random, sheet: bytes) -> bytes:
    """Bytes that are no usable image: cut off, flipped, of another kind, or with too many pixels."""
    return draw.choice((
        sheet[: draw.randrange(60)],
        sheet[:16] + draw.randbytes(8) + sheet[24:],  # sizes that its checksum does not cover
        draw.randbytes(draw.randrange(1, 400)), b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>", bomb(), b"GIF89a" + draw.randbytes(7), b"BM" + draw.randbytes(40),
        b"II*\x00" + draw.randbytes(60), b"\xff\xd8\xff\xe0" + draw.randbytes(60),
        b"RIFF\xff\xff\xff\xffWEBPVP8 " + draw.randbytes(30),
    ))  # fmt: skip


@cache
def bomb(side: int = 30_000) -> bytes:
    """A small PNG that would be gigabytes when decoded."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        whole = kind + content
        return len(content).to_bytes(4, "big") + whole + zlib.crc32(whole).to_bytes(4, "big")

    head = side.to_bytes(4, "big") * 2 + bytes((8, 2, 0, 0, 0))
    data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1 << 22))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def _image(draw: random.Random, sheet: bytes) -> bytes:
    content = bad_image(draw, sheet)
    if draw.random() < 0.5:
        return http_request("/api/predict", content)
    return http_request(INFER, _body(sheet, data=[base64.b64encode(content).decode()]))


@cache
def _gzip_bomb() -> bytes:
    return gzip.compress(bytes(64 << 20))


def _head(header: str) -> bytes:
    return f"POST {INFER} HTTP/1.1\r\nHost: x\r\n{header}\r\n\r\n".encode()


_QUERIES = ("degree=99", "degree=x", "degree=-1", "degree=8&max_degree=4", "top_k=0", "top_k=x", "degree=",
            "min_degree=17", "degree=%00", "degree=" + "9" * 400)  # fmt: skip
_PATHS = (
    "/v2/models/other/infer", "/v2/models/digits%00/infer", "/v2/models//infer", "/v3", "/page/../../x",
    f"/v2/models/{MODEL}/generate", f"/v2/models/{MODEL}/generate_stream", "/page/%2e%2e/%2e%2e/etc/passwd",
    "/v2/repository/models/other/load", "/v2/models/x/ready", f"/v2/repository/models/{MODEL}/unload", "/" + "a" * 4000,
)  # fmt: skip
_OTHERS = (None, 1, "x", [], {}, {"inputs": None}, {"inputs": {}}, {"inputs": []}, {"inputs": [None]},
           {"inputs": [[]]}, {"inputs": "pixel_values"}, {"outputs": []}, {"inputs": [{}]}, True)  # fmt: skip
_SHAPES = ([], [0], [2], [-1], [1, 3, 31, 32], [1, 3072], [3, 32, 32], [0, *_SIZE], [2, *_SIZE], "1", None,
           [1.5, *_SIZE], [1] * 40, [1, "x", 32, 32], [1, 1, 3, 32, 32])  # fmt: skip
_CHUNKS = (b"zz\r\n{}\r\n0\r\n\r\n", b"ffffffffffffffff\r\n{}", b"2\r\n{}", b"-2\r\n{}\r\n0\r\n\r\n",
           b"2\r\n{}\r\n0\r\n\r\n")  # fmt: skip
_LENGTHS = ("-1", "x", "1e9", str(10**12), str(10**40), "5, 6", "+5", "0x10", "")

HTTP_KINDS: dict[str, Make] = {
    "JSON cut off": lambda draw, sheet: http_request(INFER, (text := _body(sheet))[: draw.randrange(len(text) - 1)]),
    "JSON with flipped bytes": _flipped,
    "JSON of another shape": _infer(lambda draw, _: draw.choice(_OTHERS)),
    "wrong name": _changed("name", ("", "images", "pixel_value", "../image", "\0", "x" * 5000, "Ünïcode", "{}",
                                    "%s%n")),
    "wrong datatype": _changed("datatype", ("FP64", "INT8", "UINT8", "BOOL", "FP16", "fp32", "", "STRING", "x" * 3000,
                                            None, 7)),
    "wrong shape": _infer(lambda draw, _: _pixels(draw.choice(_SHAPES), _ZEROS)),
    "huge shape": _infer(lambda draw, _: _pixels([draw.choice((10**6, 2**31, 2**63, 10**30, 2**31 * 3)), *_SIZE],
                                                 _ZEROS[: draw.choice((0, 1, 3072))])),
    "ragged lists": _infer(_ragged),
    "not finite numbers": _numbers("NaN", "Infinity", "-Infinity", "1e999", "{}", "1e39"),
    # text and truth values of a number are what numpy, and MLServer, read as that number
    "numbers as text": _numbers('"1"', "true", "null"),
    "no base64": _changed("data", tuple([text] for text in ("!!!", "AAA", "=", "ÿÿ", "A" * 5001, " ", "\n\n",
                                                            "data:image/png;base64,AAAA"))),
    "no image": _image,
    "degree out of range": _infer(_degree),
    "bad query": lambda draw, sheet: http_request(
        f"/api/{draw.choice(('predict', 'merges'))}?{draw.choice(_QUERIES)}", sheet),
    "compressed body": lambda draw, _: http_request(
        INFER, _gzip_bomb(), headers=[f"Content-Encoding: {draw.choice(('gzip', 'deflate', 'br', 'gzip, gzip'))}"]),
    "Content-Length too long": lambda draw, sheet:
        _head(f"Content-Length: {len(text := _body(sheet)) + draw.randint(1, 10**6)}") + text,
    "Content-Length too short": lambda draw, sheet:
        _head(f"Content-Length: {draw.randrange(len(text := _body(sheet)) - 1)}") + text,
    "odd Content-Length": lambda draw, _: _head(f"Content-Length: {draw.choice(_LENGTHS)}") + b"{}",
    "broken chunks": lambda draw, _: _head("Transfer-Encoding: chunked") + draw.choice(_CHUNKS),
    "wrong method": lambda draw, _: http_request(
        INFER, b"{}", draw.choice(("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"))),
    "flood of headers": lambda draw, _: http_request(
        INFER, b"{}", headers=[f"X-{number}: {'a' * draw.choice((10, 200))}"
                               for number in range(draw.choice((500, 2000)))]),
    "deep nesting": _nested,
    "not UTF-8": lambda draw, _: http_request(INFER, draw.choice(
        (b'{"inputs": "\xff\xfe"}', '{"inputs": []}'.encode("utf-16"), b"\xc3\x28", b'{"\x80": 1}'))),
    "unknown path or model": lambda draw, _: http_request(draw.choice(_PATHS), b'{"inputs": []}'),
    "noise": lambda draw, _: draw.choice((
        draw.randbytes(draw.randint(1, 3000)), b"\x16\x03\x01\x02\x00" + draw.randbytes(300),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET\r\n\r\n", b"POST / HTTP/9.9\r\n\r\n")),
    "another number of inputs": _infer(lambda draw, one: {"inputs": [one] * draw.choice((2, 3, 50))}),
    "elements and shape differ": _infer(_counts),
}  # fmt: skip
CUT_OFF = ("Content-Length too long", "odd Content-Length", "broken chunks", "noise")
MAY_CLOSE = (*CUT_OFF, "flood of headers")
HARMLESS = ("bad query", "numbers as text")  # what a route does not read it does not refuse
