"""Triton's openvino backend, as far as the tests need it: no operator of this project, the file read by its path."""

import json
from pathlib import Path

import numpy as np
import openvino
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        return config

    def initialize(self, args):
        config = json.loads(args["model_config"])
        file = Path(args["model_repository"], args["model_version"], config["default_model_filename"])
        properties = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        self.compiled = openvino.Core().compile_model(str(file), "CPU", properties)

    def execute(self, requests):
        responses = []
        for request in requests:  # one at a time, as where max_batch_size is 0
            pixels = pb_utils.get_input_tensor_by_name(request, "pixel_values").as_numpy()
            logits = np.ascontiguousarray(self.compiled({"pixel_values": pixels})["logits"])
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("logits", logits)]))
        return responses
