"""Carries what the GPU check needs to a machine without network: wheels, in pieces, in one folder.

    python -m bench.pack_gpu pack --python-version 3.12        (here, where pip reaches its index)
    python -m bench.pack_gpu unpack build/gpu-pack --into DIR  (there; needs nothing but pip)

What such a machine brings is PyTorch with CUDA, torchvision and numpy. Versions are those that are installed here.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import lzma
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tocom.runtime.errors import InputError, one_line
from tocom.runtime.files import sha256_file, write_atomically

ROOT = Path(__file__).parents[1]
MANIFEST = "manifest.json"
_FORMAT = 1
_MIB = 1 << 20
_RTX = ("tensorrt_rtx_cu13", "tensorrt_rtx_cu13_bindings", "tensorrt_rtx_cu13_libs")
_WANTED = ("onnx", "onnx_ir", "onnxscript", "onnxruntime-gpu", "timm", "typer", "rich", "safetensors")
_BROUGHT = ("torch", "torchvision", "numpy", "pillow")  # by the machine, with all that they need
_NOT_NEEDED = ("huggingface-hub",)  # of timm, which does without where there is no network
_GLIBC = (17, 24, 26, 27, 28, 31, 34, 35)  # pip takes a platform by its exact name
_XZ = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 6}]  # the first makes jumps to one place alike


def pack(
    out: Path, python: str, rtx: str, piece_mib: float, only: Sequence[str], *, recompress: bool
) -> list[dict[str, Any]]:
    """Downloads wheels and cuts them into pieces.

    Args:
        out: The folder; what an earlier pack left there goes.
        python: Version of the other machine's Python, like "3.12".
        rtx: Version of TensorRT for RTX.
        piece_mib: Size of the largest piece, in MiB.
        only: Only packages with one of these in their names; none for all.
        recompress: Whether wheels larger than a piece are compressed better, which takes minutes.

    Returns:
        What was packed, as in the manifest.

    Raises:
        InputError: There is no wheel of something for that Python, or a value is not one that can be.
    """
    limit = int(piece_mib * _MIB)
    if limit < 1:
        raise InputError(f"--piece-mib must be more than 0, got {piece_mib}")
    if not all(part.isdigit() for part in python.split(".")) or python.count(".") != 1:
        raise InputError(f"--python-version must be like 3.12, got {one_line(python)}")
    _clear(out)
    out.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    _keep(out, python, entries)  # from now on it is known as a pack, whole or not
    for name, version in _requirements(python, rtx).items():
        if only and not any(text.lower() in name.lower() for text in only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            wheel = _download(f"{name}=={version}", python, Path(folder))
            entries.append(add(wheel, out, limit, recompress=recompress))
        _keep(out, python, entries)
        print(f"{entries[-1]['name']}: {_size(entries[-1]):.1f} MiB", file=sys.stderr, flush=True)
    return entries


def _keep(out: Path, python: str, entries: Sequence[dict[str, Any]]) -> None:
    content = {"format": _FORMAT, "python": python, "files": entries}
    write_atomically(out / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())


def add(wheel: Path, out: Path, limit: int, *, recompress: bool) -> dict[str, Any]:
    """Puts a wheel into a pack.

    Args:
        wheel: The file.
        out: The pack's folder.
        limit: Bytes of the largest piece.
        recompress: As for `pack`.

    Returns:
        Its entry in the manifest.
    """
    compressed = recompress and wheel.stat().st_size > limit
    packed = _recompressed(wheel) if compressed else wheel
    entry = {"name": wheel.name, "compression": "xz" if compressed else None, "sha256": sha256_file(wheel)}
    with packed.open("rb") as file:
        pieces = [_piece(out / f"{packed.name}.{index:02}", part)
                  for index, part in enumerate(iter(lambda: file.read(limit), b""))]  # fmt: skip
    return {**entry, "pieces": pieces}


def unpack(folder: Path, into: Path, only: Sequence[str] = ()) -> list[str]:
    """Joins the pieces, and installs the wheels without asking any index.

    Args:
        folder: A pack.
        into: Folder to install into, for PYTHONPATH.
        only: As for `pack`.

    Returns:
        Names of the wheels.

    Raises:
        InputError: The pack is not whole, is for another Python, or pip fails.
    """
    manifest = _manifest(folder)
    running = ".".join(platform.python_version_tuple()[:2])
    if manifest["python"] != running:
        raise InputError(f"the pack is for Python {one_line(manifest['python'])}, this is {running}: pack again with "
                         f"--python-version {running}, or run the other one")  # fmt: skip
    entries = [entry for entry in manifest["files"]
               if not only or any(text.lower() in entry["name"].lower() for text in only)]  # fmt: skip
    if not entries:
        raise InputError(f"{one_line(folder)} holds nothing to install")
    with tempfile.TemporaryDirectory() as joined:
        wheels = [join(folder, entry, Path(joined)) for entry in entries]
        _pip("install", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(into),
             *map(str, wheels))  # fmt: skip
    return [entry["name"] for entry in entries]


def join(folder: Path, entry: dict[str, Any], into: Path) -> Path:
    """Makes a wheel of its pieces.

    Args:
        folder: The pack.
        entry: The wheel's, in the manifest.
        into: Folder of the wheel.

    Raises:
        InputError: A piece is missing, or is not what was packed.
    """
    wheel = into / entry["name"]
    packed = wheel.with_name(f"{wheel.name}.packed")
    with packed.open("wb") as file:
        for piece in entry["pieces"]:
            source = folder / piece["name"]
            if not source.is_file():
                raise InputError(f"{one_line(source.name)}, a piece of {one_line(wheel.name)}, is missing: copy it")
            if sha256_file(source) != piece["sha256"]:
                raise InputError(f"{one_line(source.name)} is not what was packed: copy it again")
            with source.open("rb") as part:
                shutil.copyfileobj(part, file)
    if entry["compression"] is None:
        packed.replace(wheel)
    else:
        with lzma.open(packed) as compressed, wheel.open("wb") as file:
            shutil.copyfileobj(compressed, file)
        packed.unlink()
    if sha256_file(wheel) != entry["sha256"]:
        raise InputError(f"{one_line(wheel.name)}, joined, is not what was packed: pack again")
    return wheel


def _requirements(python: str, rtx: str) -> dict[str, str]:
    """Package -> version: what is wanted and all that it needs, less what the other machine brings."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}

    def needs(name: str) -> Iterator[str]:
        for text in importlib.metadata.requires(name) or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate(environment):
                yield requirement.name

    def all_of(names: Sequence[str], leave_out: set[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        waiting = list(names)
        while waiting:
            name = canonicalize_name(waiting.pop(0))
            if name not in found and name not in leave_out:
                try:
                    found[name] = importlib.metadata.version(name)
                    waiting += needs(name)
                except importlib.metadata.PackageNotFoundError:
                    continue  # brought by nobody here, so not needed for what was tested
        return found

    brought = {*all_of(_BROUGHT, set()), *_BROUGHT, *_NOT_NEEDED}
    return {**dict.fromkeys(_RTX, rtx), **all_of(_WANTED, brought)}


def _download(requirement: str, python: str, folder: Path) -> Path:
    """The wheel of a package.

    Raises:
        InputError: There is none for that Python.
    """
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in _GLIBC] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
    chosen = [part for name in platforms for part in ("--platform", name)]
    how = ("--no-deps", "--only-binary=:all:", "--python-version", python, "--implementation", "cp", *chosen)
    try:
        _pip("download", *how, "--dest", str(folder), requirement)
    except InputError as error:
        with suppress(InputError):  # there may be a source package that is the same for every Python
            _pip("wheel", "--no-deps", "--wheel-dir", str(folder), requirement)
        if not list(folder.glob("*-none-any.whl")):
            raise InputError(f"there is no wheel of {requirement} for Python {python}: {error}") from error
    (wheel,) = folder.glob("*.whl")
    return wheel


def _pip(*arguments: str) -> None:
    """Runs pip of this Python.

    Raises:
        InputError: It fails; its first complaint follows.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        told = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "it does not say why")
        raise InputError(f"pip {arguments[0]} fails: {one_line(told.removeprefix('ERROR: '))}")


def _recompressed(wheel: Path) -> Path:
    """The wheel's files as they are in an archive of the same name, and that compressed; both beside the wheel.

    The archive takes the wheel's place.
    """
    plain = wheel.with_name(f"{wheel.name}.plain")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(plain, "w", zipfile.ZIP_STORED) as target:
        for each in source.infolist():
            kept = zipfile.ZipInfo(each.filename, each.date_time)
            kept.external_attr = each.external_attr
            target.writestr(kept, source.read(each))
    plain.replace(wheel)
    packed = wheel.with_name(f"{wheel.name}.xz")
    with wheel.open("rb") as file, lzma.open(packed, "wb", filters=_XZ) as compressed:
        shutil.copyfileobj(file, compressed, _MIB)
    return packed


def _piece(file: Path, content: bytes) -> dict[str, Any]:
    write_atomically(file, content)
    return {"name": file.name, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def _size(entry: dict[str, Any]) -> float:
    return sum(piece["bytes"] for piece in entry["pieces"]) / _MIB


def _clear(out: Path) -> None:
    """Removes what an earlier pack left.

    Raises:
        InputError: There is something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MANIFEST).is_file():
        raise InputError(f"--out must be an empty folder, or that of an earlier pack, got {one_line(out)}")
    for entry in _manifest(out)["files"]:
        for piece in entry["pieces"]:
            (out / piece["name"]).unlink(missing_ok=True)
    (out / MANIFEST).unlink()


