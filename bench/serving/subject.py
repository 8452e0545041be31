"""What is asked, and what the right answers are: sheets with labels, and the logits of the local engine."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from bench.serving.accounts import REFUSED, RIGHT, UNCLEAR, WRONG, Judged, Record, Reply, clear_refusal
from tocom.runtime.errors import InputError, one_line
from tocom.runtime.predictor import load

MODEL = "digits"


@dataclass(frozen=True)
class Body:
    """A valid request."""

    sheets: tuple[int, ...]  # which ones it asks about
    want: Mapping[str, int]  # its parameters: degree, min_degree, max_degree
    route: str  # "grpc", "http", or "page" for /api/predict
    content: bytes  # as it is sent: a message of gRPC, or a whole request of HTTP


class Subject:
    """A family and labelled sheets.

    Attributes:
        folder: Of the family.
        sheets: Encoded.
        labels: int [sheets].
    """

    def __init__(self, folder: Path, images: Path) -> None:
        """Reads the sheets, whose folders are named by their classes."""
        files = sorted(images.rglob("*.png"))
        if not files or not all(file.parent.name.isdigit() for file in files):
            raise InputError(f"sheets must lie in folders named by their classes, got {one_line(images)}")
        self.folder = folder
        self.sheets = [file.read_bytes() for file in files]
        self.labels = np.array([int(file.parent.name) for file in files])

    @cached_property
    def expected(self) -> dict[int, np.ndarray]:
        """Logits of the local engine, float32 [sheets, classes], by degree."""
        from tocom.runtime.preprocess import decode_image, preprocess

        with load(self.folder, threads=1) as family:
            pixels = np.stack([preprocess(decode_image(sheet, 1 << 24), family.family.input) for sheet in self.sheets])
            return {
                degree: np.concatenate([family.infer(part, degree) for part in np.array_split(pixels, 32)])
                for degree in family.degrees
            }

    def batches(self, images: int) -> list[tuple[int, ...]]:
        """All sheets in groups of `images`, mixed, the rest left out."""
        mixed = np.random.default_rng(0).permutation(len(self.sheets))
        return [tuple(mixed[at : at + images].tolist()) for at in range(0, len(mixed) - images + 1, images)]

    def body(self, sheets: Sequence[int], route: str, want: Mapping[str, int] | None = None) -> Body:
        """Encodes a request; see `Body`. For "page" it is about one sheet."""
        contents = [self.sheets[sheet] for sheet in sheets]
        encode = {"grpc": grpc_message, "http": http_infer, "page": http_page}[route]
        return Body(tuple(sheets), dict(want or {}), route, encode(contents, want or {}))

    def judge(self, record: Record, body: Body, reply: Reply) -> Judged:
        """Compares an answer with the local engine's and with the labels."""
        outcome, correct = self._outcome(body, reply)
        took = 1e3 * (record.done_s - record.at_s)
        text = reply.text if reply.status != 200 else ""
        return Judged(record.at_s, took, outcome, len(body.sheets), correct, reply.degree, text)

    def _outcome(self, body: Body, reply: Reply) -> tuple[str, int]:
        if reply.status == 0:
            return "lost", 0
        if reply.status != 200:
            return (REFUSED if clear_refusal(reply, over_http=body.route != "grpc") else UNCLEAR), 0
        if reply.degree not in self.expected or not allows(body.want, reply.degree):
            return WRONG, 0
        rows = self.expected[reply.degree][list(body.sheets)]
        if reply.logits is not None:
            classes = reply.logits.argmax(1) if reply.logits.ndim == 2 else np.empty(0)
            right = reply.logits.shape == rows.shape and np.array_equal(reply.logits, rows)
        else:
            classes = np.array(reply.classes or ())
            right = np.array_equal(classes, rows.argmax(1))
        correct = int((classes == self.labels[list(body.sheets)]).sum()) if len(classes) == len(rows) else 0
        return (RIGHT if right else WRONG), correct


def allows(want: Mapping[str, int], degree: int) -> bool:
    """Whether a request's parameters allow a degree."""
    pinned = want.get("degree", degree) == degree
    return pinned and want.get("min_degree", degree) <= degree <= want.get("max_degree", degree)


def grpc_message(contents: Sequence[bytes], want: Mapping[str, int]) -> bytes:
    """ModelInfer with images, as another project's client writes it."""
    from tritonclient.grpc import service_pb2

    request = service_pb2.ModelInferRequest(model_name=MODEL)
    tensor = request.inputs.add(name="image", datatype="BYTES", shape=[len(contents)])
    tensor.contents.bytes_contents.extend(contents)
    for name, value in want.items():
        request.parameters[name].int64_param = value
    return request.SerializeToString()


def http_infer(contents: Sequence[bytes], want: Mapping[str, int]) -> bytes:
    """The same over HTTP: JSON, images in base64."""
    tensor = {
        "name": "image", "datatype": "BYTES", "shape": [len(contents)], "parameters": {"content_type": "base64"},
        "data": [base64.b64encode(content).decode() for content in contents],
    }  # fmt: skip
    body = json.dumps({"inputs": [tensor], "parameters": dict(want)}).encode()
    return http_request(f"/v2/models/{MODEL}/infer", body)


def http_page(contents: Sequence[bytes], want: Mapping[str, int]) -> bytes:
    """One image as the page sends it."""
    query = "&".join(f"{name}={value}" for name, value in want.items())
    return http_request(f"/api/predict?top_k=1&{query}", contents[0])


def http_request(path: str, body: bytes, method: str = "POST", headers: Sequence[str] = ()) -> bytes:
    """A request of HTTP, on a connection of its own."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", "Connection: close"]
    lines += headers
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
