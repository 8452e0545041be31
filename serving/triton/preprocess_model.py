"""A model of Triton's Python backend: encoded images in, the network's input out, prepared as the family was trained.

Copied into a model repository as model.py, with the modules of `runtime` that it needs beside it: numpy, Pillow and
Python 3.11 or later are all that the server has to have.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))  # before any other package of that name

from tocom.runtime.checked_json import parse
from tocom.runtime.errors import InputError
from tocom.runtime.manifest import InputSpec
from tocom.runtime.preprocess import decode_image, preprocess


class TritonPythonModel:
    """What Triton's Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Reads how images are prepared, and prepares one, so that the first request finds everything loaded."""
        texts = {name: value["string_value"] for name, value in json.loads(args["model_config"])["parameters"].items()}
        self._spec = InputSpec.from_json(parse(texts["input"]))
        self._max_images, self._max_pixels = int(texts["max_images"]), int(texts["max_pixels"])
        preprocess(Image.new("RGB", (64, 48)), self._spec)

    def execute(self, requests: list) -> list:
        """Answers each request by itself: a broken image is an error of its own request only."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: pb_utils.InferenceRequest) -> pb_utils.InferenceResponse:
        contents = pb_utils.get_input_tensor_by_name(request, "image").as_numpy()
        try:
            if not 1 <= len(contents) <= self._max_images:
                raise InputError(f"image must hold 1 to {self._max_images} images, got {len(contents)}")
            pixels = np.stack([self._prepared(content) for content in contents])
        except InputError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
        return pb_utils.InferenceResponse([pb_utils.Tensor("pixel_values", pixels)])

    def _prepared(self, content: bytes) -> np.ndarray:
        return preprocess(decode_image(content, self._max_pixels), self._spec)
