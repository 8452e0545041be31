"""compile.toml: what a family was made from and how, beside its family.json.

Its keys are the options of `tocom compile`, so that `tocom compile --config` repeats it; a person can write such a file
too. Paths are kept as they were given, with the folder that they start from. The hashes tell whether a file is still
the one that was read. Needs no torch.
"""

from __future__ import annotations

import difflib
import hashlib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tocom.export.engine.tensorrt.plan_options import PlanOptions
from tocom.export.source.options import QUANTIZED, CompileOptions, fingerprint
from tocom.runtime.errors import InputError, one_line
from tocom.runtime.family_files import RECORD
from tocom.runtime.files import sha256_file, write_atomically

if TYPE_CHECKING:
    from tocom.runtime.manifest import Family

PATHS = ("model", "checkpoint", "compensator", "calibration", "images", "out")  # options that are paths, or may be
_FOLDER = "folder"  # key of the folder that relative paths start from
_SHA256 = "sha256"
_WRITTEN_BY = "written-by"
_BESIDE_OPTIONS = (_FOLDER, _SHA256, _WRITTEN_BY)
_OF_MODEL = ("config.json", "model.safetensors", "pytorch_model.bin")  # what a model folder's hash is of
_HEAD = "# What this family was made from. To repeat it: tocom compile --config THIS_FILE\n"

# Option -> the field of CompileOptions, QuantizeOptions, Method or PlanOptions, by whose name it goes there.
_FIELDS = {"source-degree": "source_degree", "scale": "delta_scale", "float-blocks": "float_blocks",
           "num-classes": "num_classes"}  # fmt: skip
_PLAIN = ("model", "checkpoint", "compensator", "degrees", "out", "precision", "backend", "images", "limit",
          "schedule", "reduction")  # fmt: skip
_OF_QUANTIZING = {"calibration-images": "images", "choose": "choice", "range": "range", "smooth": "smooth",
                  "widen": "widen", "reparameterize": "reparameterize", "rounding": "rounding",
                  "reconstruct": "reconstruct"}  # fmt: skip
_OF_PLANS = {"hardware-compatible": "hardware_compatible", "version-compatible": "version_compatible",
             "stripped": "stripped", "plugin": "own_kernels"}  # fmt: skip
OPTIONS = (*_PLAIN, *_FIELDS, "model-arg", *_OF_QUANTIZING, "per-degree", "calibration", "max-drop", "keep-float",
           "plan-batch", "plan-target", "plan-option", "replace")  # fmt: skip


@dataclass(frozen=True)
class CompileRecord:
    """The options of a compile, as read from a file.

    Attributes:
        file: Where they stand.
        options: Option, as on the command line without its dashes -> value; paths as they stand there.
        folder: What relative paths start from.
        sha256: Option -> hash of what it named, where that was recorded.
    """

    file: Path
    options: Mapping[str, Any]
    folder: Path
    sha256: Mapping[str, str]

    @classmethod
    def read(cls, file: Path) -> CompileRecord:
        """Reads a file; of a folder, its compile.toml.

        Raises:
            InputError: If it cannot be read, or holds what is no option.
        """
        file = file / RECORD if file.is_dir() else file
        try:
            table = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or not TOML
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(f"{one_line(file)} must be a TOML file of options: {one_line(reason)}") from error
        folder, sha256 = table.get(_FOLDER, "."), table.get(_SHA256, {})
        if not isinstance(folder, str) or not isinstance(sha256, dict):
            raise InputError(f"{one_line(file)}: {_FOLDER} must be a path and {_SHA256} a table")
        options = {key: value for key, value in table.items() if key not in _BESIDE_OPTIONS}
        for key, value in options.items():
            _require_option(file, key, value)
        return cls(file, options, file.absolute().parent / folder, {key: str(digest) for key, digest in sha256.items()})

    def value(self, key: str) -> Any:
        """An option's value; a relative path starts from the recorded folder."""
        value = self.options[key]
        if key not in PATHS or (key == "model" and not (self.folder / value).exists()):
            return value  # a timm name is no path
        return str(self.folder / value)

    def require_unchanged(self, key: str) -> None:
        """Checks that what an option named is there and has not changed.

        Raises:
            InputError: If not.
        """
        if key not in self.options or key not in PATHS:
            return
        path, recorded = Path(self.value(key)), self.sha256.get(key)
        if recorded is None and key == "model":
            return
        if not path.exists():
            raise InputError(f"{one_line(self.file)} names the {key} {one_line(path)}, which is not there any more: "
                             f"say where it is with --{key}")  # fmt: skip
        if recorded is not None and _hash_of(path) != recorded:
            raise InputError(f"the {key} {one_line(path)} has changed since {one_line(self.file)} was written: name "
                             f"the one the family was made from with --{key}")  # fmt: skip


