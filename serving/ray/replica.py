"""One replica of a family under Ray Serve: a service with its engines in the replica's own process.

Ray restarts a replica that dies, so there are no engine processes below it. What is refused is a value, not an
exception: Ray would wrap exceptions in traces, and count them as faults.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve import metrics

from tocom.runtime.errors import InputError, one_line, readable
from tocom.serving.protocol.open_inference import metadata, read_input
from tocom.serving.protocol.open_inference_json import read_request, write_response
from tocom.serving.ray.local_cluster import keep_to_loopback
from tocom.serving.service.errors import BusyError, ServingError
from tocom.serving.service.options import ServeOptions
from tocom.serving.service.request import ANY_DEGREE, Answer, DegreeRequest
from tocom.serving.service.scratch import own_scratch
from tocom.serving.service.service import Service

_LOG = logging.getLogger("ray.serve")  # whose records Ray keeps with the replica's
_PAGE_THREADS = 8
_SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0]


class Tuning(BaseModel):
    """What can change while a replica runs; Ray's `user_config` of the deployment.

    Attributes:
        objective_ms: See `ServeOptions`.
        degree: Likewise.
        generation: Another value than before has the replica look whether there is another family in the folder.
    """

    model_config = ConfigDict(extra="forbid")

    objective_ms: float | None = None
    degree: int | None = None
    generation: int | str = 0


@dataclass(frozen=True)
class Reply:
    """An answered request.

    Attributes:
        content: Body of the response, JSON.
        degree: That answered.
    """

    content: bytes
    degree: int


@dataclass(frozen=True)
class Refusal:
    """A request that is not answered.

    Attributes:
        status: HTTP status that says so.
        message: One line.
        retry_after_s: When asking again may help, in seconds; None where that is not known.
    """

    status: int
    message: str
    retry_after_s: float | None = None


class FamilyReplica:
    """Answers requests with a family."""

    def __init__(self, folder: str, name: str, options: ServeOptions) -> None:
        """Remembers what to open; `reconfigure`, which Ray calls next, opens it.

        Args:
            folder: Of the family.
            name: Of the model.
            options: How it is served; `Tuning` replaces a part of them.
        """
        keep_to_loopback()
        self._scratch = own_scratch()  # Ray ends replicas that do not answer without asking, again and again if need be
        self._folder, self._name, self._options = folder, name, options
        self._service: Service | None = None
        self._stale: str | None = None
        self._finished, self._finished_at_check = 0, 0
        self._page = ThreadPoolExecutor(_PAGE_THREADS, "tocom-page")
        self._degree = metrics.Gauge("tocom_degree", "Degree in force for requests that leave it to the load.")
        self._queued = metrics.Gauge("tocom_queued_images", "Images that wait.")
        self._requests = metrics.Counter("tocom_requests", "Answered requests.", tag_keys=("degree",))
        self._refused = metrics.Counter("tocom_refused", "Requests that were not answered.", tag_keys=("reason",))
        self._batches = metrics.Histogram(
            "tocom_batch_seconds", "What the engine took for a batch.", boundaries=_SECONDS, tag_keys=("degree",)
        )

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Opens the family; later calls change the objective, or take over what lies in the folder now.

        What serves goes on until its successor has run every engine. If it cannot be opened, what serves stays, and
        says so in `describe` and in the log: an exception would have Ray end a replica that is well.

        Args:
            user_config: See `Tuning`.

        Raises:
            InputError: The family cannot be opened at first.
            OSError: It cannot be copied at first.
        """
        if self._service is None:
            options = self._tuned(user_config)
            self._service = await asyncio.to_thread(Service, self._folder, options, self._on_batch)
            return
        try:
            changed = await asyncio.to_thread(self._renew, user_config)
        except (ValueError, OSError, ServingError) as error:  # InputError and pydantic's are ValueErrors
            self._stale = readable(error)
            _LOG.warning(f"{one_line(self._folder)} cannot be served as asked, the old one goes on: {self._stale}")
        else:
            self._stale = None
            _LOG.info("reloaded" if changed else "asked to reload, but what is in the folder is what serves")

    def _tuned(self, user_config: dict[str, Any]) -> ServeOptions:
        tuning = Tuning.model_validate(user_config)
        return replace(self._options, objective_ms=tuning.objective_ms, degree=tuning.degree)

    def _renew(self, user_config: dict[str, Any]) -> bool:
        options, old = self._tuned(user_config), self._service
        if options == old.options:
            return old.reload()
        self._service = Service(self._folder, options, self._on_batch)
        old.close()
        return True

    async def infer(self, content: bytes) -> Reply | Refusal:
        """Answers a request of the Open Inference Protocol.

        Args:
            content: Body of the request, JSON.
        """
        return await self._told(lambda: self._infer(content))

    async def _infer(self, content: bytes) -> Reply:
        request = await asyncio.to_thread(read_request, content)

        def prepared() -> np.ndarray:
            images = read_input(request.inputs, self._service.family)
            return images if isinstance(images, np.ndarray) else self._service.prepare(images)

        answer = await self._answer(await asyncio.to_thread(prepared), request.degree_request)
        return Reply(await asyncio.to_thread(write_response, self._name, request.id, answer), answer.degree)

    async def _answer(self, pixel_values: np.ndarray, degree_request: DegreeRequest) -> Answer:
        while True:
            service = self._service
            try:
                return await asyncio.wrap_future(service.submit(pixel_values, degree_request))
            except BusyError:
                if service is self._service:
                    raise  # else it was closed between the two lines above: the new one takes it

    async def predict_image(
        self, content: bytes, degree_request: DegreeRequest, top_k: int
    ) -> dict[str, Any] | Refusal:
        """See `Service.predict_image`."""
        return await self._told(lambda: self._in_thread(self._service.predict_image, content, degree_request, top_k))

    async def merges(self, content: bytes, degree: int) -> dict[str, Any] | Refusal:
        """See `Service.merges`."""
        return await self._told(lambda: self._in_thread(self._service.merges, content, degree))

    async def describe(self) -> dict[str, Any]:
        """What `Service.describe` tells, and which replica it is; `stale` says why a reload was refused."""
        description = await asyncio.to_thread(self._service.describe)
        replica = serve.get_replica_context().replica_id.unique_id
        return description | {"replica": {"id": replica, "pid": os.getpid(), "stale": self._stale}}

    async def metadata(self) -> dict[str, Any]:
        """What the protocol tells of the model."""
        family = self._service.family
        degrees = [entry.degree for entry in family.engines]
        return {"name": self._name, "versions": [], **metadata(family), "parameters": {"degrees": degrees}}

    async def check_health(self) -> None:
        """Unless batches were finished since the last check, runs one: Ray replaces a replica on which that fails.

        Raises:
            RuntimeError: An engine fails, or the queue is full and does not move.
        """
        self._degree.set(self._service.degree)
        self._queued.set(self._service.queued)
        if self._finished == self._finished_at_check:
            zeros = np.zeros((1, *self._service.family.input.size), np.float32)
            try:
                await self._answer(zeros, ANY_DEGREE)
            except (InputError, ServingError) as error:
                raise RuntimeError(f"the replica does not answer: {error}") from error
        self._finished_at_check = self._finished

    async def _told(self, answer: Callable[[], Any]) -> Any:
        """What is answered, or why it is not."""
        try:
            reply = await answer()
        except InputError as error:
            return self._refuse("bad input", Refusal(400, readable(error)))
        except ServingError as error:
            seconds = error.retry_after_s if isinstance(error, BusyError) else None
            return self._refuse(type(error).__name__, Refusal(error.status, readable(error), seconds))
        degree = reply.degree if isinstance(reply, Reply) else reply.get("degree")
        self._requests.inc(tags={"degree": str(degree)})
        return reply

    def _refuse(self, reason: str, refusal: Refusal) -> Refusal:
        self._refused.inc(tags={"reason": reason})
        return refusal

    async def _in_thread(self, call: Callable[..., Any], *arguments: object) -> Any:
        """In threads of their own: these calls wait for their answer, and reading requests must not wait for them."""
        return await asyncio.get_running_loop().run_in_executor(self._page, call, *arguments)

    def _on_batch(self, degree: int, _images: int, seconds: float) -> None:
        self._finished += 1
        self._batches.observe(seconds, tags={"degree": str(degree)})
        if self._service is not None:
            self._degree.set(self._service.degree)
            self._queued.set(self._service.queued)

    def __del__(self) -> None:
        """Frees the engines; Ray calls this once nothing is being answered any more."""
        service, self._service = getattr(self, "_service", None), None
        if service is not None:
            service.close()
        if (scratch := getattr(self, "_scratch", None)) is not None:
            shutil.rmtree(scratch, ignore_errors=True)