def _manifest(folder: Path) -> dict[str, Any]:
    """What a pack holds, by its manifest.

    Raises:
        InputError: It is no pack.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text())
        names = [name for entry in content["files"]
                 for name in (entry["name"], *(piece["name"] for piece in entry["pieces"]))]  # fmt: skip
        whole = content["format"] == _FORMAT and isinstance(content["python"], str)
        # a name with a folder in it would be written, or removed, somewhere else
        whole = whole and all(Path(name).name == name for name in names)
        whole = whole and all(entry["compression"] in (None, "xz") for entry in content["files"])
        whole = whole and all(isinstance(piece["sha256"], str) and isinstance(piece["bytes"], int)
                              for entry in content["files"] for piece in entry["pieces"])  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{one_line(folder)} must be a folder that was packed, and its {MANIFEST} cannot be read "
                         f"({type(error).__name__})") from error  # fmt: skip
    if not whole:
        raise InputError(f"{one_line(folder / MANIFEST)} is not one that this command wrote: pack again")
    return content


def _parser() -> argparse.ArgumentParser:
    """The command line; of the standard library alone, because the machine without network may have no other."""
    parser = argparse.ArgumentParser(prog="python -m bench.pack_gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    shows = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    packing = commands.add_parser("pack", help="download wheels and cut them into pieces", **shows)
    packing.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-pack", help="the folder")
    packing.add_argument("--python-version", default=".".join(platform.python_version_tuple()[:2]),
                         help="the other machine's")  # fmt: skip
    packing.add_argument("--rtx", default="1.7.1.116", help="version of TensorRT for RTX; 1.4.0.76 is another one")
    packing.add_argument("--piece-mib", type=float, default=48, help="size of the largest piece, in MiB")
    packing.add_argument("--recompress", action="store_true",
                         help="compress wheels larger than a piece by a third more; takes minutes each")  # fmt: skip
    unpacking = commands.add_parser("unpack", help="join the pieces and install the wheels", **shows)
    unpacking.add_argument("folder", type=Path, help="the pack")
    unpacking.add_argument("--into", type=Path, required=True, help="folder to install into, for PYTHONPATH")
    for each in (packing, unpacking):
        each.add_argument("--only", action="append", default=[], metavar="TEXT",
                          help="only packages with this in their names; may be given several times")  # fmt: skip
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; what goes wrong is one line on stderr and status 2.

    Args:
        arguments: In place of those of the process.

    Raises:
        SystemExit: Always.
    """
    given = _parser().parse_args(arguments)
    try:
        if given.command == "pack":
            entries = pack(
                given.out, given.python_version, given.rtx, given.piece_mib, given.only, recompress=given.recompress
            )
            print(f"packed {len(entries)} wheels, {sum(map(_size, entries)):.0f} MiB in "
                  f"{sum(len(entry['pieces']) for entry in entries)} pieces: {given.out}")  # fmt: skip
        else:
            names = unpack(given.folder, given.into, given.only)
            print(f"installed {len(names)} wheels: export PYTHONPATH={given.into}")
    except InputError as error:
        print(f"pack_gpu: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        print(f"pack_gpu: {one_line(error.strerror or error)}: {one_line(error.filename)}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(0)


if __name__ == "__main__":
    main()
