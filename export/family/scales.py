"""Which delta scale every degree runs at: chosen on labelled images, and found again when the family is compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch.func import functional_call

from tocom.calib.scale_choice import PAPER_SCALES, Classifier, Search, choose_scales
from tocom.calib.scales_file import ChosenFor, ScaleChoices
from tocom.export.family.lock import locked
from tocom.export.source.load import Source, load_source
from tocom.export.source.options import CompileOptions
from tocom.runtime.errors import InputError
from tocom.runtime.family_files import MANIFEST, SCALES
from tocom.runtime.manifest import Family
from tocom.vit import ReducedViT

Progress = Callable[[int, int, int], None]
"""(degree, images done, of how many); each image counts once per degree and scale."""


def _silent(_degree: int, _done: int, _total: int) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class ChosenScales:
    """What choosing left behind.

    Attributes:
        choices: As in scales.json now.
        degrees: The degrees asked for that have a choice.
        images: How many images it was made on.
    """

    choices: ScaleChoices
    degrees: tuple[int, ...]
    images: int


def choose_family_scales(
    options: CompileOptions,
    scales: tuple[float, ...] = (),
    batch: int = 32,
    on_progress: Progress = _silent,
) -> ChosenScales:
    """Chooses the scale of every degree on the options' images and writes scales.json into the family's folder.

    Args:
        options: As for a compile; `images` must be labelled, `replace` overwrites another network's choices.
        scales: Scales to try besides the paper's.
        batch: Images per forward pass.
        on_progress: Told as images are done.

    Returns:
        The choices; degrees equal to the source degree have none, since nothing is compensated there.

    Raises:
        InputError: If something given cannot be used; nothing is written then.
        OSError: If an image or the folder cannot be used; degrees that are finished stay so.
    """
    inputs = load_source(options)
    if inputs.compensator is None or inputs.images is None:
        raise InputError("choosing a scale needs a compensator and labelled images: give --compensator and --images.")
    training_scale = inputs.compensator.info.training_scale
    search = Search(inputs.images, (*PAPER_SCALES, *scales), training_scale, batch)
    _ensure_not_reported(inputs)
    known = _known(inputs)
    degrees = tuple(sorted({*options.degrees} - {options.source_degree}))
    if not degrees:
        return ChosenScales(known, (), len(search.images))
    done, total = 0, len(degrees) * (1 + len(search.scales)) * len(search.images)

    def progress(degree: int, further: int) -> None:
        nonlocal done
        done += further
        on_progress(degree, done, total)

    with locked(options.out):
        choices = choose_scales(search, degrees, _classifier_at(inputs), _known(inputs), options.out, progress)
    return ChosenScales(choices, degrees, len(search.images))


def at_chosen_scales(inputs: Source) -> Source:
    """The same inputs with the scales that were chosen for them, where the options name none.

    Raises:
        InputError: If scales.json is broken, was made for another network, or its images are to be reported on.
    """
    if inputs.compensator is None or inputs.options.delta_scale is not None:
        return inputs
    choices = ScaleChoices.read(inputs.options.out)
    if choices is None:
        return inputs
    different = choices.made_for.differences(_made_for(inputs))
    if different:
        raise InputError(f"the scales in {inputs.options.out / SCALES} were chosen for {different}. Choose again "
                         "with `tocom choose-scale --replace`, or give --scale.")  # fmt: skip
    compensated = (degree for degree in inputs.schedules if degree != inputs.options.source_degree)
    chosen = {degree: choices.degrees[degree].scale for degree in compensated if degree in choices.degrees}
    _ensure_held_out(inputs, choices.images_of(chosen))
    return replace(inputs, scales={**inputs.scales, **chosen})


def _made_for(inputs: Source) -> ChosenFor:
    return ChosenFor(
        checkpoint_sha256=inputs.loaded.checkpoint_sha256,
        compensator_sha256=inputs.compensator_sha256,
        source_degree=inputs.options.source_degree,
        schedule=inputs.family.schedule,
        reduction=inputs.family.reduction,
        input=inputs.family.input,
    )


def _known(inputs: Source) -> ScaleChoices:
    """The choices to go on from.

    Raises:
        InputError: If those in the folder are broken or another network's, and are not to be replaced.
    """
    options, made_for = inputs.options, _made_for(inputs)
    nothing = ScaleChoices(made_for, {}, {})
    try:
        known = ScaleChoices.read(options.out) or nothing
    except InputError:
        if not options.replace:
            raise
        return nothing
    different = known.made_for.differences(made_for)
    if different and not options.replace:
        raise InputError(f"{options.out / SCALES} holds scales chosen for {different}. Choose another --out, or "
                         "--replace it.")  # fmt: skip
    return nothing if different else known


def _classifier_at(inputs: Source) -> Callable[[int, float], Classifier]:
    def at(degree: int, scale: float) -> Classifier:
        reference = ReducedViT(inputs.loaded.model, inputs.schedules[degree], reduction=inputs.reduction)
        fused = {f"model.{name}": tensor for name, tensor in inputs.fused(degree, scale).weights.items()}
        return lambda pixels: functional_call(reference, fused, (pixels,))  # no copy of what does not change

    return at


def _ensure_not_reported(inputs: Source) -> None:
    """Checks that the folder's family reports no top-1 on this very selection, as far as names and sizes tell.

    Raises:
        InputError: If it does.
    """
    options = inputs.options
    if not (options.out / MANIFEST).exists():
        return
    for entry in Family.read(options.out).engines:
        if entry.validation.get("labelled_images") == inputs.images.fingerprint:
            raise InputError(f"a scale must not be chosen on the images that are reported on, got {options.images}, on "
                             f"which {options.out / MANIFEST} reports degree {entry.degree}: give others with "
                             "--images.")  # fmt: skip


def _ensure_held_out(inputs: Source, chosen_on: frozenset[str]) -> None:
    """Checks that top-1 is measured on images that no scale was chosen on.

    Raises:
        InputError: If one was.
    """
    images = inputs.images
    if not chosen_on or images is None or images.labels is None:
        return
    shared = sum(image in chosen_on for image in images.content_hashes())
    if shared:
        raise InputError(f"{shared} of the {len(images)} images to report on were used to choose the scales in "
                         f"{inputs.options.out / SCALES}: report on others, or give --scale.")  # fmt: skip
