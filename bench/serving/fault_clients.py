"""Clients that behave badly: slow ones, too many, and those whose requests are malformed."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from typing import Any

from bench.serving.case import Bench
from bench.serving.clients import BlockingGrpcClient, exchange, read_grpc
from bench.serving.malformed import judge_grpc, judge_http, malformed
from bench.serving.server import Server
from bench.serving.traffic import Traffic

_AT_ONCE = 8  # malformed requests on their way
_TIMEOUT_S = 60.0
_HARD = ("answered as if valid", "fault of the server", "no answer", "refused unclearly")


def slow_clients(server: Server, count: int, seconds: float) -> dict[str, dict[str, float]]:
    """Opens connections that send a byte a second, within headers or a body; how the server ended them."""
    beginnings = {
        "headers": b"POST /v2/models/digits/infer HTTP/1.1\r\nX-Slow: ",
        "body": b"POST /v2/models/digits/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n{",
    }

    async def one(beginning: bytes) -> tuple[float, bytes]:
        began = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", server.http)
        got = b""
        with contextlib.suppress(ConnectionError):
            writer.write(beginning)
            while time.monotonic() - began < seconds:
                try:
                    async with asyncio.timeout(1.0):
                        got = await reader.read(1 << 16)
                    break
                except TimeoutError:
                    writer.write(b"a")
        writer.close()
        return time.monotonic() - began, got

    async def everyone() -> dict[str, dict[str, float]]:
        found = {}
        tasks = {name: [asyncio.create_task(one(text)) for _ in range(count)] for name, text in beginnings.items()}
        for name, each in tasks.items():
            ended = await asyncio.gather(*each)
            found[name] = {"clients": count, "longest_s": max(took for took, _ in ended),
                           "told 408": sum(b" 408 " in got for _, got in ended)}  # fmt: skip
        return found

    return asyncio.run(everyone())


def many_connections(server: Server, count: int) -> dict[str, int]:
    """Opens connections that send nothing, and tells what became of them."""

    async def everyone() -> dict[str, int]:
        opened = []
        for _ in range(count):
            with contextlib.suppress(OSError):
                opened.append(await asyncio.open_connection("127.0.0.1", server.http))
        await asyncio.sleep(1.0)
        found = Counter(await asyncio.gather(*(_told(*each) for each in opened)))
        return {**found, "not connected": count - len(opened)}

    return asyncio.run(everyone())


async def _told(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
    """What became of a connection that has sent nothing."""
    try:
        async with asyncio.timeout(1.0):
            got = await reader.read(1 << 12)
    except TimeoutError:
        return "open"
    except ConnectionError:
        return "reset"
    finally:
        writer.close()
    return "refused" if b" 503 " in got and b"retry-after" in got.lower() else "closed"


def bad_requests(bench: Bench, server: Server) -> tuple[dict[str, Any], Traffic]:
    """Sends malformed requests, a few at once, while valid traffic goes on: how they were answered, and the traffic."""
    traffic = bench.traffic(server, 3600.0)  # stopped below
    storm = BadStorm(server, bench.subject.sheets, bench.options.seed)
    began = time.monotonic()
    asyncio.run(storm.run(range(bench.options.malformed)))
    traffic.stop()
    return {**storm.to_json(), "seconds": time.monotonic() - began}, traffic


class BadStorm:
    """Malformed requests and how they were answered."""

    def __init__(self, server: Server, sheets: list[bytes], seed: int) -> None:
        self._server, self._sheets, self._seed = server, sheets, seed
        self.verdicts = Counter[str]()
        self.kinds: dict[str, Counter[str]] = {}
        self.faults: dict[str, str] = {}

    async def run(self, numbers: range, at_once: int = _AT_ONCE, pause_s: float = 0.0) -> None:
        """Sends some of them, so many at once, each worker with a pause after each."""
        left = iter(numbers)
        client = BlockingGrpcClient(self._server.grpc, _TIMEOUT_S)

        async def some() -> None:
            for number in left:
                await self._one(number, client)
                await asyncio.sleep(pause_s)

        await asyncio.gather(*(some() for _ in range(at_once)))
        await client.close()

    async def _one(self, number: int, client: BlockingGrpcClient) -> None:
        bad = malformed(self._seed, number, self._sheets)
        if bad.protocol == "grpc":
            verdict, said = judge_grpc(bad, read_grpc(await client.send(bad.content, bad.method)))
        else:
            raw = await exchange(self._server.http, bad.content, _TIMEOUT_S, end=bad.ends)
            verdict, said = judge_http(bad, raw)
        self.verdicts[verdict] += 1
        self.kinds.setdefault(f"{bad.protocol}: {bad.kind}", Counter())[verdict] += 1
        if verdict in _HARD and len(self.faults) < 40:
            self.faults.setdefault(f"{bad.protocol}: {bad.kind}: {verdict}", f"number {number}: {said[:200]}")

    def to_json(self) -> dict[str, Any]:
        """Everything, JSON-ready."""
        kinds = {kind: dict(counts) for kind, counts in sorted(self.kinds.items())}
        return {"verdicts": dict(self.verdicts), "kinds": kinds, "faults": self.faults}
