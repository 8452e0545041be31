"""`tocom refit`."""

from __future__ import annotations

from tocom.export.cli.console import open_console, stages
from tocom.export.cli.extras import require_extra
from tocom.export.cli.options import FamilyFolder


def refit_command(family: FamilyFolder, /) -> None:
    """Put the weights into plans that were built without them, on the GPU that runs them.

    For a family compiled with --plan-option stripped. Writes the new plans into the family's folder, and lists them.
    Validate them afterwards: a refit is where weights can go wrong.

    Examples of use:

        tocom refit engines/my && tocom validate engines/my

    Exit status: 0 done, 2 bad input.

    See also: `tocom compile`, `tocom validate`.
    """
    require_extra("compile", "refitting")
    from tocom.export.family.refit import refit_family

    with stages(None) as notify:
        refitted = refit_family(family, notify)
    open_console().print(f"[green]refitted[/] {len(refitted.engines)} engines; now run: tocom validate {family}")
