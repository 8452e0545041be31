"""Why something did not run, in one line that tells nothing of the machine's folders."""

from __future__ import annotations

import re

from tocom.runtime.errors import one_line

# what starts at a root or at home, or has two folders or more: one slash alone may stand between words
_FOLDERS = re.compile(r"(?<![\w/.:])(?:~?/|(?:[\w.+@~-]+/){2})(?:[\w.+@~-]+/)*(?=[\w.+@~-])")
_LONGEST = 300


def reason(error: BaseException | str) -> str:
    """An error in one line, without folders and without what breaks a table.

    >>> reason("cannot open /home/me/plan | no such file")
    'cannot open plan / no such file'
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return without_folders(one_line(text)).replace("|", "/")[:_LONGEST]


def without_folders(text: str) -> str:
    """A text in which files have only their names.

    >>> without_folders("--out /tmp/x/page.md, then build/bench/gpu/r8.plan in images/s")
    '--out page.md, then r8.plan in images/s'
    """
    return _FOLDERS.sub("", text)
