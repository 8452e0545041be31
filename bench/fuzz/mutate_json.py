"""Damage to JSON that knows its structure: the text still parses, mostly."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from bench.fuzz.case import Mutate

_RAW = "@raw@"  # stands in a document for text that no Python value is written as
_TYPES: tuple[Any, ...] = (None, True, False, 0, 1, -1, 1.5, "", "text", [], {}, [1], {"a": 1}, [[]], [None])
_NUMBERS = ("1e400", "-1e400", "NaN", "Infinity", "-Infinity", "1" + "0" * 30, "1" + "0" * 5000,
            "-1", "-0.0", "1e-320", "9223372036854775808", "4294967296", "2147483648", "1.0", "0.5", "1e2", "65536",
            "100000000", "0")  # fmt: skip
_TEXTS = ('"\\ud800"', '"a\\udc00b"', '"\\u0000"', '"line\\nbreak"', '"\\u001b[2Jcleared"', '"\\u202egnp.exe"', '""',
          '"' + "x" * 200_000 + '"', '"\\u2028"', '"' + "é" * 300 + '"', '"%s%n{0}"', '"[bold]x[/bold"',
          '"[/]"')  # fmt: skip
_PATHS = ("../outside.bin", "/etc/passwd", "..", ".", "a/../../b", "C:\\windows", "..\\outside", "//server/share",
          "family.json", "nul\u0000byte", "~/x", "a//b", "./r04.onnx", "/dev/zero", "/proc/self/mem",
          "x" * 5000)  # fmt: skip


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a document."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield node, key
        yield from _places(value)


def _written(document: Any, raw: str = "null") -> bytes:
    return json.dumps(document).replace(f'"{_RAW}"', raw).encode()


def _replacing(choose: Callable[[random.Random, Any], str]) -> Mutate:
    """Damage that replaces one value by a piece of JSON text."""

    def mutate(draw: random.Random, whole: bytes) -> bytes:
        document = json.loads(whole)
        container, key = draw.choice(list(_places(document)))
        raw = choose(draw, container[key])
        container[key] = _RAW
        return _written(document, raw)

    return mutate


def _any_key(draw: random.Random, document: Any) -> tuple[Any, str]:
    return draw.choice([(container, key) for container, key in _places(document) if isinstance(key, str)])


def _drop(draw: random.Random, whole: bytes) -> bytes:
    document = json.loads(whole)
    container, key = draw.choice(list(_places(document)))
    del container[key]
    return _written(document)


def _rename(draw: random.Random, whole: bytes) -> bytes:
    """A key is called something else, something long, or something that no terminal should print."""
    document = json.loads(whole)
    container, key = _any_key(draw, document)
    name = draw.choice((key + "x", key.upper(), "", "\x1b[31m", "a\nb", "x" * 10_000, "\ud800", *_PATHS))
    container[name] = container.pop(key)
    return _written(document)


def _key_twice(draw: random.Random, whole: bytes) -> bytes:
    document = json.loads(whole)
    container, key = _any_key(draw, document)
    container[_RAW] = draw.choice(_TYPES)
    return _written(document, json.dumps(key))


def duplicate_item(draw: random.Random, whole: bytes) -> bytes:
    """An item of a list stands there again, up to a hundred thousand times."""
    document = json.loads(whole)
    lists = [c for c, _ in _places(document) if isinstance(c, list)] or [[0]]
    items = draw.choice(lists)
    item = draw.choice(items)
    times = draw.choice((1, 1, 3, 1000, 100_000))
    items.extend([item] * min(times, 1 + 40_000_000 // len(json.dumps(item))))  # the text stays below 40 MB or so
    return _written(document)


def exchange(draw: random.Random, whole: bytes) -> bytes:
    """Two values stand in each other's place."""
    document = json.loads(whole)
    places = list(_places(document))
    (one, key), (other, key2) = draw.choice(places), draw.choice(places)
    a, b = copy.deepcopy(one[key]), copy.deepcopy(other[key2])
    one[key] = b
    if key2 in other if isinstance(other, dict) else key2 < len(other):
        other[key2] = a
    return _written(document)


def other_root(draw: random.Random, whole: bytes) -> bytes:
    """The document as a whole is something else, or has something behind it."""
    return draw.choice((b"null", b"[]", b"{}", b"3", b'"text"', b"", b"{", whole + b"{}", b"[" + whole + b"]",
                        b"\xef\xbb\xbf" + whole, whole.decode().encode("utf-16"), b"[" * 100_000,
                        b'{"a":' * 100_000, whole.replace(b":", b"=", 1), whole.replace(b",", b",,", 1)))  # fmt: skip


def _nested(draw: random.Random, _: Any) -> str:
    depth = draw.choice((10, 200, 900, 5000, 100_000))
    return "[" * depth + "]" * depth if draw.random() < 0.5 else '{"a":' * depth + "1" + "}" * depth


STRUCTURE: dict[str, Mutate] = {
    "key missing": _drop,
    "key renamed": _rename,
    "key twice": _key_twice,
    "item repeated": duplicate_item,
    "values exchanged": exchange,
    "another document": other_root,
    "another type": _replacing(lambda draw, _: json.dumps(draw.choice(_TYPES))),
    "another number": _replacing(lambda draw, _: draw.choice(_NUMBERS)),
    "odd text": _replacing(lambda draw, _: draw.choice(_TEXTS)),
    "path out": _replacing(lambda draw, _: json.dumps(draw.choice(_PATHS))),
    "nested deeply": _replacing(_nested),
}
