"""Images -> how the products of a network are quantized, at one degree or at all.

Ranges are looked at at several degrees together, so that one calibration serves a whole family: what is folded into
norms and weights is then the same at every degree, and codes that degrees have in common are stored once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from tocom.calib.quantize.grids import FORMATS, Format
from tocom.calib.quantize.method import Method
from tocom.calib.quantize.migrations import Migration, migrate
from tocom.calib.quantize.network import (
    Observation,
    Quantization,
    QuantizedWeight,
    observe,
    products_of,
    round_to_nearest,
)
from tocom.calib.quantize.ranges import scale_of
from tocom.reduction import MERGE, Reduction
from tocom.runtime.errors import InputError
from tocom.schedule import MergeSchedule
from tocom.vit import ReducedViT

OBSERVED = (0, 8, 16)  # degrees that are looked at for a calibration that all degrees share


@dataclass(frozen=True)
class Calibration:
    """What was learned from images.

    Attributes:
        method: How.
        activations: Product -> scale of its input; empty for formats that leave inputs in float.
        migrations: Product -> the change of its input that the float network is given before.
        rows: Product -> inputs [rows, in], rounded as the product sees them, for second-order rounding; empty without.
    """

    method: Method
    activations: Mapping[str, float]
    migrations: Mapping[str, Migration]
    rows: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def format(self) -> Format:
        """The number format."""
        return FORMATS[self.method.format]

    def quantization(self, model: nn.Module) -> Quantization:
        """How a model's products are quantized: of any degree that the calibration is for.

        Args:
            model: The float timm model, with the weights of the degree; untouched.
        """
        model = copy.deepcopy(model).requires_grad_(False)
        migrate(model, self.migrations)
        weights = {name: self._rounded(name, product.weight) for name, product in products_of(model).items()}
        return Quantization(self.format, dict(model.state_dict()), dict(self.activations), weights)

    def _rounded(self, name: str, weight: Tensor) -> QuantizedWeight:
        grid = self.format.weight
        if self.method.rounding == "nearest":
            return round_to_nearest(weight, grid)
        from tocom.calib.quantize.rounding import gptq, quantease

        rounded = gptq(weight, self.rows[name], grid)
        if self.method.rounding == "gptq":
            return rounded
        # from plain rounding it stops in a local optimum that is worse than GPTQ's
        return quantease(weight, self.rows[name], grid, start=rounded)


def calibrate(networks: Sequence[ReducedViT], pixels: Tensor, method: Method) -> Calibration:
    """Looks at what goes into the products of networks.

    Args:
        networks: Float references of the degrees that are looked at; the first one's weights decide what moves.
        pixels: Normalized images, float32 [B, 3, H, W].
        method: What is done.

    Raises:
        InputError: If an image makes a number that is not finite.
    """
    seen = observe(networks, lambda network: products_of(network.model), pixels)
    for name, observation in seen.items():
        if not observation.largest.isfinite().all():
            raise InputError(f"calibration images must make finite numbers, what goes into {name} is not: one of them, "
                             "or a weight, holds NaN or infinity.")  # fmt: skip
    form = FORMATS[method.format]
    migrations: dict[str, Migration] = {}
    model = copy.deepcopy(networks[0].model).requires_grad_(False)
    for step in _migrating(method, form):
        changes = step(model, seen)
        migrate(model, changes)
        seen = {
            name: observation.changed(changes[name].factor, changes[name].shift) if name in changes else observation
            for name, observation in seen.items()
        }
        migrations = _composed(migrations, changes)
    scales: dict[str, float] = {}
    if form.activation is not None:
        scales = {name: scale_of(observation, form.activation, method.range) for name, observation in seen.items()}
    rows: dict[str, Tensor] = {}
    if method.rounding != "nearest":
        rows = {name: _as_seen(observation.rows, scales.get(name), form) for name, observation in seen.items()}
    return Calibration(method, scales, migrations, rows)


def quantize(
    model: nn.Module,
    schedule: MergeSchedule,
    calibration: Calibration,
    pixels: Tensor,
    reduction: Reduction = MERGE,
    tell: Callable[[int, int], None] | None = None,
) -> Quantization:
    """How one degree is quantized, reconstruction included.

    Args:
        model: The float timm model, with the weights of the degree.
        schedule: Of the degree.
        calibration: For it.
        pixels: The calibration images, which only reconstruction looks at.
        reduction: How tokens are removed.
        tell: (steps done, steps) of a reconstruction.
    """
    quantization = calibration.quantization(model)
    if not calibration.method.reconstruct:
        return quantization
    from tocom.calib.quantize.reconstruct import reconstruct

    changed = copy.deepcopy(model)
    changed.load_state_dict(dict(quantization.state))
    return reconstruct(changed, schedule, quantization, pixels, reduction=reduction, tell=tell)


def _migrating(
    method: Method, form: Format
) -> list[Callable[[nn.Module, Mapping[str, Observation]], dict[str, Migration]]]:
    """The steps that change the float network, in order.

    What they search, they search by minmax ranges, whatever range is chosen in the end: the others take long to find.
    """
    steps = []
    if method.reparameterize:
        from tocom.calib.quantize.reparameterize import reparameterize

        steps.append(reparameterize)
    if method.smooth:
        from tocom.calib.quantize.smooth import smooth

        steps.append(lambda model, seen: smooth(model, seen, form))
    if method.widen:
        from tocom.calib.quantize.smooth import widen

        steps.append(lambda model, seen: widen(model, seen, form))
    return steps


def _composed(first: Mapping[str, Migration], then: Mapping[str, Migration]) -> dict[str, Migration]:
    """One change in place of two: ((x - s) / f - t) / g = (x - (s + f t)) / (f g)."""
    both = dict(first)
    for name, after in then.items():
        before = first.get(name)
        if before is None:
            both[name] = after
            continue
        shifts = [] if before.shift is None else [before.shift]
        shifts += [] if after.shift is None else [before.factor * after.shift]
        both[name] = Migration(before.factor * after.factor, sum(shifts) if shifts else None)
    return both


def _as_seen(rows: Tensor, scale: float | None, form: Format) -> Tensor:
    return rows if scale is None else form.activation.nearest(rows / scale) * scale
