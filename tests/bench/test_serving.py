"""The load generator and its accounts against oracles of their own, and a short run of faults on a real server."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

from bench.serving.accounts import (
    LOST,
    REFUSED,
    RIGHT,
    UNCLEAR,
    WRONG,
    Judged,
    Record,
    Reply,
    clear_refusal,
    over_time,
    percentile,
    summary,
)
from bench.serving.clients import exchange, read_http, split_http
from bench.serving.faults_page import fault_verdicts, write_faults_page
from bench.serving.load import ADAPTIVE, FACTORS, LoadOptions, contenders, holds, idle_again_s
from bench.serving.load_page import summary as load_summary
from bench.serving.load_page import verdicts, write_load_page
from bench.serving.malformed import Bad, judge_http, malformed
from bench.serving.offer import lag_ms, offer, order, poisson
from bench.serving.soak import slope
from bench.serving.subject import Body, Subject, allows
from bench.serving.traffic import account, sound

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.bench
def test_arrivals_are_a_poisson_process() -> None:
    times = poisson(50, 400, seed=3)
    assert np.array_equal(times, poisson(50, 400, seed=3))
    assert not np.array_equal(times[:50], poisson(50, 400, seed=4)[:50])
    assert (np.diff(times) > 0).all() and times[0] > 0 and times[-1] < 400
    # counts of seconds have mean and variance 50; bounds of 5 standard errors
    counts = np.bincount(times.astype(int), minlength=400)
    assert abs(counts.mean() - 50) < 5 * np.sqrt(50 / 400)
    assert abs(counts.var() / 50 - 1) < 5 * np.sqrt(2 / 400)
    # gaps are exponential: Kolmogorov's distance at 99.9%
    gaps = np.sort(np.diff(times))
    distance = np.abs(1 - np.exp(-50 * gaps) - np.arange(len(gaps)) / len(gaps)).max()
    assert distance < 1.95 / np.sqrt(len(gaps))


def test_every_body_is_asked_equally_often() -> None:
    counts = Counter(order(7, 70, seed=1).tolist())
    assert counts == dict.fromkeys(range(7), 10)
    assert len(order(7, 3, seed=1)) == 3


def test_latency_counts_from_when_a_request_was_to_be_sent() -> None:
    """A server that stands still for 0.3 s delays everything due meanwhile; closed loops would see one late request."""
    busy = asyncio.Lock()

    async def send(body: int) -> object:
        async with busy:
            await asyncio.sleep(0.3 if body == 0 else 0.001)
        return body

    times = [0.0, 0.1, 0.2, 0.29]
    records = asyncio.run(offer(times, [0, 1, 1, 1], send))
    late = [record.done_s - record.at_s for record in records]
    assert [record.reply for record in records] == [0, 1, 1, 1]
    assert late[0] >= 0.3 and late[1] >= 0.2 and late[2] >= 0.1
    sent = [Record(0.0, 0, sent_s=0.001 * number) for number in range(1, 201)]
    assert lag_ms(sent) == (pytest.approx(198.0), pytest.approx(200.0))


def test_offer_does_not_wait_for_answers() -> None:
    """No request is answered before all are sent."""

    async def whole() -> list[Record]:
        sent, all_sent = [], asyncio.Event()

        async def send(body: int) -> object:
            sent.append(body)
            if len(sent) == 50:
                all_sent.set()
            await all_sent.wait()
            return body

        return await asyncio.wait_for(offer(np.linspace(0, 0.2, 50).tolist(), [0] * 50, send), 60)

    assert len(asyncio.run(whole())) == 50


def test_offer_stops_when_it_is_told() -> None:
    sent = []

    async def send(body: int) -> object:
        sent.append(body)
        return body

    records = asyncio.run(offer([0.0, 0.01, 3000.0], [0, 1, 2], send, lambda: len(sent) == 2))
    assert [record.reply for record in records] == sent == [0, 1]


def judged(at_s: float, outcome: str, latency_ms: float = 10.0, degree: int | None = 0) -> Judged:
    return Judged(at_s, latency_ms, outcome, images=4, correct=3, degree=degree, text="why")


def test_accounts_by_hand() -> None:
    everything = [judged(0.1 * number, RIGHT, float(number + 1), degree=8 * (number % 2)) for number in range(20)]
    everything += [judged(3.5, REFUSED, degree=None), judged(3.6, LOST, 9e9, None), judged(3.7, WRONG, 50.0, 8)]
    found = summary(everything, 4.0)
    assert found["counts"] == {"sent": 23, RIGHT: 20, WRONG: 1, REFUSED: 1, UNCLEAR: 0, LOST: 1}
    assert found["offered"] == 23 * 4 / 4 and found["answered"] == 21 * 4 / 4
    assert found["p50_ms"] == 11.0 and found["p99_ms"] == 50.0
    assert found["p99_of_all_ms"] is None  # two of 23 were never answered
    assert summary(everything[:20], 4.0)["p99_of_all_ms"] == 20.0
    many = [judged(0.0, RIGHT, float(number)) for number in range(1, 199)] + [judged(0.0, REFUSED)] * 2
    assert summary(many, 1.0)["p99_of_all_ms"] == 198.0 != summary(many, 1.0)["p99_ms"]
    assert found["top1"] == 0.75 and found["refused"] == 1 / 23
    assert found["degrees"] == {"0": 10 / 21, "8": 11 / 21}
    bins = over_time(everything, 4.0)
    assert [each["requests"] for each in bins] == [10, 10, 0, 3]
    assert [each["degree"] for each in bins] == [4, 4, None, 8]
    assert bins[1]["p99_ms"] == 20.0 and bins[3]["refused"] == 1


@pytest.mark.parametrize("share", [1, 50, 90, 99, 100])
def test_percentile_is_the_least_value_that_covers_the_share(share: float) -> None:
    values = np.random.default_rng(0).normal(size=137)
    oracle = next(v for v in sorted(values) if (values <= v).mean() >= share / 100)
    assert percentile(values, share) == oracle


def test_what_a_clear_refusal_is() -> None:
    assert clear_refusal(Reply(503, "96 images wait", retry_after=True), over_http=True)
    assert not clear_refusal(Reply(503, "96 images wait"), over_http=True)
    assert clear_refusal(Reply(503, "96 images wait"), over_http=False)
    assert not clear_refusal(Reply(500, "a fault", retry_after=True), over_http=True)
    assert not clear_refusal(Reply(503, "two\nlines", retry_after=True), over_http=True)
    assert not clear_refusal(Reply(503, " ", retry_after=True), over_http=True)


class Known(Subject):
    """Two sheets of three classes, and what two degrees make of them."""

    def __init__(self) -> None:
        self.folder, self.sheets, self.labels = Path("nowhere"), [b"0", b"1"], np.array([2, 0])
        self.__dict__["expected"] = {0: np.array([[0, 0, 1], [1, 0, 0]], np.float32),
                                     8: np.array([[0, 1, 0], [1, 0, 0]], np.float32)}  # fmt: skip


@pytest.mark.parametrize(("reply", "outcome", "correct"), [
    (Reply(200, logits=np.array([[0, 0, 1], [1, 0, 0]], np.float32), degree=0), RIGHT, 2),
    (Reply(200, logits=np.array([[0, 1, 0], [1, 0, 0]], np.float32), degree=8), RIGHT, 1),
    (Reply(200, logits=np.array([[0, 1, 0], [1, 0, 0]], np.float32), degree=0), WRONG, 1),
    (Reply(200, logits=np.array([[0, 0, 1.0001], [1, 0, 0]], np.float32), degree=0), WRONG, 2),
    (Reply(200, logits=np.array([[1, 0, 0], [0, 0, 1]], np.float32), degree=0), WRONG, 0),  # another's answer
    (Reply(200, logits=np.array([[0, 0, 1]], np.float32), degree=0), WRONG, 0),
    (Reply(200, classes=(2, 0), degree=0), RIGHT, 2),
    (Reply(200, classes=(2, 0), degree=4), WRONG, 0),
    (Reply(200, text="an answer that cannot be read"), WRONG, 0),
    (Reply(503, "busy", retry_after=True), REFUSED, 0),
    (Reply(503, "busy"), UNCLEAR, 0),
    (Reply(500, "a fault"), UNCLEAR, 0),
    (Reply(0, "TimeoutError"), LOST, 0),
])  # fmt: skip
def test_answers_are_compared_bit_for_bit(reply: Reply, outcome: str, correct: int) -> None:
    found = Known().judge(Record(1.0, 0, 1.0, 1.5), Body((0, 1), {}, "http", b""), reply)
    assert (found.outcome, found.correct, found.latency_ms) == (outcome, correct, 500.0)


def test_an_answer_at_a_degree_that_was_not_allowed_is_wrong() -> None:
    reply = Reply(200, logits=Known().expected[8], degree=8)
    outcomes = [Known().judge(Record(0, 0), Body((0, 1), want, "grpc", b""), reply).outcome
                for want in ({}, {"degree": 8}, {"degree": 0}, {"max_degree": 4}, {"min_degree": 8})]  # fmt: skip
    assert outcomes == [RIGHT, RIGHT, WRONG, WRONG, RIGHT]
    assert allows({"min_degree": 4, "max_degree": 8}, 6) and not allows({"min_degree": 4}, 0)


def test_responses_of_http_are_read() -> None:
    body = json.dumps({"outputs": [{"shape": [1, 2], "data": [0.1, 0.2]}], "parameters": {"degree": 4}}).encode()
    reply = read_http(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n" + body)
    assert reply.degree == 4 and np.array_equal(reply.logits, np.array([[0.1, 0.2]], np.float32))
    refused = read_http(b'HTTP/1.1 503 Service Unavailable\r\nRetry-After: 2\r\n\r\n{"error": "full"}')
    assert (refused.status, refused.text, refused.retry_after) == (503, "full", True)
    assert read_http(b"").status == 0 and read_http(ConnectionResetError("x")).status == 0
    assert split_http(b"noise") is None


def test_exchange_with_a_server_that_leaves() -> None:
    async def both() -> list[object]:
        async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(10)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            await writer.drain()
            await asyncio.Event().wait()

        server = await asyncio.start_server(leave, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        found = await exchange(port, b"x" * 100, 2.0)
        server.close()
        return [found, await exchange(port, b"x", 2.0)]

    whole, gone = asyncio.run(both())
    assert whole.endswith(b"ok") and isinstance(gone, ConnectionRefusedError)


@pytest.mark.bench
def test_malformed_requests_follow_from_seed_and_number() -> None:
    sheets = [path.read_bytes() for path in sorted((ROOT / "examples/digits/sheets").rglob("*.png"))[:20]]
    once = [malformed(0, number, sheets) for number in range(600)]
    assert once == [malformed(0, number, sheets) for number in range(600)]
    assert once[:50] != [malformed(1, number, sheets) for number in range(50)]
    kinds = Counter((bad.protocol, bad.kind) for bad in once)
    assert len(kinds) > 34 and {protocol for protocol, _ in kinds} == {"http", "grpc"}
    assert max(len(bad.content) for bad in once) < 18 << 20  # bombs are small until somebody opens them


@pytest.mark.parametrize(("raw", "verdict"), [
    (b'HTTP/1.1 400 Bad Request\r\n\r\n{"error":"no"}', "refused"),
    (b"HTTP/1.1 400 Bad Request\r\n\r\n", "refused unclearly"),
    (b"HTTP/1.1 422 X\r\n\r\nTraceback (most recent call last)", "refused unclearly"),
    (b"HTTP/1.1 200 OK\r\n\r\n{}", "answered as if valid"),
    (b"HTTP/1.1 500 Internal Server Error\r\n\r\nx", "fault of the server"),
    (b"HTTP/1.1 503 X\r\nRetry-After: 1\r\n\r\nx", "busy"),
    (b"HTTP/1.1 503 X\r\n\r\nx", "refused unclearly"),
    (b"", "no answer"),
    (TimeoutError(), "no answer"),
])  # fmt: skip
def test_verdicts_on_malformed_requests(raw: bytes | Exception, verdict: str) -> None:
    assert judge_http(Bad("x", "http", b""), raw)[0] == verdict


def test_noise_may_be_told_by_closing() -> None:
    assert judge_http(Bad("noise", "http", b"", may_close=True), b"")[0] == "closed"
    assert judge_http(Bad("noise", "http", b"", may_close=True), ConnectionResetError())[0] == "closed"


@pytest.mark.bench
def test_growth_is_told_from_noise() -> None:
    draw = np.random.default_rng(0)
    level = 800 + draw.normal(0, 5, 600)
    assert slope(level.tolist()).flat
    leak = slope((level + 0.2 * np.arange(600)).tolist())  # 60 MiB over the second half
    assert not leak.flat and leak.low < 60 < leak.high
    # the interval covers the truth about as often as it says: 95% of 400 within 5 standard errors
    covered = [
        (lambda found: found.low <= 0 <= found.high)(slope((800 + draw.normal(0, 5, 300)).tolist())) for _ in range(400)
    ]
    assert abs(np.mean(covered) - 0.95) < 5 * np.sqrt(0.95 * 0.05 / 400)
    assert NormalDist().cdf(1.96) == pytest.approx(0.975, abs=1e-3)


def measured(p99_ms: float, refused: float = 0.0) -> dict:
    counts = {
        "sent": 100,
        RIGHT: round(100 * (1 - refused)),
        WRONG: 0,
        REFUSED: round(100 * refused),
        UNCLEAR: 0,
        LOST: 0,
    }
    return {"counts": counts, "p50_ms": 20.0, "p99_ms": p99_ms, "refused": refused,
            "p99_of_all_ms": None if refused > 0.01 else p99_ms, "offered": 100.0, "answered": 90.0,
            "top1": 0.9, "degrees": {"0": 0.5, "16": 0.5}, "lag_ms": [1.0, 2.0]}  # fmt: skip


def results(adaptive_at_goal: float) -> dict:
    names = contenders(16, 100.0)
    found = {f"{factor:g}x {name}": measured(50.0) for factor in FACTORS for name in names}
    found[f"1.5x {ADAPTIVE}"] = measured(adaptive_at_goal)
    found[f"4x {ADAPTIVE}"] = measured(120.0, 0.4)
    timeline = [{"at_s": float(at), "requests": 5, "degree": degree, "highest": degree, "p50_ms": 9.0, "p99_ms": 12.0}
                for at, degree in enumerate((0, 0, 16, 16, 8, 0, 0))]  # fmt: skip
    trial = {"rate": 10.0, "seconds": 5, "p99_ms": 80.0, "p99_of_all_ms": 80.0, "refused": 0}
    return {**found, "sustained": {"rate": 10.0, "trials": [trial]},
            "step": {**measured(50.0), "timeline": timeline, "phases": [(5, 2), (20, 2), (1, 3)]}}  # fmt: skip


def test_verdicts_of_the_load() -> None:
    held = verdicts(load_summary(results(90.0), LoadOptions(), 16))
    assert (
        held[0].startswith("PASS")
        and "2x" in held[0]
        and held[1] == ("PASS: it falls back to r=0 1 s after the load ends")
    )
    short = verdicts(load_summary(results(130.0), LoadOptions(), 16))[0]
    assert short.startswith("SHORT") and "up to 1x" in short and "+30%" in short
    assert not holds(measured(50.0, 0.02), 100.0)
    never = results(90.0)["step"]
    never["timeline"][-1]["highest"] = 4
    assert idle_again_s(never) is None


@pytest.mark.bench
def test_pages_are_written(tmp_path: Path) -> None:
    setup = {"setup": {"command": "the command", "date": "x", "machine": "m", "libraries": "l"}}
    found = load_summary(results(90.0), LoadOptions(server_cores=(0,)), 16)
    write_load_page(setup | found, tmp_path / "serving.md")
    text = re.sub(r" *\| *", "|", (tmp_path / "serving.md").read_text())
    assert "|4x|adaptive|100|90|20.0|120.0||40.00|90.0|0: 50%, 16: 50%|no|" in text
    assert (tmp_path / "serving-load.png").exists() and (tmp_path / "serving-step.png").exists()
    case = {"passed": False, "skipped": "", "seconds": 3.0, "checks": [("it lives", False, "it | died")],
            "notes": {"traffic": account([judged(0, RIGHT), judged(0, LOST)])}}  # fmt: skip
    write_faults_page(setup | {"cases": {"a case": case}}, tmp_path / "faults.md")
    text = (tmp_path / "faults.md").read_text()
    assert "0 of 1 cases pass" in text and "1 lost" in text and "it \\| died" in text
    assert fault_verdicts({"a case": case}) == ["FAILED: a case: it lives (it | died)"]
    assert not sound(case["notes"]["traffic"])


@pytest.mark.full
@pytest.mark.bench
def test_a_short_run_of_faults(tmp_path: Path) -> None:
    example, tocom = ROOT / "examples/digits", Path(sys.executable).with_name("tocom")
    subprocess.run([tocom, "compile", "--model", example, "--compensator", example / "compensator.safetensors",
                    "--source-degree", "0", "--degrees", "4,8,16", "--images", example / "sheets", "--limit", "32",
                    "--out", tmp_path / "digits"], check=True, timeout=250)  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "bench.serving", "faults", "--engines", tmp_path / "digits", "--seconds", "6",
         "--only", "killed", "--work", tmp_path / "work", "--out", tmp_path / "faults.md"],
        cwd=ROOT, capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 cases pass" in (tmp_path / "faults.md").read_text()
    shutil.rmtree(tmp_path)
