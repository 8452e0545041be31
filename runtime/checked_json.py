"""JSON files, and typed access to what they hold: a refusal names the file and the place of whatever is wrong."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from .errors import InputError, one_line

T = TypeVar("T")

LARGEST_FILE = 32 << 20  # bytes; what this project writes is a hundredth of that, and more would take minutes to check


class AbsentError(InputError):
    """There is no such file."""


def read(file: Path, interpret: Callable[[Any], T]) -> T:
    """Reads a JSON file.

    Args:
        file: Where it lies.
        interpret: Makes something of what was parsed, or raises InputError.

    Returns:
        What `interpret` made.

    Raises:
        AbsentError: There is no such file.
        InputError: It is no file that can be read, larger than any that this project writes, not JSON, nested too
            deeply, or refused by `interpret`; the message begins with its name.
    """
    content = _content(file)
    try:
        return interpret(parse(content.decode("utf-8-sig")))  # -sig: some editors put a byte order mark in front
    except UnicodeDecodeError as error:
        raise InputError(f"{one_line(file)} cannot be read: {one_line(error)}") from None
    except InputError as error:
        raise InputError(f"{one_line(file)}: {error}") from None
    except RecursionError:
        raise InputError(f"{one_line(file)}: it is nested too deeply") from None


def _content(file: Path) -> bytes:
    try:
        if file.exists() and not file.is_file():  # before it is opened: a pipe would block for ever
            raise InputError(f"{one_line(file)} cannot be read: it is not a file")
        with file.open("rb") as opened:
            content = opened.read(LARGEST_FILE + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise AbsentError(f"there is no {one_line(file)}") from None
    except OSError as error:
        raise InputError(f"{one_line(file)} cannot be read: {one_line(error.strerror or error)}") from error
    except InputError:
        raise
    except ValueError as error:  # a NUL in the path
        raise InputError(f"{one_line(file)} cannot be read: {one_line(error)}") from error
    if len(content) > LARGEST_FILE:
        raise InputError(f"{one_line(file)} must not be larger than {LARGEST_FILE >> 20} MiB")
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise InputError(f"{name} is not a JSON number")


def parse(text: str) -> Any:
    """Parses strict JSON: unlike `json.loads`, NaN and Infinity are refused.

    Raises:
        InputError: The text is not JSON, or is nested too deeply to be read.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except InputError:
        raise
    except RecursionError:
        raise InputError("it is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, and int()'s refusal of thousands of digits
        raise InputError(f"it is not JSON: {one_line(error)}") from None


@dataclass(frozen=True)
class Json:
    """A JSON value and the key path that leads to it.

    Every reader returns the value in its Python type, or raises InputError with the rule, the place and the value.

    Attributes:
        value: What `parse` returned for this place.
        where: For instance "engines[1].tokens".
    """

    value: Any
    where: str

    def refuse(self, rule: str) -> NoReturn:
        """Says that this value must be `rule`.

        Raises:
            InputError: Always.
        """
        raise InputError(f"{self.where} must be {rule}, got {one_line(reprlib.repr(self.value))}")

    def key(self, name: str) -> Json:
        """The value under a key of this object.

        Raises:
            InputError: This is not an object, or has no such key.
        """
        path = f"{self.where}.{name}" if self.where else name
        if not isinstance(self.value, dict):
            Json(self.value, self.where or "the file").refuse("an object")
        if name not in self.value:
            raise InputError(f"the key {path} is missing")
        return Json(self.value[name], path)

    def key_or(self, name: str, default: Any) -> Json:
        """The value under a key of this object, or a default where files written earlier do not have it."""
        path = f"{self.where}.{name}" if self.where else name
        return self.key(name) if not isinstance(self.value, dict) or name in self.value else Json(default, path)

    def items(self) -> list[Json]:
        """The values of this list."""
        if not isinstance(self.value, list):
            self.refuse("a list")
        return [Json(value, f"{self.where}[{index}]") for index, value in enumerate(self.value)]

    def mapping(self, read: Callable[[Json], T]) -> dict[str, T]:
        """This object's keys, each with what `read` makes of its value."""
        if not isinstance(self.value, dict):
            self.refuse("an object")
        return {
            Json(name, f"a key of {self.where}").text(): read(Json(value, f"{self.where}.{one_line(name)}"))
            for name, value in self.value.items()
        }

    def optional(self, read: Callable[[Json], T]) -> T | None:
        """None for null, else what `read` makes of this value."""
        return None if self.value is None else read(self)

    def boolean(self) -> bool:
        """This true or false."""
        if not isinstance(self.value, bool):
            self.refuse("true or false")
        return self.value

    def integer(self, minimum: int = 0) -> int:
        """This whole number, `minimum` or more."""
        if isinstance(self.value, bool) or not isinstance(self.value, int) or self.value < minimum:
            self.refuse(f"a whole number, {minimum} or more")
        return self.value

    def integers(self, minimum: int = 0) -> tuple[int, ...]:
        """This list of whole numbers, each `minimum` or more."""
        return tuple(item.integer(minimum) for item in self.items())

    def number(self) -> float:
        """This finite number; a whole one stays an int, so that what is read and written again keeps its bytes."""
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            self.refuse("a number")
        try:
            is_finite = math.isfinite(self.value)
        except OverflowError:  # a JSON integer has no upper limit
            is_finite = False
        if not is_finite:
            self.refuse("a finite number")
        return self.value

    def text(self) -> str:
        """This string."""
        if not isinstance(self.value, str):
            self.refuse("a string")
        try:
            self.value.encode("utf-8")
        except UnicodeEncodeError:  # "\ud800" is legal JSON, but neither printable nor a file name
            self.refuse("a string without lone surrogates")
        return self.value

    def plain(self) -> Any:
        """This value as it is, whatever its type, once every number in it is known to be finite."""
        if isinstance(self.value, dict):
            return self.mapping(Json.plain)
        if isinstance(self.value, list):
            return [item.plain() for item in self.items()]
        if isinstance(self.value, str):
            return self.text()
        if self.value is not None and not isinstance(self.value, bool):
            self.number()
        return self.value
