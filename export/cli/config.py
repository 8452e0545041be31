"""Options from a TOML file, where the command line names none: `--config FILE`, and a family's own compile.toml."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tocom.calib.quantize.method import FORMATS
from tocom.runtime.errors import InputError

if TYPE_CHECKING:
    from cyclopts import App, ArgumentCollection

    from tocom.export.source.record import CompileRecord

_COMMAND_LINE = "cli"  # where the parser says that a text comes from
_REPEATABLE = ("model-arg", "plan-option", "keep-float")  # others take their values in one text
_ORIGIN = ("model", "checkpoint", "compensator", "num-classes", "model-arg")
_OF_FAMILY = (*_ORIGIN, "source-degree", "schedule", "reduction", "degrees", "out")
# Command -> the options that it takes from a file; None takes all. The images of a compile are what is reported on, so
# that no scale is to be chosen on them.
_TAKES = {"compile": None, "quantize": None, "choose-scale": _OF_FAMILY, "validate": _ORIGIN}


def from_file(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fills in what a file says and the command line does not.

    Raises:
        InputError: If the file cannot be used, or what it names is not there or has changed.
    """
    command = commands[-1] if commands else None
    if command not in _TAKES:
        return
    named = {name.lstrip("-"): argument.tokens[-1].value for argument in arguments
             if argument.tokens and argument.tokens[-1].source == _COMMAND_LINE for name in argument.names}  # fmt: skip
    record = _record(command, named, arguments)
    if record is None:
        return
    for argument in arguments:  # a file that is named says more than the environment does
        if argument.tokens and argument.tokens[-1].source != _COMMAND_LINE and argument.name[2:] in record.options:
            argument.tokens.clear()
    options = {}
    for key in _TAKES[command] or record.options:
        if key not in record.options or key in named:
            continue
        if key == "precision" and command == "quantize" and record.options[key] not in FORMATS:
            continue  # of a family that is not quantized everything else is taken
        if command == "validate":
            record.require_unchanged(key)
        value = record.value(key)
        several = isinstance(value, list) and key not in _REPEATABLE
        options[key] = ",".join(map(str, value)) if several else value
    from cyclopts.config import Dict

    Dict(options, source=str(record.file), use_commands_as_keys=False)(app, commands, arguments)


def _record(command: str, named: dict[str, str], arguments: ArgumentCollection) -> CompileRecord | None:
    from tocom.export.source.record import CompileRecord
    from tocom.runtime.family_files import RECORD

    if command != "validate":
        return CompileRecord.read(Path(named["config"])) if "config" in named else None
    family = next((argument.tokens[0].value for argument in arguments if argument.tokens and not argument.keys
                   and argument.index is not None), None)  # fmt: skip
    if family is None or not Path(family).is_dir():
        return None  # said later
    file = Path(family) / RECORD
    if file.exists():
        return CompileRecord.read(file)
    if "model" not in named:
        raise InputError(f"{family} has no {RECORD} that says what it was made from: give --model, and --checkpoint "
                         "and --compensator where it was made with them")  # fmt: skip
    return None
