"""What HTTP reaches under Ray Serve: hands requests to replicas of the family, and asks another one when one dies.

A batch has no side effects, so a request whose replica died is simply asked again. Only when several die on it the
client is told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import anyio.from_thread
from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from tocom.runtime.errors import InputError, readable
from tocom.serving.protocol.http_guard import Guard, HttpLimits, refuse, retry_after
from tocom.serving.protocol.open_inference_json import read_request
from tocom.serving.protocol.page_routes import DEGREE_HEADER, page_routes
from tocom.serving.ray.local_cluster import keep_to_loopback
from tocom.serving.ray.replica import Refusal
from tocom.serving.service.errors import BusyError, ServingError, WorkerDiedError
from tocom.serving.service.request import DegreeRequest

_TRIES = 3  # replicas that may die on one request
_PAUSE_S = 0.2  # between them: Ray takes a moment to notice
_READY_S = 5.0


@dataclass(frozen=True)
class IngressOptions:
    """How requests are taken.

    Attributes:
        name: Of the model, in the protocol's paths.
        limits: Of HTTP; connections are counted by Ray's proxy, not here.
        answer_s: After so long a request is refused, in seconds, also where no replica is up.
        version: Of this software, in the protocol's metadata.
    """

    name: str
    limits: HttpLimits
    answer_s: float
    version: str


class _RefusedError(ServingError):
    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.status = refusal.status
        self.retry_after_s = refusal.retry_after_s


class FamilyIngress:
    """HTTP in front of one deployment of a family, or of several that each answer at a degree of their own."""

    def __init__(self, options: IngressOptions, handles: Mapping[int, DeploymentHandle]) -> None:
        """Begins at once.

        Args:
            options: See there.
            handles: Degree -> the deployment that answers at it where a request does not say otherwise; where there is
                one only, its degree does not matter.
        """
        keep_to_loopback()
        self._options, self._handles = options, dict(sorted(handles.items()))
        self._first = next(iter(self._handles.values()))
        self._running, self._draining = 0, False
        model = f"/v2/models/{options.name}"
        routes = [
            Route("/v2", self._server),
            Route("/v2/health/live", self._live),
            Route("/v2/health/ready", self._ready),
            Route(model, self._metadata),
            Route(f"{model}/ready", self._ready),
            Route(f"{model}/infer", self._infer, methods=["POST"]),
            *page_routes(_Page(self), options.limits.max_body_bytes),
        ]
        errors = {InputError: _bad_input, ServingError: _not_answered, HTTPException: _no_page, Exception: _fault,
                  ClientDisconnect: _gone}  # fmt: skip
        self._app = Guard(Starlette(routes=routes, exception_handlers=errors), options.limits)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Takes no more requests, or takes them again; returns once those that were accepted are answered.

        To be called before the application is removed: Ray ends all deployments of an application at the same time,
        and what the ingress has not passed on by then would wait for replicas that are gone.

        Args:
            user_config: {"draining": whether no more are taken}.
        """
        self._draining = user_config["draining"]
        until = asyncio.get_running_loop().time() + self._options.answer_s
        while self._draining and self._running and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0.05)

    async def answer(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers a request.

        Args:
            scope: Of ASGI.
            receive: Likewise.
            send: Likewise.
        """
        if self._draining:
            await refuse(send, 503, "the server is shutting down", retry_after_s=1)
            return
        self._running += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._running -= 1

    def handle(self, degree_request: DegreeRequest) -> DeploymentHandle:
        """The deployment for a request: that of the first degree which the request allows.

        Every replica has the engines of all degrees: a request that allows none of these is answered by the first.
        """
        allowed = (handle for degree, handle in self._handles.items() if degree_request.allows(degree))
        return next(allowed, self._first)

    async def ask(self, handle: DeploymentHandle, method: str, *arguments: object) -> Any:
        """What a replica answers.

        Args:
            handle: Of its deployment.
            method: Of `FamilyReplica`.
            arguments: To the method.

        Raises:
            InputError: What is asked for cannot be answered.
            BusyError: No replica answers in time.
            ServingError: It could be answered, but is not.
        """
        try:
            async with asyncio.timeout(self._options.answer_s):
                answer = await _ask(getattr(handle, method), *arguments)
        except TimeoutError:
            raise BusyError(f"no replica answered within {self._options.answer_s:g} s", retry_after_s=5) from None
        if isinstance(answer, Refusal):
            raise InputError(answer.message) if answer.status == 400 else _RefusedError(answer)
        return answer

    async def _infer(self, request: Request) -> Response:
        content = await request.body()
        degree_request = DegreeRequest()
        if len(self._handles) > 1:
            degree_request = (await asyncio.to_thread(read_request, content)).degree_request
        reply = await self.ask(self.handle(degree_request), "infer", content)
        return Response(reply.content, 200, {DEGREE_HEADER: str(reply.degree)}, "application/json")

    async def _metadata(self, request: Request) -> Response:  # noqa: ARG002
        return JSONResponse(await self.ask(self._first, "metadata"))

    async def _server(self, request: Request) -> Response:  # noqa: ARG002
        return JSONResponse({"name": "tocom", "version": self._options.version, "extensions": []})

    async def _live(self, request: Request) -> Response:  # noqa: ARG002
        return JSONResponse({"live": True})

    async def _ready(self, request: Request) -> Response:  # noqa: ARG002
        """Ready is who can answer: some replica of every deployment."""
        try:
            async with asyncio.timeout(_READY_S):
                for handle in self._handles.values():
                    await self.ask(handle, "metadata")
        except (TimeoutError, ServingError):
            return JSONResponse({"ready": False}, 503, {"retry-after": "5"})
        return JSONResponse({"ready": True})


async def _ask(method: Any, *arguments: object) -> Any:
    """Asks replicas until one does not die.

    Raises:
        BusyError: The queue is full, or the request cannot be passed on.
        WorkerDiedError: Too many replicas died.
        RayTaskError: A fault in the code of the replica.
    """
    for attempt in range(_TRIES):
        try:
            return await method.remote(*arguments)
        except BackPressureError:
            raise BusyError("as many requests wait for a replica as may", retry_after_s=1) from None
        except DeploymentUnavailableError:
            raise BusyError("the deployment does not run", retry_after_s=5) from None
        except RayTaskError:
            raise  # a fault of the code there
        except RayActorError:
            await asyncio.sleep(_PAUSE_S * (attempt + 1))
        except RayError as error:  # no room for a large request, for example
            raise BusyError(f"Ray cannot pass the request on: {type(error).__name__}", retry_after_s=1) from error
    raise WorkerDiedError(f"{_TRIES} replicas died on the request")


class _Page:
    """What `tocom.serving.protocol.page_routes` asks a service, asked of replicas; called in threads, which wait."""

    def __init__(self, ingress: FamilyIngress) -> None:
        self._ingress = ingress

    def predict_image(self, content: bytes, degree_request: DegreeRequest, top_k: int = 5) -> dict[str, Any]:
        return self._ask(degree_request, "predict_image", content, degree_request, top_k)

    def merges(self, content: bytes, degree: int) -> dict[str, Any]:
        return self._ask(DegreeRequest(degree), "merges", content, degree)

    def describe(self) -> dict[str, Any]:
        return self._ask(DegreeRequest(), "describe")

    def _ask(self, degree_request: DegreeRequest, method: str, *arguments: object) -> dict[str, Any]:
        return anyio.from_thread.run(self._ingress.ask, self._ingress.handle(degree_request), method, *arguments)


class _ToIngress:
    """Hands requests to the ingress replica in whose process they arrive."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await serve.get_replica_context().servable_object.answer(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1003})


def to_ingress() -> Starlette:
    """What `serve.ingress` takes: it wants an application when the class is declared, before there is a replica."""
    return Starlette(routes=[Mount("/", _ToIngress())])


async def _bad_input(request: Request, error: Exception) -> Response:  # noqa: ARG001
    return JSONResponse({"error": readable(error)}, 400)


async def _not_answered(request: Request, error: Exception) -> Response:  # noqa: ARG001
    seconds = getattr(error, "retry_after_s", None)
    if seconds is None and isinstance(error, WorkerDiedError):
        seconds = 1
    headers = None if seconds is None else {"retry-after": retry_after(seconds)}
    return JSONResponse({"error": readable(error)}, getattr(error, "status", 500), headers)


async def _no_page(request: Request, error: Exception) -> Response:  # noqa: ARG001
    status = getattr(error, "status_code", 500)
    return JSONResponse({"error": readable(getattr(error, "detail", error))}, status, getattr(error, "headers", None))


async def _gone(request: Request, error: Exception) -> Response:  # noqa: ARG001
    return Response(status_code=400)  # which nobody gets


async def _fault(request: Request, error: Exception) -> Response:  # noqa: ARG001
    return JSONResponse({"error": f"a fault of the server: {type(error).__name__}"}, 500)
