"""The page at the server's root, and the few addresses that it asks: routes for whatever serves HTTP.

    GET  /, /page/FILE                                         the page
    GET  /api/family                                           the family, and the state of its server
    POST /api/predict?degree=&min_degree=&max_degree=&top_k=   an encoded image -> its best classes
    POST /api/merges?degree=                                   an encoded image -> which patches merged, block by block

A body is read up to a limit, and only so many requests wait for an answer; what is refused gets a status and one line.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import anyio
import anyio.to_thread
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tocom.runtime.errors import InputError, one_line, readable
from tocom.serving.protocol.http_guard import retry_after
from tocom.serving.service.errors import BusyError, ServingError
from tocom.serving.service.request import DegreeRequest

MAX_IMAGE_BYTES = 10 << 20
TOP_K = 5
DEGREE_HEADER = "ToCom-Degree"

_PAGE = Path(__file__).resolve().parents[1] / "page"
_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "charts.js": "text/javascript; charset=utf-8",
    "picture.js": "text/javascript; charset=utf-8",
    "server.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
# Nothing but the page's own files runs or is asked for: a hostile name of a class stays text. Pictures are blobs.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_SAFE = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
_NUMBER, _LENGTH = re.compile(r"[0-9]{1,6}"), re.compile(r"[0-9]{1,20}")
_PREDICTIONS, _TRACES = 64, 8  # requests of the page that are being answered or wait for it
_TRACING = 1  # of these at the same time: one image after the other, since a tracer runs one

_Result = TypeVar("_Result")
_Endpoint = Callable[[Request], Awaitable[Response]]


class PageService(Protocol):
    """What the page asks; see `tocom.serving.service.service.Service`."""

    def predict_image(self, content: bytes, degree_request: DegreeRequest, top_k: int = 5) -> dict[str, Any]:
        """The best classes of an encoded image."""

    def merges(self, content: bytes, degree: int) -> dict[str, Any]:
        """Which patches of an encoded image are one token behind each block."""

    def describe(self) -> dict[str, Any]:
        """The family, and the state of its server."""


class _TooLargeError(Exception):
    pass


class _Waiting:
    """Runs blocking calls in threads: so many at the same time, and so many that wait."""

    def __init__(self, running: int, accepted: int) -> None:
        self._running, self._accepted, self._now = running, accepted, 0
        self._limiter: anyio.CapacityLimiter | None = None

    async def run(self, call: Callable[[], _Result]) -> _Result:
        """What a call returns.

        Args:
            call: It.

        Raises:
            BusyError: Too many are waiting.
        """
        if self._now >= self._accepted:
            raise BusyError(f"{self._now} requests of the page wait, which is the limit", retry_after_s=1)
        self._limiter = self._limiter or anyio.CapacityLimiter(self._running)  # made where an event loop runs
        self._now += 1
        try:
            return await anyio.to_thread.run_sync(call, limiter=self._limiter)
        finally:
            self._now -= 1


class _Api:
    """The page's questions."""

    def __init__(self, service: PageService, max_bytes: int) -> None:
        self._service, self._max_bytes = service, max_bytes
        self._predictions, self._traces = _Waiting(_PREDICTIONS, _PREDICTIONS), _Waiting(_TRACING, _TRACES)

    async def family(self, request: Request) -> Response:
        _numbers(request, ())
        return _json(await anyio.to_thread.run_sync(self._service.describe))

    async def predict(self, request: Request) -> Response:
        numbers = _numbers(request, ("degree", "min_degree", "max_degree", "top_k"))
        top_k = numbers.pop("top_k", TOP_K)
        if top_k < 1:
            raise InputError(f"top_k must be 1 or more, got {top_k}")
        degree_request, content = _degree_request(numbers), await self._body(request)
        answer = await self._predictions.run(lambda: self._service.predict_image(content, degree_request, top_k))
        return _json(answer, headers={DEGREE_HEADER: str(answer["degree"])})

    async def merges(self, request: Request) -> Response:
        numbers = _numbers(request, ("degree",))
        if "degree" not in numbers:
            raise InputError("merges are of one degree: ask for ?degree=8, for example")
        degree, content = numbers["degree"], await self._body(request)
        trace = await self._traces.run(lambda: self._service.merges(content, degree))
        return _json(trace, headers={DEGREE_HEADER: str(degree)})

    async def _body(self, request: Request) -> bytes:
        """A request's body; what a client says of its length is only believed where it is too much.

        Raises:
            InputError: There is none.
            _TooLargeError: It is longer than the limit, or said to be.
        """
        length = request.headers.get("content-length", "")
        if _LENGTH.fullmatch(length) and int(length) > self._max_bytes:
            raise _TooLargeError
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > self._max_bytes:
                raise _TooLargeError
        if not content:
            raise InputError("the body must be an image file (PNG, JPEG, ...), got nothing")
        return bytes(content)

    def told(self, endpoint: _Endpoint) -> _Endpoint:
        """An endpoint whose refusals are answers."""

        @functools.wraps(endpoint)
        async def answered(request: Request) -> Response:
            try:
                return await endpoint(request)
            except InputError as error:
                return _json({"error": readable(error)}, 400)
            except _TooLargeError:
                most = f"an image file must be {self._max_bytes} bytes at most: send a smaller one"
                return _json({"error": most}, 413, {"connection": "close"})  # nobody reads the rest
            except ServingError as error:
                seconds = getattr(error, "retry_after_s", None)
                headers = {} if seconds is None else {"retry-after": retry_after(seconds)}
                return _json({"error": readable(error)}, error.status, headers)
            except ClientDisconnect:
                return Response(status_code=400)  # which nobody gets

        return answered


