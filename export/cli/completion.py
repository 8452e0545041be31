"""Completion of commands, options and their values in the shell."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from tocom.export.cli.console import open_console
from tocom.runtime.errors import InputError

Shell = Annotated[
    Literal["zsh", "bash", "fish", "powershell"] | None, Parameter(help="Which shell. Default: the one in use.")
]


def install_completion(shell: Shell = None, /) -> None:
    """Install completion for a shell: commands, options, and the values of options that have few."""
    open_console().print(f"[green]installed[/] {_install(shell)}   open a new shell to use it")


def show_completion(shell: Shell = None, /) -> None:
    """Print the script that completes this command in a shell."""
    from cyclopts.completion.detect import ShellDetectionError

    from tocom.export.cli.__main__ import make_app

    try:
        print(make_app().generate_completion(shell=shell))
    except ShellDetectionError as error:
        raise _unknown() from error


def _install(shell: str | None) -> Path:
    from cyclopts.completion.detect import ShellDetectionError

    from tocom.export.cli.__main__ import make_app

    try:
        return make_app().install_completion(shell=shell)
    except ShellDetectionError as error:
        raise _unknown() from error


def _unknown() -> InputError:
    return InputError("the shell must be named, for it is none that is known here: bash, zsh, fish or powershell")
