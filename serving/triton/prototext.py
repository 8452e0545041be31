"""Protocol buffers in text form, as far as Triton's config.pbtxt needs them.

There is no protobuf schema of Triton on the box that exports, and a few lines write what it would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class Word(str):
    """A value that stands without quotes: a member of an enumeration."""

    __slots__ = ()


def prototext(message: Mapping[str, Any], indent: str = "") -> str:
    r"""A message in text form, one field a line.

    >>> print(prototext({"name": "a\"b", "kind": Word("KIND_CPU"), "dims": [3, 8], "queue": {"size": 4}}), end="")
    name: "a\"b"
    kind: KIND_CPU
    dims: 3
    dims: 8
    queue {
      size: 4
    }

    Args:
        message: Field -> value: a truth value, number, text, `Word`, message, or a sequence of these for a repeated
            field. A field without a value, None, is left out.
        indent: Before every line.
    """
    lines = []
    for field, value in message.items():
        for item in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
            if isinstance(item, Mapping):
                lines.append(f"{indent}{field} {{\n{prototext(item, indent + '  ')}{indent}}}\n")
            elif item is not None:
                lines.append(f"{indent}{field}: {_scalar(item)}\n")
    return "".join(lines)


def entries(mapping: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A map field, which text form writes as messages of a key and a value."""
    return [{"key": key, "value": value} for key, value in mapping.items()]


def _scalar(value: bool | int | str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Word | int):
        return str(value)
    return '"' + "".join(_escaped(byte) for byte in value.encode()) + '"'


def _escaped(byte: int) -> str:
    if byte in b'"\\':
        return "\\" + chr(byte)
    return chr(byte) if 32 <= byte < 127 else f"\\{byte:03o}"
