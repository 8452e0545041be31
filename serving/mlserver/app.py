"""MLServer around one service: the protocol's HTTP and gRPC, the page, metrics, and a shutdown that loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import uvicorn
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from mlserver import MLServer, ModelSettings, Settings
from mlserver.errors import MLServerError
from mlserver.grpc import GRPCServer
from mlserver.grpc.dataplane_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from mlserver.grpc.interceptors import PromServerInterceptor
from mlserver.grpc.model_repository import ModelRepositoryServicer
from mlserver.grpc.model_repository_pb2_grpc import add_ModelRepositoryServiceServicer_to_server
from mlserver.grpc.servicers import InferenceServicer
from mlserver.grpc.utils import STATUS_CODE_MAPPING
from mlserver.handlers import ModelRepositoryHandlers
from mlserver.rest import RESTServer
from mlserver.types import RepositoryIndexRequest, RepositoryIndexResponse, RepositoryIndexResponseItem, State
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tocom.runtime.errors import InputError, one_line, readable
from tocom.serving.mlserver.grpc_guard import MessageGuard
from tocom.serving.mlserver.metrics import ServiceMetrics
from tocom.serving.mlserver.model import FamilyModel, RefusedError
from tocom.serving.protocol.http_guard import Guard, HttpLimits, guarded_protocol, retry_after
from tocom.serving.protocol.page_routes import page_routes
from tocom.serving.service.errors import ServingError
from tocom.serving.service.service import Service

_LOG = logging.getLogger("tocom.serving")
_GRACE_S = 30.0  # for what was accepted, when the server is told to end
_GRPC_STATUS = {
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    409: grpc.StatusCode.FAILED_PRECONDITION,
    503: grpc.StatusCode.UNAVAILABLE,
}


@dataclass(frozen=True)
class Addresses:
    """Where the server listens.

    Attributes:
        host: An address of this machine; the default is reached from this machine only.
        http_port: Of the protocol, the page and the metrics.
        grpc_port: Of the protocol.
    """

    host: str = "127.0.0.1"
    http_port: int = 8080
    grpc_port: int = 8081


@dataclass(frozen=True)
class ServerOptions:
    """How the server runs.

    Attributes:
        name: Of the model, in the protocol's paths.
        addresses: Where it listens.
        http: Bounds of HTTP; the size of a body is also that of a gRPC message.
        verbose: Whether to log every request.
    """

    name: str = "tocom"
    addresses: Addresses = field(default_factory=Addresses)
    http: HttpLimits = field(default_factory=HttpLimits)
    verbose: bool = False


def serve(service: Service, options: ServerOptions, metrics: ServiceMetrics) -> None:
    """Serves until the process is told to end (SIGINT or SIGTERM); answers what was accepted, then returns.

    Args:
        service: What answers; closed at the end.
        options: How.
        metrics: Told of every request.

    Raises:
        InputError: A port is taken or not allowed.
    """
    try:
        asyncio.run(_serve(service, options, metrics))
    finally:
        service.close()


async def _serve(service: Service, options: ServerOptions, metrics: ServiceMetrics) -> None:
    FamilyModel.service, FamilyModel.metrics = service, metrics
    metrics.watch(service)
    where = options.addresses
    settings = Settings(
        debug=options.verbose,
        host=where.host,
        http_port=where.http_port,
        grpc_port=where.grpc_port,
        grpc_max_message_length=options.http.max_body_bytes,
        parallel_workers=0,
        load_models_at_startup=False,
        model_repository_root="",
        server_name="tocom",
        gzip_enabled=False,
    )
    _quiet_logs()
    STATUS_CODE_MAPPING.update(_GRPC_STATUS)
    server = _FamilyServer(settings, service, options)
    await server.start([ModelSettings(name=options.name, implementation=FamilyModel)])
    if server.failed is not None:
        raise InputError(server.failed)


class _FamilyServer(MLServer):
    """MLServer with this project's page, limits and shutdown."""

    def __init__(self, settings: Settings, service: Service, options: ServerOptions) -> None:
        self._service, self._options = service, options
        self._stopping = False
        self.failed: str | None = None
        super().__init__(settings)
        self._metrics_server = None  # metrics are on the same port as everything else

    def _create_servers(self) -> None:
        self._model_repository_handlers = _Repository(self._service, self._options.name)
        self._rest_server = _Rest(self._settings, self._data_plane, self._model_repository_handlers,
                                  self._service, self._options)  # fmt: skip
        self._grpc_server = _Grpc(self._settings, self._data_plane, self._model_repository_handlers,
                                  self._options.name)  # fmt: skip
        self._kafka_server = None

    async def start(self, models_settings: list[ModelSettings] = []) -> None:  # noqa: B006  # as in the base class
        await asyncio.gather(*(self._model_registry.load(settings) for settings in models_settings))
        try:
            await asyncio.gather(self._rest_server.start(), self._grpc_server.start())
        except _TakenError as taken:
            self.failed = str(taken)
            await self.stop()

    async def stop(self, sig: int | None = None) -> None:
        """Takes nothing new, answers what was accepted, then ends."""
        if self._stopping:
            return
        self._stopping = True
        if sig is not None:
            _LOG.info("ending: answering what was accepted")
        # both at the same time: neither keeps on accepting while the other waits
        await asyncio.gather(self._rest_server.stop(sig), self._grpc_server.stop(sig))


