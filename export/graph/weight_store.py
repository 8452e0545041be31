"""Where a family's weights lie: every tensor's bytes are stored once, however many graphs use them.

A graph refers to large initializers as ONNX external data. Weight files are named after their contents and never
changed, so a graph that was listed once stays valid whatever is compiled into the folder later.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from tocom.runtime.errors import InputError, one_line
from tocom.runtime.family_files import weights_name
from tocom.runtime.files import write_atomically

INLINE_BYTES = 1024  # smaller tensors stay in the graph file
_ALIGNMENT = 4096  # page size: lets an engine map the file instead of reading it


@dataclass(frozen=True)
class _Place:
    file: str
    offset: int


class WeightStore:
    """The weight files of one family folder.

    Args:
        folder: The family's folder.
        graphs: Graphs already listed there, whose tensors are to be shared.
    """

    def __init__(self, folder: Path, graphs: Iterable[Path] = ()) -> None:
        self.folder = folder
        self._places: dict[str, _Place] = {}
        for graph in graphs:
            for value in ir.load(graph).graph.initializers.values():
                tensor = value.const_value
                if isinstance(tensor, ir.ExternalTensor):
                    self._places[_digest(_content(tensor))] = _Place(str(tensor.location), tensor.offset or 0)
                    tensor.release()

    def place(self, model: ir.Model) -> tuple[str, ...]:
        """Moves the model's large initializers into weight files, writing the bytes that are not there yet.

        Args:
            model: Changed in place: its large initializers become external.

        Returns:
            Names of the weight files the model needs.
        """
        new: dict[str, ir.TensorProtocol] = {}
        digests: dict[str, str] = {}
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < INLINE_BYTES:
                continue
            digests[name] = _digest(tensor.tobytes())
            if digests[name] not in self._places:
                new.setdefault(digests[name], tensor)
        self._write(new)
        for name, digest in digests.items():
            self._refer(model.graph.initializers[name], self._places[digest])
        return tuple(sorted({self._places[digest].file for digest in digests.values()}))

    def _write(self, new: dict[str, ir.TensorProtocol]) -> None:
        if not new:
            return
        name = weights_name(_digest("".join(new).encode()))
        places, end = {}, 0
        for digest, tensor in new.items():
            places[digest] = _Place(name, end + -end % _ALIGNMENT)
            end = places[digest].offset + tensor.nbytes

        def write(file: BinaryIO) -> None:
            for digest, tensor in new.items():
                file.write(b"\0" * (places[digest].offset - file.tell()))
                file.write(tensor.tobytes())

        write_atomically(self.folder / name, write)
        self._places |= places

    def _refer(self, value: ir.Value, place: _Place) -> None:
        tensor = value.const_value
        value.const_value = ir.ExternalTensor(
            place.file,
            place.offset,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape),
            name=value.name,
            base_dir=self.folder,
        )


def _content(tensor: ir.ExternalTensor) -> bytes:
    """The bytes of a tensor that a listed graph has in a weight file.

    Raises:
        InputError: The file is not one that may be read.
    """
    try:
        return tensor.tobytes()
    except ValueError as error:  # a link, or a file with a second name: who writes there changes the weights here
        raise InputError(f"{one_line(tensor.path)} must be a file of the family alone: {one_line(error)}") from error


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()
