"""A family as a model of MLServer: the Open Inference Protocol over HTTP and gRPC.

MLServer's own batching is left off: it joins requests before a degree is chosen, and requests may pin different ones.
The scheduler batches instead (`tocom.serving.service.scheduler`).
"""

from __future__ import annotations

import asyncio

import numpy as np
from mlserver import MLModel, ModelSettings
from mlserver.codecs import NumpyCodec
from mlserver.errors import MLServerError
from mlserver.types import InferenceRequest, InferenceResponse, MetadataModelResponse, MetadataTensor, Parameters

from tocom.runtime.engines.base import OUTPUT_NAME
from tocom.runtime.errors import InputError
from tocom.serving.mlserver.metrics import ServiceMetrics
from tocom.serving.protocol.open_inference import Tensor, metadata, read_degree_request, read_input
from tocom.serving.service.errors import ServingError
from tocom.serving.service.request import Answer
from tocom.serving.service.service import Service


class RefusedError(MLServerError):
    """A request that is not answered.

    Attributes:
        retry_after_s: When asking again may help, in seconds; None where that is not known.
    """

    def __init__(self, message: str, status: int, retry_after_s: float | None = None) -> None:
        super().__init__(message, status)
        self.retry_after_s = retry_after_s


class FamilyModel(MLModel):
    """Answers requests with the service that the server opened."""

    service: Service
    metrics: ServiceMetrics

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__(settings)

    async def load(self) -> bool:
        """Is ready at once: the service is open."""
        return True

    async def metadata(self) -> MetadataModelResponse:
        """Inputs and outputs of the network that serves."""
        description = metadata(self.service.family)
        return MetadataModelResponse(
            name=self.name,
            versions=[],
            platform=description["platform"],
            inputs=[MetadataTensor(**tensor) for tensor in description["inputs"]],
            outputs=[MetadataTensor(**tensor) for tensor in description["outputs"]],
        )

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Answers a request.

        Args:
            payload: See `tocom.serving.protocol.open_inference`.

        Raises:
            RefusedError: It is not answered; the status says why.
        """
        try:
            answer = await self._answer(payload)
        except InputError as error:
            self.metrics.refused("bad input")
            raise RefusedError(str(error), 400) from error
        except ServingError as error:
            raise RefusedError(str(error), error.status, error.retry_after_s) from error
        headers = {"ToCom-Degree": str(answer.degree)}
        return InferenceResponse(
            model_name=self.name,
            parameters=Parameters(
                degree=answer.degree,
                queue_ms=round(answer.queue_ms, 3),
                engine_ms=round(answer.engine_ms, 3),
                headers=headers,
            ),
            outputs=[NumpyCodec.encode_output(OUTPUT_NAME, answer.logits)],
        )

    async def _answer(self, payload: InferenceRequest) -> Answer:
        parameters = None if payload.parameters is None else payload.parameters.model_dump()
        degree_request = read_degree_request(parameters)
        pixel_values = await asyncio.to_thread(self._prepared, payload)
        return await asyncio.wrap_future(self.service.submit(pixel_values, degree_request))

    def _prepared(self, payload: InferenceRequest) -> np.ndarray:
        inputs = [
            Tensor(
                tensor.name,
                str(getattr(tensor.datatype, "value", tensor.datatype)),
                tensor.shape,
                getattr(tensor.data, "root", tensor.data),
                None if tensor.parameters is None else tensor.parameters.content_type,
            )
            for tensor in payload.inputs
        ]
        images = read_input(inputs, self.service.family)
        return images if isinstance(images, np.ndarray) else self.service.prepare(images)
