"""All help texts as one page: `python -m tocom.export.cli.reference > docs/cli.md`."""

from __future__ import annotations

import contextlib
import io
import os
import re

from tocom.export.cli.__main__ import COMMANDS, make_app
from tocom.runtime.infer import main as infer

_HEAD = "<!-- Written by `python -m tocom.export.cli.reference > docs/cli.md`: change the texts in export/cli. -->\n\n"
_WIDTH = "100"  # of the help that comes as text


def reference() -> str:
    """The page, in Markdown."""
    page = make_app(*(name for commands in COMMANDS.values() for name in commands)).generate_docs()
    # the one command whose options are not this parser's
    text = f"## tocom infer\n\n```console\n{_help_of_infer()}```\n"
    page = re.sub(r"## tocom infer\n.*?(?=\n## )", lambda _match: text, page, flags=re.DOTALL)
    page = page.replace("(#tocom-install-completion)", "(#tocom---install-completion)")  # as GitHub names headings
    page = page.replace("(#tocom-show-completion)", "(#tocom---show-completion)")
    return _HEAD + re.sub(r"\n{3,}", "\n\n", page).strip() + "\n"


def _help_of_infer() -> str:
    before, printed = os.environ.get("COLUMNS"), io.StringIO()
    os.environ["COLUMNS"] = _WIDTH
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            infer(["--help"], prog="tocom infer")
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before
    return printed.getvalue()


if __name__ == "__main__":
    print(reference(), end="")
