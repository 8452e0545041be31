"""Damage to .safetensors and .pth files that knows their structure."""

from __future__ import annotations

import collections
import io
import json
import pickle
import random
import struct
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bench.fuzz.case import Mutate
from bench.fuzz.mutate_bytes import BYTES
from bench.fuzz.mutate_json import STRUCTURE

_LENGTHS = (0, 1, 7, 2**20, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 100_000_001)
_NUMBERS = (float("nan"), float("inf"), -float("inf"), 3e38, 1e-45, -0.0, 0.0)


def _header_length(draw: random.Random, whole: bytes) -> bytes:
    (length,) = struct.unpack("<Q", whole[:8])
    other = draw.choice((*_LENGTHS, length - 1, length + 1, length * 2, len(whole), len(whole) - 8, len(whole) - 7))
    return struct.pack("<Q", other % 2**64) + whole[8:]


def _header(whole: bytes) -> tuple[bytes, bytes]:
    (length,) = struct.unpack("<Q", whole[:8])
    return whole[8 : 8 + length], whole[8 + length :]


def _with_header(header: bytes, payload: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + payload


def _in_header(mutate: Mutate) -> Mutate:
    def mutated(draw: random.Random, whole: bytes) -> bytes:
        header, payload = _header(whole)
        return _with_header(mutate(draw, header), payload)

    return mutated


def _header_entries(draw: random.Random, whole: bytes) -> bytes:
    header, payload = _header(whole)
    entries = json.loads(header)
    entry = entries[draw.choice([name for name in entries if name != "__metadata__"])]
    (begin, end), shape = entry["data_offsets"], entry["shape"]
    entry |= draw.choice((
        {"dtype": draw.choice(("F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "C64", "X", ""))},
        {"shape": draw.choice(([], [0], [-1], [2**63], [2**32, 2**32], [1] * 200, [end - begin], [1.5], "x",
                               [*shape, 1], shape[::-1]))},
        {"data_offsets": draw.choice(([begin, begin], [end, begin], [begin, 2**63], [0, len(payload)], [-4, end],
                                      [begin + 1, end + 1], [begin, end, end], [len(payload), 2 * len(payload)]))},
        {"dtype": "I32"},
        {"shape": [0, 10**9], "data_offsets": [begin, begin]},
    ))  # fmt: skip
    return _with_header(json.dumps(entries).encode(), payload)


def _metadata(draw: random.Random, whole: bytes) -> bytes:
    header, payload = _header(whole)
    entries = json.loads(header)
    described = entries.get("__metadata__", {})
    names = [name for name, text in described.items() if text.startswith("{")]
    if not names:
        entries["__metadata__"] = {"format": "pt", "info": "{}", "kind": "[]"}
        return _with_header(json.dumps(entries).encode(), payload)
    name = draw.choice(names)
    mutate = draw.choice(list(STRUCTURE.values()))
    described[name] = mutate(draw, described[name].encode()).decode(errors="replace")
    return _with_header(json.dumps(entries).encode(), payload)


def _values(draw: random.Random, whole: bytes) -> bytes:
    header, payload = _header(whole)
    damaged, at = bytearray(payload), 4 * draw.randrange(len(payload) // 4)
    damaged[at : at + 4] = np.float32(draw.choice(_NUMBERS)).tobytes()
    return _with_header(header, bytes(damaged))


SAFETENSORS: dict[str, Mutate] = {
    "header's length": _header_length,
    "header's entries": _header_entries,
    "odd values": _values,
    "metadata": _metadata,
    **{f"header: {name}": _in_header(mutate) for name, mutate in STRUCTURE.items()},
    **BYTES,
}


class _Runs:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return print, ("code was run",)


def _odd_tensor(draw: random.Random, tensor: torch.Tensor) -> Any:
    """A tensor of the same name that no checkpoint has."""
    one = torch.ones(1)
    return draw.choice((
        lambda: tensor.double(), lambda: tensor.half(), lambda: tensor.bfloat16(), lambda: tensor.to(torch.int32),
        lambda: tensor.to(torch.float8_e4m3fn), lambda: tensor.to(torch.complex64), lambda: tensor > 0,
        lambda: tensor.to_sparse(), lambda: tensor.to("meta"), lambda: torch.nn.Parameter(tensor),
        lambda: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
        lambda: one.expand(tensor.shape),  # every number at the same place
        lambda: one.expand(10**6, 10**6), lambda: one.expand(10**4, 10**5),  # 4 TB and 4 GB, of 4 bytes
        lambda: torch.as_strided(torch.ones(64), tuple(tensor.shape), (0,) * tensor.ndim),
        lambda: tensor.flatten()[:0], lambda: tensor.t() if tensor.ndim == 2 else tensor[None],
        lambda: tensor * float("nan"), lambda: tensor.numpy(), lambda: None, lambda: 3, lambda: "text",
        lambda: [tensor], lambda: {"weight": tensor}, _Runs,
    ))()  # fmt: skip


def _odd_tensors(draw: random.Random, whole: bytes) -> bytes:
    state = torch.load(io.BytesIO(whole), weights_only=True)["model"]
    name = draw.choice(list(state))
    state[name] = _odd_tensor(draw, state[name])
    return _saved({"model": state})


def _odd_layout(draw: random.Random, whole: bytes) -> bytes:
    state = torch.load(io.BytesIO(whole), weights_only=True)["model"]
    looped: dict[str, Any] = {}
    looped["model"] = looped
    name = next(iter(state))
    return _saved(draw.choice((
        state, {"state_dict": state}, {"model": {"model": state}}, {"module": state}, [state], list(state.items()),
        collections.OrderedDict(state), {f"module.{name}": each for name, each in state.items()},
        {f"module.{name}": each for name, each in [*state.items()][:1]} | state, {"model": None}, {}, None, 3, "text",
        {"model": {}}, {0: state[name]}, {b"x": 1}, {"model": {None: state[name]}}, looped, {"model": looped},
        {"\x1b[2J" + "x" * 300: state[name]}, {"a\nb": state[name]}, {**state, "x" * 100_000: state[name]},
        {**state, "extra": state[name]}, {name: each for name, each in state.items() if name != "cls_token"},
        {"epoch": 3, "model": state}, torch.ones(3), state[name],
    )))  # fmt: skip


def _odd_archive(draw: random.Random, whole: bytes) -> bytes:
    members = {each.filename: zipfile.ZipFile(io.BytesIO(whole)).read(each) for each in
               zipfile.ZipFile(io.BytesIO(whole)).infolist()}  # fmt: skip
    name, way = draw.choice(list(members)), draw.randrange(8)
    if way == 0:
        del members[name]
    elif way == 2:
        members[f"../{name}"] = members.pop(name)
    elif way in (1, 3, 4):
        huge = bytes(200_000_000 if draw.random() < 0.2 else 1_000_000)
        members[name] = {1: b"", 3: members[name] * 3, 4: huge}[way]
    written, form = io.BytesIO(), zipfile.ZIP_DEFLATED if way >= 4 else zipfile.ZIP_STORED
    with warnings.catch_warnings(), zipfile.ZipFile(written, "w", form, compresslevel=1) as archive:
        warnings.simplefilter("ignore")  # of names that are there twice
        for each, content in members.items():
            archive.writestr(each, content)
        if way == 5:
            archive.writestr(name, b"again")
    return written.getvalue()


def _odd_pickle(draw: random.Random, whole: bytes) -> bytes:
    deep = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."  # lists in lists
    return draw.choice((
        lambda: pickle.dumps({"a": 1}), lambda: pickle.dumps(_Runs()), lambda: deep,
        lambda: b"\x80\x02" + b"(" * 100_000 + b".", lambda: b"\x80\x02X\xff\xff\xff\x7fabc.", lambda: b"\x80\x04.",
        lambda: b"\x80\x02]" + b"(K\x00e" * 50_000 + b".", lambda: b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.",
        lambda: b"\x80\x02\x8a\xff" + b"\x01" * 255 + b".", lambda: b"\x80\x7f" + whole[:100],
        lambda: b"cbuiltins\neval\n.",
        lambda: b"\x80\x02(K\x01K\x02u.", lambda: b"\x80\x02r\xff\xff\xff\x7f.", lambda: b"\x80\x02j\xff\xff\xff\x7f.",
    ))()  # fmt: skip


def _saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


TORCH: dict[str, Mutate] = {
    "odd tensors": _odd_tensors,
    "odd layout": _odd_layout,
    "odd archive": _odd_archive,
    "odd pickle": _odd_pickle,
    **BYTES,
}
