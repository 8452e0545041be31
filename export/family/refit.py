"""A family of plans without weights -> the same with them, on the machine that runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tocom.export.engine.tensorrt.plan import PlanOptions, refitted
from tocom.export.family.lock import locked
from tocom.runtime.backends import named
from tocom.runtime.engines.tensorrt import device
from tocom.runtime.errors import InputError
from tocom.runtime.family_files import plan_of
from tocom.runtime.files import sha256_file, write_atomically
from tocom.runtime.manifest import EngineEntry, Family


def refit_family(folder: Path, notify: Callable[[int, str], None]) -> Family:
    """Puts the weights into every plan of a family that was built without; what is there already stays.

    The engines are not validated again here: `tocom validate` does that.

    Args:
        folder: The family's.
        notify: Told of every degree.

    Raises:
        InputError: If there is no such plan, a file was altered, there is no GPU that the plans are for, or the library
            refuses.
    """
    with locked(folder):
        family = Family.read(folder)
        stripped = [entry for entry in family.engines if _is_stripped(entry)]
        if not stripped:
            raise InputError(f"{folder} holds no plan without weights: nothing to refit.")
        if why := device.unusable():
            raise InputError(f"plans are refitted where they run, but here is {why}.")
        for entry in stripped:
            notify(entry.degree, "refitting")
            family.check_files(folder, entry)
            family = family.with_entry(_refitted(entry, folder))
            family.write(folder)
    return family


def _is_stripped(entry: EngineEntry) -> bool:
    return named(entry.backend).builds_plans and PlanOptions.from_json(entry.build["options"]).stripped


def _refitted(entry: EngineEntry, folder: Path) -> EngineEntry:
    plan, graph = folder / entry.engine, folder / entry.onnx
    content = refitted(plan.read_bytes(), graph, entry.backend)
    options = {**entry.build["options"], "stripped": False}
    build = {**entry.build, "options": options, "bytes": len(content), "refitted": True}
    file = plan_of(graph, build)
    write_atomically(file, content)
    files = {name: digest for name, digest in entry.sha256.items() if name != entry.engine}
    return replace(entry, engine=file.name, sha256={**files, file.name: sha256_file(file)}, build=build)