def write_record(options: CompileOptions, family: Family) -> None:
    """Writes compile.toml into the family's folder.

    Args:
        options: Of the compile.
        family: As it is listed with that; it may have further degrees, of earlier compiles.

    Raises:
        OSError: If it cannot be written; an earlier one is untouched then.
    """
    import tomli_w

    table = to_table(options)
    table["degrees"] = sorted({*options.degrees, *(entry.degree for entry in family.engines)})
    table |= {_FOLDER: str(Path.cwd()), _WRITTEN_BY: f"tocom {version('tocom')}", _SHA256: dict(_hashes(options))}
    write_atomically(options.out / RECORD, (_HEAD + tomli_w.dumps(table)).encode())


def to_table(options: CompileOptions) -> dict[str, Any]:
    """Options of a compile -> the keys of the file; what is None is left out, and `replace` is never repeated."""
    quantize, method, plan = options.quantize, options.quantize.method, options.plan
    table = {key: getattr(options, key) for key in _PLAIN}
    table |= {key: getattr(options, name) for key, name in _FIELDS.items()}
    table["model-arg"] = [f"{name}={value!r}" for name, value in options.model_args.items()]
    if options.precision in QUANTIZED:
        table |= {key: getattr(method, name) for key, name in _OF_QUANTIZING.items()}
        table |= {"per-degree": not method.shared, "calibration": quantize.calibration, "max-drop": quantize.max_drop,
                  "keep-float": quantize.keep_float}  # fmt: skip
    if plan != PlanOptions():
        table |= {"plan-batch": ":".join(map(str, plan.batch)), "plan-target": plan.targets,
                  "plan-option": [key for key, name in _OF_PLANS.items() if getattr(plan, name)]}  # fmt: skip
    return {key: _plain(value) for key, value in table.items() if value is not None and value not in ((), [])}


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def _hashes(options: CompileOptions) -> Iterator[tuple[str, str]]:
    named = {"model": Path(options.model), "checkpoint": options.checkpoint, "compensator": options.compensator}
    for key, path in named.items():
        if path is not None and path.exists():
            yield key, _hash_of(path)
    if options.precision in QUANTIZED and options.quantize.calibration is not None:
        yield "calibration", str(fingerprint(options.quantize.calibration))


def _hash_of(path: Path) -> str:
    """Hash of a file, or of the files that make a model folder."""
    if path.is_file():
        return sha256_file(path)
    digest = hashlib.sha256()
    for name in _OF_MODEL:
        if (path / name).is_file():
            digest.update(f"{name}:{sha256_file(path / name)};".encode())
    return digest.hexdigest()


def _require_option(file: Path, key: str, value: object) -> None:
    if key not in OPTIONS:
        near = difflib.get_close_matches(key, OPTIONS, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise InputError(f"{one_line(file)}: {one_line(repr(key))} is no option of `tocom compile`.{hint}")
    parts: Sequence[object] = value if isinstance(value, list) else [value]
    kinds = (str,) if key in PATHS else (str, int, float, bool)
    if not all(isinstance(part, kinds) for part in parts) or (key in PATHS and isinstance(value, list)):
        raise InputError(
            f"{one_line(file)}: {key} must be {'a path' if key in PATHS else 'a text, a number or a list'}"
        )