class _TakenError(Exception):
    pass


class _Server(uvicorn.Server):
    """uvicorn without signal handlers of its own: MLServer's end both servers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Rest(RESTServer):
    def __init__(
        self, settings: Settings, data_plane: Any, repository: Any, service: Service, options: ServerOptions
    ) -> None:
        super().__init__(settings, data_plane, repository)
        self._options = options
        self._server: _Server | None = None
        routes = self._app.router.routes  # nothing is streamed here, and MLServer tells refusals of streams by a trace
        left_out = ("_stream", "/docs")  # and pages that have the browser ask other servers
        routes[:] = [route for route in routes if not getattr(route, "path", "").endswith(left_out)]
        routes.extend([*page_routes(service), Route("/metrics", _metrics)])
        self._app.add_exception_handler(MLServerError, _tell_error)
        self._app.add_exception_handler(RequestValidationError, _tell_invalid)
        self._app.add_exception_handler(InputError, _tell_bad_input)
        self._app.add_exception_handler(Exception, _tell_fault)

    async def start(self) -> None:
        self._server = _Server(self._get_config())
        try:
            await self._server.serve()
        except SystemExit:  # how uvicorn says that it cannot listen, after it has logged why
            host, port = self._settings.host, self._settings.http_port
            raise _TakenError(f"HTTP cannot listen on {host}:{port}: choose another --port or --host") from None

    def _get_config(self) -> uvicorn.Config:
        return uvicorn.Config(
            Guard(self._app, self._options.http),
            host=self._settings.host,
            port=self._settings.http_port,
            http=guarded_protocol(self._options.http),
            ws="none",
            lifespan="off",
            access_log=self._options.verbose,
            log_config=None,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=int(_GRACE_S),
            backlog=self._options.http.max_connections,
        )

    async def stop(self, sig: int | None = None) -> None:
        if self._server is not None:
            self._server.handle_exit(sig or signal.SIGINT, None)


class _Grpc(GRPCServer):
    def __init__(self, settings: Settings, data_plane: Any, repository: Any, name: str) -> None:
        super().__init__(settings, data_plane, repository)
        self._guard = MessageGuard(name)

    def _create_server(self) -> None:  # as in the base class, which takes no interceptor from outside
        self._server = grpc.aio.server(interceptors=[self._guard, PromServerInterceptor()],
                                       options=self._get_options())  # fmt: skip
        servicer = InferenceServicer(self._data_plane, self._model_repository_handlers)
        add_GRPCInferenceServiceServicer_to_server(servicer, self._server)
        repository = ModelRepositoryServicer(self._model_repository_handlers)
        add_ModelRepositoryServiceServicer_to_server(repository, self._server)
        self._server.add_insecure_port(f"{self._settings.host}:{self._settings.grpc_port}")

    async def start(self) -> None:
        try:
            self._create_server()
        except RuntimeError:  # how grpc says that it cannot listen
            host, port = self._settings.host, self._settings.grpc_port
            raise _TakenError(f"gRPC cannot listen on {host}:{port}: choose another --grpc-port or --host") from None
        await self._server.start()
        await self._server.wait_for_termination()

    async def stop(self, sig: int | None = None) -> None:  # noqa: ARG002  # as in the base class
        if hasattr(self, "_server"):
            await self._server.stop(grace=_GRACE_S)


class _Repository(ModelRepositoryHandlers):
    """One model, always loaded; loading it again is the service's reload."""

    def __init__(self, service: Service, name: str) -> None:
        self._service, self._name = service, name

    async def index(self, payload: RepositoryIndexRequest) -> RepositoryIndexResponse:  # noqa: ARG002
        item = RepositoryIndexResponseItem(name=self._name, state=State.READY, reason="")
        return RepositoryIndexResponse(root=[item])

    async def load(self, name: str) -> bool:
        self._require(name)
        try:
            changed = await asyncio.to_thread(self._service.reload)
        except (InputError, ServingError) as error:
            raise RefusedError(f"the family on disk cannot be served, the old one goes on: {error}", 409) from error
        except OSError as error:
            reason = f"the family on disk cannot be copied, the old one goes on: {one_line(error.strerror or error)}"
            raise RefusedError(reason, 503) from error
        _LOG.info("reloaded" if changed else "asked to reload, but the family on disk is the one that serves")
        return True

    async def unload(self, name: str) -> bool:
        self._require(name)
        raise RefusedError("this server serves one family for as long as it runs: end the server", 403)

    def _require(self, name: str) -> None:
        if name != self._name:
            raise RefusedError(f"there is no model {readable(name)[:80]}, only {self._name}", 404)


