"""The Open Inference Protocol's JSON: a request's body read, a response's body written, without any server."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tocom.runtime.checked_json import Json, parse
from tocom.runtime.engines.base import OUTPUT_NAME
from tocom.runtime.errors import InputError, one_line
from tocom.serving.protocol.open_inference import Tensor, read_degree_request
from tocom.serving.service.request import Answer, DegreeRequest

_LONGEST_ID = 256


@dataclass(frozen=True)
class InferRequest:
    """A request for logits.

    Attributes:
        id: What the client calls it; None where it does not.
        inputs: As they came; `tocom.serving.protocol.open_inference.read_input` reads them.
        degree_request: What degree it asks for.
    """

    id: str | None
    inputs: tuple[Tensor, ...]
    degree_request: DegreeRequest


def read_request(content: bytes) -> InferRequest:
    """Reads a request's body.

    Args:
        content: JSON in UTF-8.

    Raises:
        InputError: It is no JSON, or not that of a request.
    """
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise InputError("a request's body must be JSON in UTF-8, got other bytes") from None
    try:
        node = Json(parse(text), "the request")
    except InputError as error:
        raise InputError(f"a request's body must be JSON: {error}") from None
    request_id = node.key_or("id", None).optional(Json.text)
    if request_id is not None and (len(request_id) > _LONGEST_ID or request_id != one_line(request_id)):
        raise InputError(f"id must be {_LONGEST_ID} printable characters at most")
    inputs = tuple(_tensor(item) for item in node.key("inputs").items())
    return InferRequest(request_id, inputs, read_degree_request(_parameters(node)))


def _tensor(node: Json) -> Tensor:
    content_type = _parameters(node).get("content_type")
    return Tensor(
        name=node.key("name").text(),
        datatype=node.key("datatype").text(),
        shape=node.key("shape").integers(),
        data=node.key("data").value,
        content_type=content_type if isinstance(content_type, str) else None,
    )


def _parameters(node: Json) -> dict[str, Any]:
    return node.key_or("parameters", {}).mapping(lambda item: item.value)


def write_response(name: str, request_id: str | None, answer: Answer) -> bytes:
    """A response's body; the numbers in it are read back as exactly the same float32.

    Args:
        name: Of the model.
        request_id: Of the request.
        answer: To it.
    """
    response = {
        "model_name": name,
        **({} if request_id is None else {"id": request_id}),
        "parameters": {
            "degree": answer.degree,
            "queue_ms": round(answer.queue_ms, 3),
            "engine_ms": round(answer.engine_ms, 3),
        },
        "outputs": [
            {
                "name": OUTPUT_NAME,
                "datatype": "FP32",
                "shape": list(answer.logits.shape),
                "data": answer.logits.ravel().tolist(),
            }
        ],
    }
    return json.dumps(response).encode()
