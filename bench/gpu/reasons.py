"""Why something did not run, in one line that tells nothing of the machine's folders."""

from __future__ import annotations

import re

from runtime.errors import one_line

_FOLDERS = re.compile(r"(?<![\w/.:])~?(?:/[\w.+@~-]+)+/(?=[\w.+@~-])")
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

    >>> without_folders("--out /tmp/x/page.md, then /usr/lib/libcuda.so.1")
    '--out page.md, then libcuda.so.1'
    """
    return _FOLDERS.sub("", text)
