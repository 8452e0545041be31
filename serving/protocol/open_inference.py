"""The Open Inference Protocol's requests and responses, as far as a family needs them, without any server.

Inputs are `pixel_values` FP32 [n, 3, H, W], prepared, or `image` BYTES [n], encoded images. The parameters `degree`,
`min_degree`, `max_degree`, `budget_ms` and `min_accuracy` say what degree is asked for. The output is `logits` FP32
[n, classes]; the parameter `degree` of the response says which degree answered.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tocom.runtime.engines.base import INPUT_NAME, OUTPUT_NAME
from tocom.runtime.errors import InputError, one_line
from tocom.runtime.manifest import Family
from tocom.serving.service.request import DegreeRequest

IMAGE_NAME = "image"
_DEGREES, _SHARES = ("degree", "min_degree", "max_degree"), ("budget_ms", "min_accuracy")
_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{0,9})?")
_MOST_DIMENSIONS = 8


@dataclass(frozen=True)
class Tensor:
    """One input of a request, as it came.

    Attributes:
        name: Of the input.
        datatype: FP32, BYTES, ...
        shape: Its dimensions.
        data: Numbers, nested or flat; or bytes or text per element.
        content_type: "base64" where text stands for bytes; None otherwise.
    """

    name: str
    datatype: str
    shape: Sequence[int]
    data: Any
    content_type: str | None = None


def read_degree_request(parameters: Mapping[str, Any] | None) -> DegreeRequest:
    """Reads what a request says of the degree; other parameters are left to the server.

    Args:
        parameters: Of the request.

    Raises:
        InputError: A degree is not a whole number of 0 or more, or another not a number.
    """
    parameters = parameters or {}
    degrees = {name: _read_degree(name, parameters.get(name)) for name in _DEGREES}
    return DegreeRequest(**degrees, **{name: _read_number(name, parameters.get(name)) for name in _SHARES})


def _read_degree(name: str, value: object) -> int | None:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 6:
        value = int(value)  # parameters of some clients are text
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise InputError(f"the parameter {name} must be a whole number, 0 or more, got {_short(value)}")
    return value


def _read_number(name: str, value: object) -> float | None:
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)  # gRPC has no other way to say a fraction in every version of the protocol
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e9):
        raise InputError(f"the parameter {name} must be a number, 0 or more, got {_short(value)}")
    return value


def read_input(inputs: Sequence[Tensor], family: Family) -> np.ndarray | list[bytes]:
    """Reads the one input of a request.

    Args:
        inputs: Of the request.
        family: Whose network it is for.

    Returns:
        Prepared images, float32 [n, 3, H, W], or encoded ones.

    Raises:
        InputError: There is another number of inputs, or it has another name, type or shape than it must.
    """
    if len(inputs) != 1:
        raise InputError(f"a request must have one input, {INPUT_NAME} or {IMAGE_NAME}, got {len(inputs)}")
    tensor = inputs[0]
    if len(tensor.shape) > _MOST_DIMENSIONS or any(side < 0 for side in tensor.shape):
        raise InputError(f"the shape of {_short(tensor.name)} must be sides of 0 or more, got {_short(tensor.shape)}")
    if tensor.name == INPUT_NAME:
        return _pixels(tensor, family.input.size)
    if tensor.name == IMAGE_NAME:
        return _images(tensor)
    raise InputError(f"an input must be named {INPUT_NAME} or {IMAGE_NAME}, got {_short(tensor.name)}")


def _pixels(tensor: Tensor, size: tuple[int, int, int]) -> np.ndarray:
    rule = f"{INPUT_NAME} must be FP32 [n, {', '.join(map(str, size))}] with n of 1 or more"
    shape = tuple(tensor.shape)
    if tensor.datatype != "FP32" or len(shape) != 4 or shape[1:] != size or shape[0] < 1:
        raise InputError(f"{rule}, got {_short(tensor.datatype)} {_short(list(shape))}")
    try:
        with np.errstate(over="ignore"):  # what is too large becomes infinite, which is refused later
            pixels = np.asarray(tensor.data, np.float32)
    except (ValueError, TypeError, OverflowError):  # ragged lists, or not of numbers
        raise InputError(f"{rule}, got data that is no array of numbers") from None
    if pixels.size != math.prod(shape):
        raise InputError(f"{rule}, got {pixels.size} numbers for the shape {_short(list(shape))}")
    return np.ascontiguousarray(pixels.reshape(shape))


def _images(tensor: Tensor) -> list[bytes]:
    rule = f"{IMAGE_NAME} must be BYTES [n], one encoded image each, n of 1 or more"
    data = tensor.data
    if tensor.datatype != "BYTES" or len(tensor.shape) not in (1, 2) or not isinstance(data, (list, tuple)):
        raise InputError(f"{rule}, got {_short(tensor.datatype)} {_short(list(tensor.shape))}")
    if len(data) != math.prod(tensor.shape) or not data:
        raise InputError(f"{rule}, got {len(data)} elements for the shape {_short(list(tensor.shape))}")
    return [_bytes(element, tensor.content_type) for element in data]


def _bytes(element: object, content_type: str | None) -> bytes:
    if isinstance(element, bytes) and content_type != "base64":
        return element
    if not isinstance(element, (str, bytes)):
        raise InputError(f"an element of {IMAGE_NAME} must be bytes, in JSON as base64, got {type(element).__name__}")
    try:
        return base64.b64decode(element, validate=True)
    except (binascii.Error, ValueError):  # ValueError: text that is not ASCII
        raise InputError(f"an element of {IMAGE_NAME} must be base64 in JSON, got other text") from None


def metadata(family: Family) -> dict[str, Any]:
    """What the protocol tells of the model: its inputs and outputs, JSON-ready.

    Args:
        family: Whose network it is.
    """
    return {
        "platform": "tocom",
        "inputs": [
            {"name": INPUT_NAME, "datatype": "FP32", "shape": [-1, *family.input.size]},
            {"name": IMAGE_NAME, "datatype": "BYTES", "shape": [-1]},
        ],
        "outputs": [{"name": OUTPUT_NAME, "datatype": "FP32", "shape": [-1, family.classes]}],
    }


def _short(value: object) -> str:
    """A value from outside, fit for one line."""
    text = one_line(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
