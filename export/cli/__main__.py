"""The `tocom` command: which commands there are, and how it ends.

Each command's module is imported when the command is used or its --help is asked for, and torch later still: after
everything has been checked that can be checked without.
"""

from __future__ import annotations

import sys

from cyclopts import App, CycloptsError, Group, MissingArgumentError, Parameter, UnusedCliTokensError

import tocom.runtime.errors
from tocom.export.cli.config import from_file
from tocom.export.cli.console import complain
from tocom.export.cli.exits import Exit
from tocom.export.cli.old_names import in_todays_words
from tocom.export.cli.versions import versions
from tocom.runtime.errors import GateError

_INTERRUPTED = 130
_ABOUT = """\
Compile a fine-tuned Vision Transformer into a family of token-compressed engines, one per degree r (tokens merged per
block), each validated against PyTorch.
"""
_MORE = "`tocom COMMAND --help` explains a command, with examples. All options on one page: docs/cli.md."

# Group -> command -> module below this folder, function, and what `tocom --help` says of it.
COMMANDS: dict[str, dict[str, tuple[str, str]]] = {
    "Compile": {
        "compile": ("compile:compile_command", "Compile a family of engines."),
        "quantize": ("compile:quantize_command", "Compile a family whose products are quantized."),
        "validate": ("validate:validate_command", "Check a family's engines again, and find where one goes wrong."),
        "refit": ("refit:refit_command", "Put weights into TensorRT plans that were built without them."),
    },
    "Run": {
        "infer": ("infer:infer_command", "Classify images with an engine of a family."),
        "frontier": ("frontier:frontier_command", "Show accuracy and latency of every degree on this machine."),
        "cascade": ("cascade:cascade_command", "Find a cheap first degree that sends on what it is unsure of."),
    },
    "Serve": {
        "serve": ("serve:serve_command", "Serve a family over HTTP and gRPC, with a page and metrics."),
        "serve-ray": ("serve_ray:serve_ray_command", "Serve a family by Ray Serve, on one machine or many."),
        "export-triton": ("export_triton:export_triton_command", "Write a model repository for Triton."),
    },
    "Train": {
        "distill": ("distill:distill_command", "Train a compensator for a backbone."),
        "choose-scale": ("choose_scale:choose_scale_command", "Choose the compensator's scale for every degree."),
    },
    "Inspect": {
        "inspect": ("inspect:inspect_command", "Show what a family, a compensator or a graph holds."),
        "doctor": ("doctor:doctor_command", "Say which engines can run on this machine, and why others cannot."),
    },
}
InputErrors = tocom.runtime.errors.InputError


def make_app(*explained: str) -> App:
    """The command line.

    Args:
        *explained: Commands whose --help may be asked for: they get their docstrings, for which they are imported.
    """
    tocom_app = App(
        name="tocom",
        help=_ABOUT,
        help_epilogue=_MORE,
        help_flags=("--help", "-h"),
        version_flags=("--version",),
        version=versions,
        help_format="markdown",
        config=(from_file,),
        default_parameter=Parameter(negative="", allow_repeating=True),
        group_commands=Group("This command", sort_key=9),
        suppress_keyboard_interrupt=False,
    )
    for place, (title, commands) in enumerate(COMMANDS.items()):
        group = Group(title, sort_key=place)
        for sort_key, (name, (where, text)) in enumerate(commands.items()):
            # infer has a --help of its own: the one of a copied runtime folder
            more = {"help_flags": (), "version_flags": ()} if name == "infer" else {"help_epilogue": ""}
            if name not in explained:
                more["help"] = text
            tocom_app.command(f"{__package__}.{where}", name=name, group=group, sort_key=sort_key, **more)
    tocom_app.command(
        f"{__package__}.completion:install_completion", name="--install-completion",
        help="Install completion for your shell, or for the one you name.",
    )  # fmt: skip
    tocom_app.command(
        f"{__package__}.completion:show_completion", name="--show-completion",
        help="Print the completion script instead.",
    )  # fmt: skip
    return tocom_app


def main() -> None:
    """Runs the command and leaves with its status: bad input is one line on stderr and status 2."""
    try:
        words = in_todays_words(sys.argv[1:])
        status = make_app(*words[:1])(words, exit_on_error=False, print_error=False, result_action="return_value")
        raise SystemExit(status if isinstance(status, int) else 0)
    except Exit as leave:
        raise SystemExit(leave.status) from None
    except CycloptsError as error:
        complain(_said(error))
    except InputErrors as error:
        complain(error)
    except GateError as error:
        complain(error)
        raise SystemExit(1) from None
    except OSError as error:
        complain(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
    except KeyboardInterrupt:
        complain("interrupted; run the same command again to go on")
        raise SystemExit(_INTERRUPTED) from None
    raise SystemExit(2)


def _said(error: CycloptsError) -> object:
    """The parser's message, but what is missing is called missing, unless an option was misspelt."""
    command = " ".join(("tocom", *(error.command_chain or ())))
    unused = error.unused_tokens or []
    if isinstance(error, UnusedCliTokensError) and unused:
        return f"{command} has no place for {unused[0]}: {command} --help explains it"
    if not isinstance(error, MissingArgumentError) or error.argument is None or error.argument.tokens or error.keyword:
        return error
    if unknown := next((token for token in unused if token.startswith("-")), None):
        return f"{command} knows no option {unknown}: {command} --help lists them"
    return f"{command} needs {error.argument.name}: {command} --help explains it"


if __name__ == "__main__":
    main()