async def _metrics(request: Request) -> Response:  # noqa: ARG001
    return Response(generate_latest(), headers={"content-type": CONTENT_TYPE_LATEST})


async def _tell_error(request: Request, error: Exception) -> Response:  # noqa: ARG001
    status = getattr(error, "status_code", 500)
    seconds = getattr(error, "retry_after_s", None)
    headers = None if seconds is None else {"retry-after": retry_after(seconds)}
    return JSONResponse({"error": readable(error)}, status, headers)


async def _tell_invalid(request: Request, error: Exception) -> Response:  # noqa: ARG001
    first = error.errors()[0] if isinstance(error, RequestValidationError) and error.errors() else {}
    place = ".".join(map(str, first.get("loc", ("body",))))
    return JSONResponse({"error": f"{place}: {readable(first.get('msg', 'cannot be read'))}"}, 400)


async def _tell_bad_input(request: Request, error: Exception) -> Response:  # noqa: ARG001
    return JSONResponse({"error": readable(error)}, 400)


async def _tell_fault(request: Request, error: Exception) -> Response:  # noqa: ARG001
    return JSONResponse({"error": f"a fault of the server: {type(error).__name__}"}, 500)


class _OneLine(logging.Filter):
    """Leaves out the traces of refused requests: their clients were told."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], MLServerError))


def _quiet_logs() -> None:
    warnings.filterwarnings("ignore", module="PIL")  # remarks on images that clients send
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
    for name in ("tocom.serving", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
    logging.getLogger("tocom.serving").setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    for name in ("mlserver", "mlserver.grpc", "mlserver.rest"):
        logging.getLogger(name).addFilter(_OneLine())
