"""What the page asks over HTTP, of a real server: answers equal to the engine's own, and refusals in one line."""

from __future__ import annotations

import http.client
import io
import itertools
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np
import pytest
from PIL import Image

import tocom
from tests.waiting import SAFETY_S
from tocom.runtime.engines.merge_trace import MergeTracer
from tocom.runtime.errors import InputError
from tocom.serving.protocol.page_routes import PageService, page_routes
from tocom.serving.service.errors import BusyError

pytestmark = pytest.mark.timing


class Connection:
    """Asks a server, one request after the other."""

    def __init__(self, port):
        self.port = port

    def __call__(self, method, path, body=None, headers=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SAFETY_S)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, content

    def json(self, method, path, body=None, headers=None):
        status, found, content = self(method, path, body, headers)
        assert found["content-type"] == "application/json" and found["cache-control"] == "no-store"
        assert found["x-content-type-options"] == "nosniff"
        return status, found, json.loads(content)


@pytest.fixture
def ask(page_server):
    return Connection(page_server.port)


class Fixed:
    """A service whose answers are decided by a test: for refusals that a healthy one does not give."""

    def __init__(self, answer):
        self.answer = answer

    def predict_image(self, content, want, top_k=5):
        return self.answer(content, want, top_k)

    def merges(self, content, degree):
        return self.answer(content, degree, None)

    def describe(self):
        return {}


def raising(error):
    def answer(*_):
        raise error

    return answer


def prepared(family, content):
    return family.prepare(Image.open(io.BytesIO(content)))


def test_a_prediction_is_the_engine_s(ask, tiny_family, picture):
    with tocom.load(tiny_family) as family:
        for degree in (0, 8, 16):
            status, headers, found = ask.json("POST", f"/api/predict?degree={degree}&top_k=3", picture)
            expected = family.predict(Image.open(io.BytesIO(picture)), degree=degree, top_k=3)[0]
            assert status == 200 and headers["tocom-degree"] == str(degree) == str(found["degree"])
            assert [each["class"] for each in found["predictions"]] == list(expected.classes)
            assert [each["name"] for each in found["predictions"]] == list(expected.names)
            shares = [each["probability"] for each in found["predictions"]]
            np.testing.assert_allclose(shares, expected.probabilities, rtol=1e-5, atol=0)
            assert found["engine_ms"] > 0 and found["queue_ms"] >= 0


def test_a_prediction_without_wishes_has_five_classes_at_the_degree_in_force(ask, page_server, picture):
    status, _, found = ask.json("POST", "/api/predict", picture, {"content-type": "text/html"})
    assert (status, found["degree"], len(found["predictions"])) == (200, page_server.service.degree, 5)


@pytest.mark.parametrize(("query", "degree"), [("min_degree=5", 8), ("min_degree=9&max_degree=16", 16),
                                               ("max_degree=3&degree=", 0)])  # fmt: skip
def test_limits_on_the_degree(ask, picture, query, degree):
    assert ask.json("POST", f"/api/predict?{query}", picture)[2]["degree"] == degree


def test_merges_are_those_of_the_tracer(ask, tiny_family, picture):
    with tocom.load(tiny_family) as family, MergeTracer(tiny_family, family.family) as tracer:
        for degree in (0, 16):
            expected = tracer.trace(prepared(family, picture), degree).to_json()
            status, headers, found = ask.json("POST", f"/api/merges?degree={degree}", picture)
            assert (status, headers["tocom-degree"]) == (200, str(degree))
            assert found == expected
    assert len(found["blocks"]) == 3 and np.array(found["blocks"][0]["groups"]).shape == tuple(found["grid"])
    assert found["tokens"][:3] == [65, 49, 33]


def test_the_family_is_described(ask):
    status, _, found = ask.json("GET", "/api/family")
    assert status == 200
    assert [each["degree"] for each in found["degrees"]] == [0, 8, 16]
    assert [each["p50_ms"] for each in found["degrees"]] == [4, 3, 2]
    assert found["input"]["size"] == [3, 64, 64] and found["input"]["crop_mode"] == "center"
    assert found["adaptive"]["enabled"] is False and found["adaptive"]["queued"] == 0


@pytest.mark.parametrize(("path", "kind"), [("/", "text/html"), ("/page/page.js", "text/javascript"),
                                            ("/page/page.css", "text/css"),
                                            ("/page/icon.svg", "image/svg+xml")])  # fmt: skip
def test_parts_of_the_page(ask, path, kind):
    status, headers, content = ask("GET", path)
    assert status == 200 and headers["content-type"].startswith(kind) and content
    assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-cache"
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
    status, _, again = ask("GET", path, headers={"if-none-match": headers["etag"]})
    assert (status, again) == (304, b"")


def test_the_page_names_nothing_outside_and_has_nothing_inline(ask):
    _, _, html = ask("GET", "/")
    parts = [html.decode()] + [ask("GET", f"/page/{name}")[2].decode()
                               for name in ("page.js", "charts.js", "picture.js", "server.js", "page.css")]  # fmt: skip
    for part in parts:
        assert "https://" not in part
        assert part.count("http://") == part.count("http://www.w3.org/2000/svg")  # a name, which nothing asks for
    assert "style=" not in parts[0] and "onclick" not in parts[0] and "<script>" not in parts[0]


