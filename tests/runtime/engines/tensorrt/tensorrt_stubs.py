"""Writes a type stub of TensorRT's Python bindings, read from the signatures in their docstrings.

    python tests/runtime/tensorrt_stubs.py PACKAGE

prints the stub of an importable package. The wheels have none, and pybind11 tells a signature only in words.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from types import ModuleType

HEADER = """\
import builtins
import collections.abc
import typing
import typing_extensions
import numpy

__version__: str
def nptype(trt_type: DataType) -> type: ...
def volume(iterable: collections.abc.Iterable[int]) -> int: ...
"""
# What signatures do not tell: classes that pybind11 gives the buffer or sequence protocol.
PROTOCOLS = {
    "IHostMemory": "def __buffer__(self, flags: int, /) -> memoryview: ...",
    "Dims": "def __iter__(self) -> collections.abc.Iterator[int]: ...",
}
SPECIAL = {f"__{name}__" for name in ("init", "len", "getitem", "setitem", "int", "lt", "le", "gt", "ge", "and", "or")}


def stub_of(module: ModuleType, members: bool = True) -> str:
    """The stub of an extension module.

    Args:
        module: Made with pybind11.
        members: Whether classes have what they have in the module. Without, they are there, but empty.
    """
    names = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    lines = [HEADER]
    for name, value in names.items():
        if isinstance(value, type):
            lines += _class(value, set(names), members)
        elif callable(value):
            lines += _signatures(name, value.__doc__, set(names))
        else:
            lines.append(f"{name}: {type(value).__name__}")
    return "\n".join(lines) + "\n"


def _class(cls: type, known: set[str], members: bool) -> Iterator[str]:
    base = cls.__bases__[0].__name__
    yield f"class {cls.__name__}{f'({base})' if base in known else ''}:"
    own: list[str] = ["..."]
    if cls.__name__ in PROTOCOLS:
        own.append(PROTOCOLS[cls.__name__])
    if hasattr(cls, "__members__"):  # of an enumeration
        own.append(f"__members__: typing.ClassVar[dict[str, {cls.__qualname__}]]")
    for name, value in vars(cls).items():
        if isinstance(value, type):
            own += _class(value, known, members)
        elif name not in SPECIAL and (name.startswith("_") or not members):
            continue
        elif isinstance(value, property):
            own += _property(name, value, known)
        elif isinstance(value, staticmethod) or type(value).__name__ in ("instancemethod", "wrapper_descriptor"):
            own += _signatures(name, getattr(value, "__func__", value).__doc__, known, isinstance(value, staticmethod))
        else:
            own.append(f"{name}: typing.ClassVar[{type(value).__qualname__}]")
    yield from ("    " + line for line in own)


def _property(name: str, value: property, known: set[str]) -> Iterator[str]:
    got = re.search(r"-> (.*)", (value.fget.__doc__ if value.fget else None) or "")
    taken = re.search(r", \w+: ([^()]*)\) ->", (value.fset.__doc__ if value.fset else None) or "")
    yield "@property"
    yield f"def {name}(self) -> {_type(got[1], known) if got else 'typing.Any'}: ..."
    if value.fset:
        yield f"@{name}.setter"
        yield f"def {name}(self, value: {_taken(taken[1], known) if taken else 'typing.Any'}) -> None: ..."


def _signatures(name: str, doc: str | None, known: set[str], static: bool = False) -> Iterator[str]:
    """One definition, or several overloads, as a docstring lists them."""
    found = re.findall(rf"^(?:\d+\. )?{re.escape(name)}\((.*)\) -> (.*)$", doc or "", re.MULTILINE)
    found = [each for each in found if each[0] != "*args, **kwargs"]
    definitions = [f"def {name}({_parameters(given, known)}) -> {_type(result, known)}: ..." for given, result in found]
    for definition in definitions or [f"def {name}(self, *args: typing.Any, **kwargs: typing.Any) -> typing.Any: ..."]:
        try:
            ast.parse(definition)
        except SyntaxError as error:
            raise ValueError(f"not understood: {definition}") from error
        yield from ["@typing.overload"] * (len(found) > 1)
        yield from ["@staticmethod"] * static
        yield definition


def _parameters(text: str, known: set[str]) -> str:
    """Parameters as Python takes them: in C++, one without a default may follow one with."""
    written, has_default = [], False
    for parameter in re.split(r", (?=\w+: |\*|/)", text):
        name, _, kind = parameter.partition(": ")
        kind, equals, _ = kind.partition(" = ")
        has_default = has_default or bool(equals)
        name = f"{name}_" if name == "in" else name
        if kind and name != "self":
            name += f": {_taken(kind, known)}{' | None' * parameter.endswith(' = None')}"
        written.append(name + " = ..." * has_default)
    return ", ".join(written)


def _taken(text: str, known: set[str]) -> str:
    """What a parameter of a type takes: pybind11 makes dimensions of any sequence of numbers."""
    kind = _type(text, known)
    return "Dims | collections.abc.Sequence[int]" if kind == "Dims" else kind


def _type(text: str, known: set[str]) -> str:
    """A type as this stub knows it; Any for what Python code cannot name."""
    text = re.sub(r"\b(?:\w+_bindings\.\w+\.|nvinfer1::(?:v_\d_\d::)?|nvonnxparser::I?)(?=\w)", "", text.strip())
    text = re.sub(r"\bbool\b", "builtins.bool", text)
    unknown = set(re.findall(r"(?<![\w.])[A-Z]\w+", text)) - known - {"None"}
    return "typing.Any" if unknown or "::" in text or "CapsuleType" in text else text


if __name__ == "__main__":
    package = importlib.import_module(sys.argv[1])
    extension = next(value for name, value in vars(package).items() if isinstance(value, ModuleType)
                     and getattr(value, "__file__", "").endswith(".so"))  # fmt: skip
    sys.stdout.write(stub_of(extension, members="--no-members" not in sys.argv))
