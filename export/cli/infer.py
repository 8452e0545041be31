"""`tocom infer`: the command of the runtime room, with the family in front of the images."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from tocom.export.cli.extras import require_engine


def infer_command(*arguments: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]) -> int:
    """Classify images with an engine of a family."""
    if not {"-h", "--help"} & {*arguments}:
        require_engine()
    from tocom.runtime.infer import main as infer

    return infer(list(arguments), prog="tocom infer")
