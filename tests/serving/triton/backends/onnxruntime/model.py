"""Triton's onnxruntime backend, as far as the tests need it: a Python-based backend that reads the same repository.

While there is a file `hold` in a model's folder it begins calls, says so, and goes no further.
"""

import json
import time
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        return config

    def initialize(self, args):
        config = json.loads(args["model_config"])
        file = Path(args["model_repository"], args["model_version"], config["default_model_filename"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.name, self.hold = args["model_name"], Path(args["model_repository"], "hold")
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        given = [pb_utils.get_input_tensor_by_name(request, "pixel_values").as_numpy() for request in requests]
        sizes = [len(pixels) for pixels in given]
        pb_utils.Logger.log_info(f"{self.name} runs {sum(sizes)} images")
        while self.hold.exists():
            time.sleep(0.01)
        logits = self.session.run(["logits"], {"pixel_values": np.concatenate(given)})[0]
        parts = np.split(logits, np.cumsum(sizes)[:-1])
        return [pb_utils.InferenceResponse([pb_utils.Tensor("logits", part)]) for part in parts]
