"""A tiny family in one folder, and a real server around it on loopback."""

from __future__ import annotations

import contextlib
import io
import shutil
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import uvicorn
from PIL import Image
from starlette.applications import Starlette

from tests.waiting import SAFETY_S, eventually
from tocom.export.artifacts import Engine
from tocom.runtime.degrees.local_latency import this_machine
from tocom.runtime.files import sha256_file
from tocom.runtime.manifest import EngineEntry, Family, InputSpec
from tocom.serving.protocol.page_routes import page_routes
from tocom.serving.service.options import Limits, ServeOptions
from tocom.serving.service.service import Service

MAX_BATCH = 8
DEGREES = {0: (4.0, 0.90), 8: (3.0, 0.89), 16: (2.0, 0.85)}  # degree -> ms and top-1 that its manifest claims


@pytest.fixture(scope="session")
def tiny_family(exported: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeiT in miniature at degrees 0, 8 and 16, with times as if they were measured here."""
    folder = tmp_path_factory.mktemp("tiny-family")
    entries = []
    for degree, (ms, top1) in DEGREES.items():
        engine = exported("deit_tiny", degree)
        name = f"r{degree:02}.onnx"
        for file in engine.files:
            shutil.copyfile(engine.file.parent / file, folder / (name if file == engine.file.name else file))
        files = {name: sha256_file(folder / name)} | {
            file: digest for file, digest in engine.files.items() if file != engine.file.name
        }
        tokens = engine.source.tokens
        entries.append(EngineEntry(
            degree, None, tuple(one - other for one, other in pairwise(tokens)), tokens, engine.source.gmacs,
            "onnxruntime", "fp32", name, name, files, "", {},
            {str(batch): {"p50": ms * batch, "p99": 2 * ms * batch} for batch in (1, MAX_BATCH)}, {"top1": top1},
            pays={"1": True}, machine=this_machine(),
        ))  # fmt: skip
    spec = InputSpec((3, 64, 64), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bicubic", 1.0, "center")
    names = tuple(f"kind {index}" for index in range(10))
    Family("deit_tiny", 10, spec, 0, None, None, names, tuple(entries)).write(folder)
    return folder


@contextlib.contextmanager
def served(service: object, **options: object) -> Iterator[int]:
    """The port of a real server of the page."""
    app = Starlette(routes=page_routes(service, **options))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    eventually(lambda: server.started, "the server's start")
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(SAFETY_S)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def serve_page() -> Callable[..., contextlib.AbstractContextManager[int]]:
    """`served`, for tests that need a service or limits of their own."""
    return served


@pytest.fixture(scope="session")
def page_server(tiny_family: Path) -> Iterator[SimpleNamespace]:
    """The tiny family's page, served: `port` and `service`."""
    options = ServeOptions(workers=0, threads=1, limits=Limits(max_batch=MAX_BATCH))
    service = Service(tiny_family, options)
    try:
        with served(service) as port:
            yield SimpleNamespace(port=port, service=service, url=f"http://127.0.0.1:{port}")
    finally:
        service.close()


@pytest.fixture(scope="session")
def picture() -> bytes:
    """A PNG of 96 x 64 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).resize((96, 64), Image.Resampling.BICUBIC).save(content, "PNG")
    return content.getvalue()