@pytest.mark.parametrize("path", ["/page/../web.py", "/page/%2e%2e%2fweb.py", "/page/web.py", "/page/", "/favicon.ico"])
def test_nothing_else_is_served(ask, path):
    assert ask("GET", path)[0] == 404


@pytest.mark.parametrize("query", [
    "degree=x", "degree=-1", "degree=1e3", "degree=8&degree=8", "degree=9999999", "degree=%C2%B2", "depth=3", "top_k=0",
    "degree=8&min_degree=0", "min_degree=8&max_degree=4", "degree=7", "min_degree=17", "degree=%0d%0aSet-Cookie:x",
])  # fmt: skip
def test_queries_that_are_refused(ask, picture, query):
    status, headers, found = ask.json("POST", f"/api/predict?{query}", picture)
    assert status == 400 and len(found["error"].splitlines()) == 1 and "set-cookie" not in headers


def test_merges_need_a_degree_that_there_is(ask, picture):
    assert ask.json("POST", "/api/merges", picture)[0] == 400
    status, _, found = ask.json("POST", "/api/merges?degree=3", picture)
    assert status == 400 and "0, 8, 16" in found["error"]


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n" + bytes(100)])
@pytest.mark.parametrize("path", ["/api/predict", "/api/merges?degree=8"])
def test_bodies_that_are_no_images(ask, path, content):
    status, _, found = ask.json("POST", path, content)
    assert status == 400 and len(found["error"].splitlines()) == 1


def test_methods(ask, picture):
    assert ask("GET", "/api/predict")[0] == 405
    assert ask("POST", "/", picture)[0] == 405


@pytest.fixture
def small_server(serve_page):
    with serve_page(Fixed(lambda content, *_: {"degree": 8, "bytes": len(content)}), max_bytes=1000) as port:
        yield port


def test_a_body_may_have_as_many_bytes_as_allowed(small_server):
    ask = Connection(small_server)
    assert ask.json("POST", "/api/predict", bytes(1000))[::2] == (200, {"degree": 8, "bytes": 1000})
    status, headers, found = ask.json("POST", "/api/predict", bytes(1001))
    assert status == 413 and "1000 bytes" in found["error"] and headers["connection"] == "close"


@pytest.mark.parametrize("head", ["Content-Length: 99999999999999999999", "Content-Length: 1001",
                                  "Transfer-Encoding: chunked"])  # fmt: skip
def test_what_is_too_large_is_refused_before_it_has_come(small_server, head):
    with socket.create_connection(("127.0.0.1", small_server), timeout=SAFETY_S) as connection:
        connection.sendall(f"POST /api/predict HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode())
        if "chunked" in head:
            connection.sendall(b"3e8\r\n" + bytes(1000) + b"\r\n" + b"1\r\n0\r\n")  # and no end
        found = connection.recv(4096)
    assert found.split()[1] in (b"413", b"400")  # 400: a length that the server's own parser does not believe
    if b"9999" not in head.encode():
        assert found.split()[1] == b"413"


@pytest.mark.parametrize(("error", "status", "after"), [
    (BusyError("3 images wait", retry_after_s=1.2), 503, "2"), (InputError("no\nway"), 400, None),
])  # fmt: skip
def test_refusals_of_the_service(serve_page, error, status, after):
    with serve_page(Fixed(raising(error))) as port:
        for path in ("/api/predict", "/api/merges?degree=8"):
            found, headers, content = Connection(port).json("POST", path, b"x")
            assert (found, headers.get("retry-after")) == (status, after)
            assert len(content["error"].splitlines()) == 1


def test_waiting_requests_are_bounded(serve_page):
    release = threading.Event()

    def slow(*_):
        assert release.wait(SAFETY_S)
        return {"degree": 8}

    with serve_page(Fixed(slow)) as port, ThreadPoolExecutor(12) as clients:
        ask = Connection(port)
        asked = [clients.submit(ask, "POST", "/api/merges?degree=8", b"x") for _ in range(12)]
        try:  # none of the accepted ones is answered before all of the others are refused
            refused = [future.result() for future in itertools.islice(as_completed(asked, SAFETY_S), 4)]
            assert ask("GET", "/api/family")[0] == 200  # is not kept waiting by them
        finally:
            release.set()
        statuses = [each.result()[0] for each in asked]
    assert [(status, headers["retry-after"]) for status, headers, _ in refused] == [(503, "1")] * 4
    assert sorted(statuses) == [200] * 8 + [503] * 4


def test_many_at_the_same_time(ask, picture):
    with ThreadPoolExecutor(8) as clients:
        paths = [
            f"/api/{'predict' if number % 3 else 'merges'}?degree={(0, 8, 16)[number % 3]}" for number in range(24)
        ]
        found = list(clients.map(lambda path: (path, ask.json("POST", path, picture)), paths))
    for path, (status, headers, _) in found:
        assert status == 200 and path.endswith(f"={headers['tocom-degree']}")


def test_a_service_that_has_less_is_enough():
    assert [route.path for route in page_routes(Fixed(raising(InputError("no"))))][:2] == ["/", "/page/{file}"]
    assert {"predict_image", "merges", "describe"} <= set(vars(PageService))
