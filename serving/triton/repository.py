"""A family's folder -> a model repository for Triton, whole or not at all.

What several degrees read is copied once, and the others' version folders have hard links to the copy. There are none to
the family's own files: onnx and onnx_ir take a weights file with more than one name for an attack.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import tocom.runtime.preprocess
from tocom.runtime.backends import BACKENDS
from tocom.runtime.checked_json import Json, read
from tocom.runtime.errors import InputError, one_line
from tocom.runtime.family_files import is_data
from tocom.runtime.files import write_atomically
from tocom.runtime.manifest import EngineEntry, Family
from tocom.serving.triton.config import (
    LABELS,
    TritonOptions,
    engine_config,
    ensemble_config,
    largest_batch,
    preprocess_config,
)
from tocom.serving.triton.prototext import prototext

MARKER = "tocom-triton.json"  # says that a folder was written here, and may be replaced
CLIENT, ENSEMBLE = "client", "ensemble"
VERSION = "1"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_ENOUGH = ("__init__.py", "checked_json.py", "errors.py", "family_files.py", "files.py", "manifest.py", "preprocess.py")
_PORTABLE = ("fp32", "fp16")  # precisions whose graphs say all, so that ONNX Runtime computes what was validated


@dataclass(frozen=True)
class RepositoryOptions:
    """What is to be written.

    Attributes:
        degrees: To serve; all of the family by default.
        name: Of the family, which models' names begin with. Default: its folder's.
        preprocess: Who prepares images: the client, or an ensemble beside each degree.
        backend: Triton's, where it is not to be the engine's own: "onnxruntime".
        replace: Whether another model repository in the folder's place may be deleted.
        running: How Triton is to run the models.

    Raises:
        InputError: A name or choice is not one there is.
    """

    degrees: tuple[int, ...] = ()
    name: str | None = None
    preprocess: str = CLIENT
    backend: str | None = None
    replace: bool = False
    running: TritonOptions = field(default_factory=TritonOptions)

    def __post_init__(self) -> None:
        if self.name is not None and not _NAME.fullmatch(self.name):
            raise InputError(f"name must be letters, digits and _.- and begin with neither of those, got "
                             f"{one_line(self.name)}")  # fmt: skip
        if self.preprocess not in (CLIENT, ENSEMBLE):
            raise InputError(f"preprocess must be {CLIENT} or {ENSEMBLE}, got {one_line(self.preprocess)}")
        if self.backend not in (None, "onnxruntime"):
            raise InputError(f"backend must be onnxruntime, or left out for the engine's own, got "
                             f"{one_line(self.backend)}")  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A model of a repository.

    Attributes:
        name: Its own.
        degree: That it answers at; None for the one that prepares images.
        config: Its config.pbtxt, before it is text.
        files: Path in the model's folder -> the file that it is made from, or its content.
    """

    name: str
    degree: int | None
    config: Mapping[str, Any]
    files: Mapping[str, Path | bytes]

    @property
    def backend(self) -> str:
        """Who runs it, in Triton's words."""
        return self.config.get("backend") or self.config["platform"]


@dataclass(frozen=True)
class Written:
    """A model as it lies on the disk.

    Attributes:
        model: The model.
        size: Bytes of its files.
        linked: Bytes of these that are another model's too, and take no room again.
    """

    model: Model
    size: int
    linked: int


def write_repository(
    engines: Path, out: Path, options: RepositoryOptions, inlined: Callable[[Path], bytes]
) -> tuple[Written, ...]:
    """Writes a model repository.

    Args:
        engines: Folder of the family.
        out: Folder of the repository; it is there only once all of it is.
        options: What is to be written.
        inlined: Gives a graph without model-local functions, which OpenVINO does not expand.

    Raises:
        InputError: The family is broken, has an engine that Triton cannot run, or the folder holds something else.
        OSError: A file cannot be written.
    """
    family = Family.read(engines)
    _ensure_replaceable(engines, out, replace=options.replace)
    models = tuple(_models(engines, family, options, inlined))
    out.parent.mkdir(parents=True, exist_ok=True)
    making = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        making.mkdir()
        copies: dict[Path, Path] = {}
        written = tuple(_write_model(making, model, copies) for model in models)
        marker = {"format": 1, "family": family.model, "models": [model.name for model in models]}
        write_atomically(making / MARKER, json.dumps(marker, indent=1).encode())
        _put_in_place(making, out)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return written


def _models(
    engines: Path, family: Family, options: RepositoryOptions, inlined: Callable[[Path], bytes]
) -> Iterator[Model]:
    """The models of a repository, once every file that they are made from is known to be the one that was compiled.

    Raises:
        InputError: See `write_repository`.
    """
    degrees = options.degrees or tuple(entry.degree for entry in family.engines)
    if not degrees:
        raise InputError(f"a family must have engines to serve, got none in {one_line(engines)}: compile one")
    folder = re.sub(r"[^A-Za-z0-9_.-]+", "_", engines.resolve().name).lstrip("_.-")
    name = options.name or folder or "family"
    labels = {} if family.class_names is None else {LABELS: _labels(family)}
    preparing, most = f"{name}_preprocess", []
    for degree in sorted(set(degrees)):
        entry = family.entry(degree)
        backend = _backend(entry, options)
        family.check_files(engines, entry)
        engine_name = f"{name}_r{degree:02d}"
        config = engine_config(engine_name, family, entry, backend, options.running)
        yield Model(engine_name, degree, config, _engine_files(engines, entry, backend, inlined) | labels)
        if options.preprocess == ENSEMBLE:
            most.append(largest_batch(entry, backend, options.running))
            ensemble = f"{engine_name}_image"
            # Triton wants a version folder where no file lies
            files = {f"{VERSION}/.keep": b"", **labels}
            yield Model(ensemble, degree, ensemble_config(ensemble, family, preparing, engine_name), files)
    if most:
        config = preprocess_config(preparing, family, options.running, max(most))
        yield Model(preparing, None, config, dict(_preprocess_files()))