def page_routes(service: PageService, max_bytes: int = MAX_IMAGE_BYTES) -> list[Route]:
    """Routes of the page.

    Args:
        service: Answers what it asks.
        max_bytes: Of an encoded image.
    """
    api = _Api(service, max_bytes)
    files = {name: ((_PAGE / name).read_bytes(), kind) for name, kind in _TYPES.items()}

    async def index(request: Request) -> Response:
        return _file(request, *files["index.html"])

    async def part(request: Request) -> Response:
        name = request.path_params["file"]
        if name not in files:
            return _json({"error": f"there is no page/{one_line(name)[:80]}"}, 404)
        return _file(request, *files[name])

    return [
        Route("/", index),
        Route("/page/{file}", part),
        Route("/api/family", api.told(api.family)),
        Route("/api/predict", api.told(api.predict), methods=["POST"]),
        Route("/api/merges", api.told(api.merges), methods=["POST"]),
    ]


def _file(request: Request, content: bytes, kind: str) -> Response:
    """A part of the page, which a browser keeps but asks about each time: a new server brings a new page."""
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**_SAFE, "content-security-policy": _POLICY, "cache-control": "no-cache", "etag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=kind)


def _json(content: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse(content, status, {**_SAFE, "cache-control": "no-store", **(headers or {})})


def _numbers(request: Request, names: Collection[str]) -> dict[str, int]:
    """The values of a query; an empty one counts as none.

    Raises:
        InputError: A name is not among the given ones or there twice, or a value is no whole number.
    """
    numbers: dict[str, int] = {}
    for name, value in request.query_params.multi_items():
        if name not in names:
            known = ", ".join(names) or "none"
            raise InputError(f"a query may have {known}, got {one_line(name)[:80]}")
        if name in numbers:
            raise InputError(f"{name} must be given once, got it twice")
        if value and not _NUMBER.fullmatch(value):
            raise InputError(f"{name} must be a whole number, 0 or more, got {one_line(value)[:80]}")
        if value:
            numbers[name] = int(value)
    return numbers


def _degree_request(numbers: Mapping[str, int]) -> DegreeRequest:
    request = DegreeRequest(**numbers)
    if request.degree is not None and (request.min_degree, request.max_degree) != (None, None):
        raise InputError("give a degree, or limits on it (min_degree, max_degree), not both")
    if request.min_degree is not None and request.max_degree is not None and request.min_degree > request.max_degree:
        raise InputError(f"min_degree must not be above max_degree, got {request.min_degree} and {request.max_degree}")
    return request
