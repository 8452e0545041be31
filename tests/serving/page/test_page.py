"""The page in a real browser: what is dropped, moved and hovered, against what the service itself says.

With TOCOM_SCREENSHOTS=FOLDER the example's family is compiled and shown instead of a tiny one, and the screenshots of
the documentation are written there.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.waiting import SAFETY_S
from tocom.serving.service.errors import BusyError
from tocom.serving.service.options import ServeOptions
from tocom.serving.service.service import Service

pytestmark = pytest.mark.timing

ROOT = Path(__file__).resolve().parents[3]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SCREENSHOTS = os.environ.get("TOCOM_SCREENSHOTS")
EXAMPLE = ROOT / "examples/digits/sheets/3"

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")


@pytest.fixture(scope="module")
def browser():
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)} is on PATH")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser):
    """Opens a page, and watches what it asks for and complains about."""
    with contextlib.ExitStack() as opened:

        def opener(url, width=1240, height=900, scheme="light"):
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
            opened.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(1000 * SAFETY_S)
            seen = SimpleNamespace(page=page, asked=[], complaints=[])
            page.on("request", lambda request: seen.asked.append(request.url))
            page.on("console", lambda line: line.type in ("error", "warning") and seen.complaints.append(line.text))
            page.on("pageerror", lambda error: seen.complaints.append(str(error)))
            page.goto(url)
            page.wait_for_selector("#light[data-state=alive]")
            return seen

        yield opener


@pytest.fixture(scope="module")
def shown(page_server, picture, tmp_path_factory, serve_page):
    """What is shown: a server, an image for it, and its name."""
    if SCREENSHOTS is None:
        yield SimpleNamespace(url=page_server.url, service=page_server.service, content=picture, name="noise.png")
        return
    folder = tmp_path_factory.mktemp("digits") / "family"
    command = [Path(sys.executable).with_name("tocom"), "compile", "--model", "examples/digits", "--compensator",
               "examples/digits/compensator.safetensors", "--source-degree", "0", "--degrees", "0,4,8,12,16",
               "--images", "examples/digits/sheets", "--backend", "auto", "--out", folder]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "TOCOM_BACKEND"}
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    service = Service(folder, ServeOptions(workers=0, threads=1, objective_ms=25))
    file = sorted(EXAMPLE.glob("*.png"))[0]
    try:
        with serve_page(service) as port:
            url = f"http://127.0.0.1:{port}"
            yield SimpleNamespace(url=url, service=service, content=file.read_bytes(), name=file.name)
    finally:
        service.close()


def drop(page, content, name, kind="image/png"):
    """Lets a file fall onto the page."""
    made = page.evaluate_handle(
        """([content, name, type]) => {
            const transfer = new DataTransfer();
            const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
            transfer.items.add(new File([bytes], name, { type }));
            return transfer;
        }""",
        [base64.b64encode(content).decode(), name, kind],
    )
    page.dispatch_event("main", "drop", {"dataTransfer": made})


def answered(page, degree):
    """Waits until a degree has answered, and its pictures are there."""
    page.wait_for_function(
        "degree => document.getElementById('answered').textContent === `degree ${degree}`", arg=degree
    )
    page.wait_for_selector("body.pictured:not(.asking)")


def colours_of(page, selector):
    """How many different colours a canvas has."""
    return page.eval_on_selector(
        selector,
        """canvas => new Set(new Uint32Array(canvas.getContext("2d")
            .getImageData(0, 0, canvas.width, canvas.height).data.buffer)).size""",
    )


def hover(page, patch, grid):
    box = page.locator("#stage").bounding_box()
    row, column = divmod(patch, grid[1])
    page.mouse.move(
        box["x"] + (column + 0.5) * box["width"] / grid[1], box["y"] + (row + 0.5) * box["height"] / grid[0]
    )


def shoot(page, name):
    """Writes a screenshot, in few colours so that the repository stays small."""
    if SCREENSHOTS is None:
        return
    image = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    file = Path(SCREENSHOTS) / name
    image.quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)
    assert file.stat().st_size < 200_000


def test_an_image_is_dropped_and_the_degree_moved(open_page, shown):
    seen = open_page(shown.url)
    page, degrees = seen.page, [each["degree"] for each in shown.service.describe()["degrees"]]
    drop(page, shown.content, shown.name)
    answered(page, degrees[0])
    assert page.text_content("#zone-title") == shown.name
    assert page.locator("#bars li").count() == 5 and "nothing" in page.text_content("#step-words")

    page.focus("#slider")
    for degree in degrees[1:]:
        page.keyboard.press("ArrowRight")
        answered(page, degree)
        told = shown.service.predict_image(shown.content, top_k=5)
        assert page.text_content("#degree") == str(degree)
        assert page.locator(f'.point.now[data-degree="{degree}"]').count() == 1
        assert page.locator("#bars li").count() == len(told["predictions"])
    assert not page.is_checked("#auto")

    trace = shown.service.merges(shown.content, degrees[-1])
    assert page.locator(".multiple").count() == len(trace["blocks"]) + 1
    for at in range(len(trace["blocks"]) + 1):
        assert colours_of(page, f".multiple:nth-child({at + 1}) canvas") > 20
    # the last block is shown; every block before it can be
    for at, block in reversed(list(enumerate(trace["blocks"], start=1))):
        page.locator("#step").fill(str(at))
        assert page.text_content("#step-title") == f"Behind block {block['block'] + 1}"
        assert page.get_attribute(f".multiple:nth-child({at + 1})", "aria-pressed") == "true"
        groups = np.array(block["groups"]).ravel()
        for patch in (0, 9, len(groups) - 1):
            hover(page, patch, trace["grid"])
            others = int((groups == groups[patch]).sum()) - 1
            words = page.text_content("#hovered")
            assert f"with {others} other" in words if others else "of its own" in words
            row, column = divmod(patch, trace["grid"][1])
            assert words.startswith(f"Patch {row + 1} down, {column + 1} across:")
    page.locator("#step").fill("0")
    assert page.text_content("#step-title") == "Input"

    assert seen.complaints == []
    assert {re.match(r"[a-z]+://[^/]*", url).group() for url in seen.asked if not url.startswith("blob:")} == {
        shown.url
    }


def test_the_answer_is_the_service_s(open_page, shown):
    page = open_page(shown.url).page
    page.set_input_files("#file", {"name": shown.name, "mimeType": "image/png", "buffer": shown.content})
    first = shown.service.describe()["degrees"][0]["degree"]
    answered(page, first)
    told = shown.service.predict_image(shown.content)["predictions"]
    assert page.locator("#bars .name").all_text_contents() == [each["name"] for each in told]
    shares = [float(text.rstrip(" %")) for text in page.locator("#bars .share").all_text_contents()]
    np.testing.assert_allclose(shares, [100 * each["probability"] for each in told], rtol=0, atol=0.051)


def test_degrees_are_chosen_in_the_chart_and_handed_back_to_the_load(open_page, shown):
    page = open_page(shown.url).page
    drop(page, shown.content, shown.name)
    first, *_, last = [each["degree"] for each in shown.service.describe()["degrees"]]
    answered(page, first)
    page.click(f'.point[data-degree="{last}"]')
    answered(page, last)
    assert page.input_value("#slider") == page.get_attribute("#slider", "max")
    page.check("#auto")
    answered(page, shown.service.degree)


def test_patches_are_reached_by_keys_and_drawn_in_three_ways(open_page, shown):
    seen = open_page(shown.url)
    page = seen.page
    drop(page, shown.content, shown.name)
    page.click(f'.point[data-degree="{shown.service.describe()["degrees"][-1]["degree"]}"]')
    page.wait_for_selector(".multiple:nth-child(3)")
    page.focus("#stage")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft"):
        page.keyboard.press(key)
    assert page.text_content("#hovered").startswith("Patch 2 down, 2 across")
    page.keyboard.press("Tab")
    assert page.text_content("#hovered").startswith("Point at a patch")
    looks = []
    for view in ("mean", "plain", "groups"):
        page.check(f'input[value="{view}"]', force=True)
        looks.append(page.evaluate("document.getElementById('stage').toDataURL()"))
    assert len(set(looks)) == 3
    page.evaluate("""() => { window.played = new Promise((seen) => new MutationObserver((_, observer) => {
        if (!document.querySelector("#play.playing")) return;
        observer.disconnect();
        seen(true);
    }).observe(document.getElementById("play"), { attributes: true })); }""")
    page.click("#play")
    assert page.evaluate("window.played")
    page.wait_for_selector("#play:not(.playing)")
    assert page.input_value("#step") == page.get_attribute("#step", "max")
    assert seen.complaints == []


def test_a_file_that_is_no_image_is_told_in_a_sentence(open_page, shown):
    seen = open_page(shown.url, height=500)
    page = seen.page
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    drop(page, b"I am a letter, not a picture.", "letter.txt", "text/plain")
    page.wait_for_selector("#problem:not([hidden])")
    assert page.text_content("#problem-text").startswith("This cannot be used: ")
    assert page.get_attribute("#problem", "role") == "alert"
    assert 0 <= page.locator("#problem").bounding_box()["y"] < 100  # in sight, however far down the page is
    assert len(seen.complaints) == 1 and "400" in seen.complaints[0]  # the browser's own line about the status
    page.click("#dismiss")
    assert page.is_hidden("#problem")
    drop(page, shown.content, shown.name)  # and it goes on
    answered(page, shown.service.degree)
    assert page.is_hidden("#problem") and len(seen.complaints) == 1


class Odd:
    """The tiny family's service, which answers as a test says."""

    def __init__(self, service, answer):
        self.describe, self.merges, self.predict_image = service.describe, service.merges, answer


