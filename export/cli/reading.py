"""How the texts of options are read; every complaint is one line, said before anything heavy is imported."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from pathlib import Path

from tocom.runtime.errors import InputError, one_line
from tocom.runtime.family_files import MANIFEST

PLAN_OPTIONS = ("hardware-compatible", "version-compatible", "stripped", "plugin")


def read_degrees(text: str) -> tuple[int, ...]:
    """Reads degrees separated by commas.

    Raises:
        InputError: If one is not a whole number of 0 or more.

    >>> read_degrees("8,16")
    (8, 16)
    """
    degrees = []
    for part in text.split(","):
        try:
            degrees.append(int(part))
        except ValueError:
            raise InputError(
                f"degrees must be whole numbers separated by commas, like 8,16, got {part.strip()!r} in {text!r}."
            ) from None
        if degrees[-1] < 0:
            raise InputError(f"degree r must be 0 or more tokens per block, got {degrees[-1]}. "
                             "Use 0 to export without merging.")  # fmt: skip
    return tuple(degrees)


def read_blocks(text: str) -> tuple[int, ...]:
    """Reads numbers of blocks separated by commas.

    Raises:
        InputError: If one is not a whole number of 0 or more.

    >>> read_blocks("3,11")
    (3, 11)
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 5 for part in parts):
        raise InputError(f"blocks must be whole numbers separated by commas, like 3,11, got {text!r}.")
    return tuple(dict.fromkeys(map(int, parts)))


def read_batches(text: str) -> tuple[int, ...]:
    """Reads batch sizes separated by commas.

    Raises:
        InputError: If one is not a whole number of 1 or more.

    >>> read_batches("1,8")
    (1, 8)
    """
    try:
        batches = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        batches = (0,)
    if min(batches) < 1:
        raise InputError("batches must be whole numbers of 1 or more separated by commas, like 1,8, got "
                         f"{one_line(text)}")  # fmt: skip
    return batches


def read_scales(text: str) -> tuple[float, ...]:
    """Reads scales separated by commas.

    Raises:
        InputError: If one is no number.

    >>> read_scales("0.03,0.2")
    (0.03, 0.2)
    """
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise InputError(f"scales must be numbers separated by commas, like 0.03,0.2, got {text!r}.") from None


def read_plan_batch(text: str) -> tuple[int, int, int]:
    """Reads the batch sizes of a plan.

    Raises:
        InputError: If it is not three whole numbers.

    >>> read_plan_batch("1:4:8")
    (1, 4, 8)
    """
    parts = text.split(":")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() for part in parts):
        raise InputError(f"the batch of a plan must be MIN:OPT:MAX, like 1:8:32, got {text!r}.")
    smallest, best, largest = map(int, parts)
    return smallest, best, largest


def read_targets(text: str) -> tuple[str, ...]:
    """Reads GPU architectures separated by commas.

    >>> read_targets("sm80,SM89")
    ('sm80', 'sm89')
    """
    return tuple(part.strip().lower() for part in text.split(",")) if text else ()


def read_schedule(text: str) -> str:
    """Checks the name of a schedule and writes it in its usual form.

    Raises:
        InputError: If there is no such schedule.

    >>> read_schedule("strided:03")
    'strided:3'
    """
    from tocom.schedule import ScheduleFamily

    return ScheduleFamily(text).name


def read_model(text: str) -> str:
    """Checks that a model that is named by a path is there.

    Raises:
        InputError: If not.
    """
    if "/" in text and not (Path(text) / "config.json").is_file():
        raise InputError(f"a model must be a timm model name or a folder with a config.json, got {text!r}.")
    return text


def read_model_args(pairs: Sequence[str]) -> dict[str, object]:
    """Reads NAME=VALUE pairs; a value that is no Python literal is taken as text.

    Raises:
        InputError: If one is not a pair.

    >>> read_model_args(["img_size=384", "global_pool=avg"])
    {'img_size': 384, 'global_pool': 'avg'}
    """
    arguments: dict[str, object] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"a model argument must be NAME=VALUE, like img_size=384, got {pair!r}.")
        try:
            arguments[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[name] = value
    return arguments


def read_existing(text: str) -> Path:
    """Checks that a file or folder is there.

    Raises:
        InputError: If not.
    """
    path = Path(text)
    if not path.exists():
        raise InputError(f"there is no {one_line(path)}")
    return path


def read_family(text: str) -> Path:
    """Checks that a folder holds a family.

    Raises:
        InputError: If not.
    """
    folder = Path(text)
    if not (folder / MANIFEST).is_file():
        raise InputError(f"there is no {MANIFEST} in {one_line(folder)}: give a folder that `tocom compile` wrote")
    return folder


def read_number(text: str, kind: type = int, least: float | None = None, most: float | None = None) -> float:
    """Reads a number of a range; a whole one is never rounded to.

    Raises:
        InputError: If it is none.

    >>> read_number("3", least=1)
    3
    """
    try:
        number = kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise InputError(f"it must be {what}, got {one_line(repr(text))}") from None
    if (least is not None and not number >= least) or (most is not None and not number <= most):
        span = f"{least} or more" if most is None else f"{most} or less" if least is None else f"{least} to {most}"
        raise InputError(f"it must be {span}, got {number:g}")
    return number


def one_token(read: Callable[[str], object]) -> Callable[[type, Sequence], object]:
    """A reader of texts as the parser wants it; of an option that is repeated the last counts."""
    return lambda _type, tokens: read(tokens[-1].value)