def _backend(entry: EngineEntry, options: RepositoryOptions) -> str:
    """The backend that Triton runs an engine with: its own, or the one that was asked for.

    Raises:
        InputError: There is none.
    """
    if options.backend is not None and entry.backend != options.backend and entry.precision not in _PORTABLE:
        raise InputError(
            f"only engines in {' or '.join(_PORTABLE)} run on another backend than their own, got degree "
            f"{entry.degree} in {entry.precision} for {entry.backend}: leave out --backend"
        )
    backend = options.backend or entry.backend
    served = [row.name for row in BACKENDS.values() if row.triton is not None]
    if backend not in served:
        raise InputError(
            f"Triton has backends for {', '.join(served)}, got degree {entry.degree} for {one_line(backend)}: compile "
            "the family for one of these, or give --backend onnxruntime"
        )
    if BACKENDS[backend].builds_plans:
        built = Json(entry.build, "build").key("options")
        for option, name in (("stripped", "stripped"), ("own_kernels", "plugin")):
            if built.key_or(option, False).boolean():
                raise InputError(
                    f"Triton loads plans that hold all they need, got degree {entry.degree} with {name}: compile it "
                    "without that --plan-option"
                )
    return backend


def _engine_files(
    engines: Path, entry: EngineEntry, backend: str, inlined: Callable[[Path], bytes]
) -> dict[str, Path | bytes]:
    """An engine's files, with external data under the names that the graph has for them.

    Raises:
        InputError: The manifest has them where no graph could name them.
    """
    row = BACKENDS[backend]
    opened = f"{VERSION}/{row.triton.file}"
    if row.builds_plans:
        return {opened: engines / entry.engine}
    graph = PurePosixPath(entry.onnx if backend == "onnxruntime" else entry.engine)
    beside = [name for name in entry.sha256 if is_data(name)]
    for name in beside:
        if not PurePosixPath(name).is_relative_to(graph.parent):
            raise InputError(f"weights must lie beside their graph {graph} or below, got {name}: compile it again")
    weights = {f"{VERSION}/{PurePosixPath(name).relative_to(graph.parent)}": engines / name for name in beside}
    return {opened: engines / graph if row.expands_functions else inlined(engines / graph), **weights}


def _preprocess_files() -> Iterator[tuple[str, bytes]]:
    yield f"{VERSION}/model.py", Path(__file__).with_name("preprocess_model.py").read_bytes()
    runtime = Path(tocom.runtime.preprocess.__file__).parent
    yield f"{VERSION}/tocom/__init__.py", b""  # else a tocom that the server's Python has would be found first
    for name in _ENOUGH:
        yield f"{VERSION}/tocom/runtime/{name}", b"" if name == "__init__.py" else (runtime / name).read_bytes()


def _labels(family: Family) -> bytes:
    return "".join(f"{one_line(name)}\n" for name in family.class_names or ()).encode()


def _write_model(repository: Path, model: Model, copies: dict[Path, Path]) -> Written:
    """Writes a model's folder; `copies` says where a file of the family lies already, and is told of new ones."""
    folder = repository / model.name
    size = linked = 0
    for name, content in model.files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            target.write_bytes(content)
        elif content in copies and _linked(copies[content], target):
            linked += target.stat().st_size
        else:
            shutil.copyfile(content, target)
            copies[content] = target
        size += target.stat().st_size
    config = folder / "config.pbtxt"
    config.write_text(prototext(model.config), encoding="utf-8")
    return Written(model, size + config.stat().st_size, linked)


def _linked(file: Path, target: Path) -> bool:
    """Whether a file could be given a second name, which not every file system has."""
    try:
        os.link(file, target)
    except OSError:
        return False
    return True


def _ensure_replaceable(engines: Path, out: Path, *, replace: bool) -> None:
    """Makes sure that nothing is lost where the repository is to be.

    Raises:
        InputError: There is something that this did not write.
    """
    if engines.resolve().is_relative_to(out.resolve()) or out.resolve().is_relative_to(engines.resolve()):
        raise InputError(f"a repository must lie outside its family's folder, got {one_line(out)}: give another --out")
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not out.is_dir():
        raise InputError(f"a repository must be a folder, got {one_line(out)}, which is not one: give another --out")
    names = {path.name for path in out.iterdir()}
    known = {MARKER, *_marked(out)}
    if names <= known or (replace and all(name == MARKER or (out / name / "config.pbtxt").is_file() for name in names)):
        return
    foreign = one_line(min(names - known))
    way_out = "give another --out" if replace else "give another --out, or --replace if it is a model repository"
    raise InputError(f"{one_line(out)} must hold only what this command wrote, got {foreign}: {way_out}")


def _marked(out: Path) -> list[str]:
    """Names of the models that a repository's marker lists; none where there is no marker that can be read."""
    try:
        return read(out / MARKER, lambda value: [name.text() for name in Json(value, "").key("models").items()])
    except InputError:
        return []


def _put_in_place(making: Path, out: Path) -> None:
    """Renames a finished repository to where it belongs; what was there is deleted only afterwards."""
    if not out.exists():
        making.rename(out)
        return
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    out.rename(old)
    try:
        making.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
