"""The Token Compensator: low-rank pairs on q and v that describe the gap between two compression degrees."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from tocom.dropout import DropoutKey
from tocom.runtime.checked_json import parse
from tocom.runtime.errors import InputError
from tocom.tensorfile import read_tensors

GROUPS = 16  # one group of ranks per degree step, so the largest degree a compensator knows (ToCom, section 3.3)
_FORMAT = "tocom-compensator-1"
_KEY = "blocks.{block}.attn.{which}_tocom.adapter_{side}.weight"


@dataclass(frozen=True)
class CompensatorInfo:
    """What a compensator was made for; travels with its weights as safetensors metadata.

    Attributes:
        width: Channels C of the backbone.
        depth: Blocks L.
        rank: Rank k of one group.
        groups: Groups G; also the largest degree.
        backbone: Architecture name of the backbone, None where the file does not say (the original .pth layout).
        training_scale: The delta scale it was trained with.
        schedule: Name of the schedule family it was trained for.
        reduction: Name of the token reduction it was trained for.
        backbone_sha256: Hash of the pre-trained weights it was distilled from.
    """

    width: int
    depth: int
    rank: int = 2
    groups: int = GROUPS
    backbone: str | None = None
    training_scale: float = 0.1
    schedule: str = "constant"
    reduction: str = "merge"
    backbone_sha256: str | None = None


class _LowRank(nn.Module):
    """One low-rank pair without bias: `adapter_down` [G*k, C] and `adapter_up` [C, G*k]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.adapter_down = nn.Linear(width, hidden, bias=False)
        self.adapter_up = nn.Linear(hidden, width, bias=False)
        nn.init.zeros_(self.adapter_up.weight)  # training starts from the untouched network


class Compensator(nn.Module):
    """Low-rank pairs on the query and value of every block (ToCom, section 3.3).

    Its state dict has the keys of the original release, `blocks.N.attn.{q,v}_tocom.adapter_{down,up}.weight`.

    Args:
        info: Sizes and origin.
    """

    def __init__(self, info: CompensatorInfo) -> None:
        super().__init__()
        self.info = info
        hidden = info.groups * info.rank
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attn": nn.ModuleDict({f"{name}_tocom": _LowRank(info.width, hidden) for name in "qv"})})
            for _ in range(info.depth)
        )

    def between(
        self,
        source_degree: int,
        target_degree: int,
        delta_scale: float | None = None,
        dropout: DropoutKey | None = None,
    ) -> Compensation:
        """The change from one degree to another.

        Args:
            source_degree: Degree the checkpoint was fine-tuned at.
            target_degree: Degree it shall run at.
            delta_scale: Weight of the change; None takes the training scale.
            dropout: What drops low-rank activations while this compensator is in training mode; None drops none.

        Raises:
            InputError: If a degree lies outside 0..G.
        """
        scale = self.info.training_scale if delta_scale is None else delta_scale
        return Compensation(self, source_degree, target_degree, scale, dropout)

    def to_safetensors(self) -> bytes:
        """The file contents: weights, and `info` as metadata."""
        metadata = {"format": _FORMAT, "info": json.dumps(asdict(self.info), sort_keys=True)}
        return save({name: weight.contiguous() for name, weight in self.state_dict().items()}, metadata)

    def to_original(self) -> dict[str, dict[str, Tensor]]:
        """The layout of the original release's .pth, to be written with `torch.save`."""
        return {"model": {name: weight.clone() for name, weight in self.state_dict().items()}}

    @classmethod
    def load(cls, file: Path) -> Compensator:
        """Reads this project's .safetensors or the original .pth layout.

        Raises:
            InputError: If the file cannot be read, is no compensator, or holds NaN.
        """
        tensors, metadata = read_tensors(file)
        weights = {name: tensor for name, tensor in tensors.items() if "_tocom." in name}
        if not weights:
            raise InputError(f"a compensator holds tensors named {_KEY.format(block=0, which='q', side='down')}, "
                             f"found none of {len(tensors)} in {file}.")  # fmt: skip
        info = _info_from_metadata(metadata, file) if "info" in metadata else _info_from_shapes(weights, file)
        shapes = _shapes(info)
        if weights.keys() != shapes.keys():
            wrong = sorted(weights.keys() ^ shapes.keys())[0]
            raise InputError(f"a compensator of {info.depth} blocks must hold exactly q and v pairs, {wrong!r} is "
                             f"{'missing' if wrong in shapes else 'not one of them'} in {file}.")  # fmt: skip
        for name, tensor in weights.items():
            if tensor.shape != shapes[name] or not tensor.is_floating_point():
                raise InputError(f"compensator tensor {name} must have shape {shapes[name]} and hold floating-point "
                                 f"numbers, got {tuple(tensor.shape)} of {tensor.dtype} in {file}.")  # fmt: skip
        compensator = cls(info)
        compensator.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
        return compensator.eval()

    def require_fits(
        self, *, backbone: str, width: int, depth: int, schedule: str = "constant", reduction: str = "merge"
    ) -> None:
        """Checks that this compensator was made for that backbone, and for that way of removing tokens.

        Raises:
            InputError: If the name, width, depth, schedule family or reduction differs.
        """
        info = self.info
        for what, trained, asked in (("schedule", info.schedule, schedule), ("reduction", info.reduction, reduction)):
            if trained != asked:
                raise InputError(f"the compensator was trained for {what} {trained}, but {what} {asked} is asked for. "
                                 f"Give --{what} {trained}, or a compensator trained for {asked}.")  # fmt: skip
        if (info.width, info.depth) != (width, depth):
            raise InputError(f"the compensator was trained for width {info.width} and {info.depth} blocks, but "
                             f"{backbone} has width {width} and {depth} blocks.")  # fmt: skip
        if info.backbone is not None and info.backbone != backbone:
            raise InputError(f"the compensator was trained for backbone {info.backbone}, but the model is {backbone}. "
                             "Train one with `tocom distill` on this backbone.")  # fmt: skip