def test_a_busy_server_is_told_with_when_to_come_back(open_page, page_server, serve_page, picture):
    calls = []

    def answer(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise BusyError("256 images wait, of 256 that may", retry_after_s=2)
        return page_server.service.predict_image(*arguments)

    with serve_page(Odd(page_server.service, answer)) as port:
        page = open_page(f"http://127.0.0.1:{port}").page
        drop(page, picture, "noise.png")
        page.wait_for_selector("#problem:not([hidden])")
        assert "busy" in page.text_content("#problem-text") and "Try again in 2 s." in page.text_content(
            "#problem-text"
        )
        page.click("#retry")
        answered(page, 0)


def test_a_hostile_name_of_a_class_stays_text(open_page, page_server, serve_page, picture):
    hostile = '<img src="http://example.invalid/x" onerror="document.title = 1">'

    def answer(*_):
        return {"degree": 0, "queue_ms": 0, "engine_ms": 1,
                "predictions": [{"class": 0, "name": hostile, "probability": 1.0}]}  # fmt: skip

    with serve_page(Odd(page_server.service, answer)) as port:
        seen = open_page(f"http://127.0.0.1:{port}")
        drop(seen.page, picture, hostile)
        answered(seen.page, 0)
        assert seen.page.text_content("#bars .name") == hostile == seen.page.text_content("#zone-title")
        assert not [url for url in seen.asked if "example.invalid" in url] and seen.complaints == []


def test_a_server_that_is_gone_is_noticed(open_page, page_server, serve_page):
    with serve_page(page_server.service) as port:
        page = open_page(f"http://127.0.0.1:{port}").page
    page.wait_for_selector("#light[data-state=gone]")
    assert page.text_content("#alive") == "no answer"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1240])
def test_it_fits(open_page, shown, width, scheme):
    page = open_page(shown.url, width=width, scheme=scheme).page
    drop(page, shown.content, shown.name)
    degrees = [each["degree"] for each in shown.service.describe()["degrees"] if each["on_frontier"]]
    chosen = degrees[len(degrees) // 2]
    page.click(f'.point[data-degree="{chosen}"]')
    answered(page, chosen)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 300) == (scheme == "dark")
    if width == 1240:
        page.evaluate("document.activeElement.blur()")
        page.mouse.move(2, 2)
        page.wait_for_timeout(300)  # transitions
        shoot(page, "page.png" if scheme == "light" else "page-dark.png")