@dataclass(frozen=True)
class Compensation:
    """The change of one compensator from `source_degree` to `target_degree`, weighted by `delta_scale`.

    In training mode `dropout` drops low-rank activations of the unfused change.
    """

    compensator: Compensator
    source_degree: int
    target_degree: int
    delta_scale: float
    dropout: DropoutKey | None = None
    gate: Tensor = field(init=False, repr=False)
    _gates: dict[tuple[torch.device, torch.dtype], Tensor] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        groups = self.compensator.info.groups
        for name in ("source_degree", "target_degree"):
            degree = getattr(self, name)
            if not 0 <= degree <= groups:
                raise InputError(f"with a compensator the {name.replace('_', ' ')} must lie in 0..{groups}, the "
                                 f"degrees it was trained for, got {degree}.")  # fmt: skip
        gate = self._gate(self.target_degree) - self._gate(self.source_degree)
        object.__setattr__(self, "gate", gate)

    def _gate(self, degree: int) -> Tensor:
        """1 on the ranks of the last `degree` groups, 0 elsewhere; [G*k] (ToCom, section 3.3)."""
        info = self.compensator.info
        group = torch.arange(info.groups).repeat_interleave(info.rank)
        return (group >= info.groups - degree).double()

    def _scaled_gate(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Gate times delta scale, copied to a device once and not in every block."""
        if (device, dtype) not in self._gates:
            self._gates[device, dtype] = (self.delta_scale * self.gate).to(device, dtype)
        return self._gates[device, dtype]

    def _pair(self, block: int, which: str) -> tuple[Tensor, Tensor]:
        pair = self.compensator.blocks[block]["attn"][f"{which}_tocom"]
        return pair.adapter_down.weight, pair.adapter_up.weight

    def __call__(self, block: int, x: Tensor) -> Tensor:
        """What is added to the qkv output of a block, unfused (used in training).

        Args:
            block: Block index.
            x: Input of the block's qkv layer, [B, N, C].

        Returns:
            [B, N, 3C], zero on the keys.
        """
        gate = self._scaled_gate(x.device, x.dtype)

        def path(which: str) -> Tensor:
            down, up = self._pair(block, which)
            hidden = x @ down.to(x).T
            if self.dropout is not None and self.compensator.training:
                hidden = hidden * self.dropout.mask(hidden, block, which)
            return (hidden * gate) @ up.to(x).T

        return torch.cat([path("q"), torch.zeros_like(x), path("v")], dim=-1)

    def factors(self, block: int, which: str) -> tuple[Tensor, Tensor, Tensor]:
        """The change to a weight as factors, of which only the gate depends on degrees and scale.

        Args:
            block: Block index.
            which: "q" or "v".

        Returns:
            up [C, G*k], gate times delta scale [G*k], down [G*k, C], in the compensator's precision:
            `delta` is up . diag(gate) . down.
        """
        down, up = self._pair(block, which)
        return up.detach(), self._scaled_gate(up.device, up.dtype), down.detach()

    def delta(self, block: int, which: str) -> Tensor:
        """The change to a weight: scale * up . diag(gate(target) - gate(source)) . down, float64 [C, C].

        Args:
            block: Block index.
            which: "q" or "v".
        """
        down, up = self._pair(block, which)
        return self.delta_scale * (up.detach().double() * self.gate) @ down.detach().double()


def _shapes(info: CompensatorInfo) -> dict[str, tuple[int, int]]:
    """Names and shapes of a compensator's weights, known before memory is taken for them."""
    hidden = info.groups * info.rank
    sides = {"down": (hidden, info.width), "up": (info.width, hidden)}
    return {
        _KEY.format(block=block, which=which, side=side): shape
        for block in range(info.depth)
        for which in "qv"
        for side, shape in sides.items()
    }


def _info_from_metadata(metadata: Mapping[str, str], file: Path) -> CompensatorInfo:
    try:
        info = CompensatorInfo(**parse(metadata["info"]))
        sound = all(type(n) is int and 0 < n < 1 << 16 for n in (info.width, info.depth, info.rank, info.groups))
        sound = sound and isinstance(info.training_scale, float | int) and math.isfinite(info.training_scale)
        sound = sound and all(isinstance(name, str) for name in (info.schedule, info.reduction))
        sound = sound and isinstance(info.backbone, str | None)
    except (ValueError, TypeError, OverflowError):
        sound = False
    if not sound or metadata.get("format") != _FORMAT:
        described = f"{metadata.get('format')}: {metadata['info']}"
        raise InputError(f"the compensator's metadata does not describe one, got {described[:80]!r} in {file}.")
    return info


def _info_from_shapes(weights: Mapping[str, Tensor], file: Path) -> CompensatorInfo:
    # the original layout carries no metadata: depth, width and rank follow from names and shapes, G is 16
    first = weights.get(_KEY.format(block=0, which="q", side="down"))
    if first is None or first.ndim != 2 or first.shape[0] % GROUPS or not first.numel():
        shape = "none" if first is None else tuple(first.shape)
        raise InputError(f"the first compensator tensor must be [{GROUPS}*k, C], got {shape} in {file}.")
    depth = len({name.split(".")[1] for name in weights})
    return CompensatorInfo(width=first.shape[1], depth=depth, rank=first.shape[0] // GROUPS)
