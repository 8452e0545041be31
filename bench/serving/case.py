"""What a fault run has at hand: a copy of the family, a server on it, steady traffic, and a list of checks."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.serving.clients import exchange, split_http
from bench.serving.server import Server
from bench.serving.subject import MODEL, Body, Subject, http_request
from bench.serving.traffic import Traffic, account, sound

RATE = 12.0  # requests a second of steady traffic: far below what a server takes, so that only the fault can hurt


@dataclass(frozen=True)
class FaultOptions:
    """How fault runs go."""

    seconds: float = 12.0  # of steady traffic around a fault
    malformed: int = 10_000  # how many malformed requests
    minutes: float = 10.0  # of the soak
    seed: int = 0  # of everything drawn


class SkippedError(Exception):
    """This machine cannot run the case; the message says why."""


@dataclass
class Bench:
    """What a case has at hand.

    Attributes:
        checks: Of the case: what was checked, whether it held, and what was seen.
    """

    subject: Subject  # of the copy of the family that is served
    bodies: list[Body]  # valid requests
    options: FaultOptions  # see above
    work: Path  # A folder of its own
    family: Path  # copy of the family that is served, which a case may damage
    checks: list[tuple[str, bool, str]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)  # numbers worth telling

    def serve(self, *arguments: object, environment: Mapping[str, str] | None = None) -> Server:
        """Starts a server on the case's copy of the family."""
        common = ["--threads", 1, "--objective-ms", 100, *arguments]
        own = {"XDG_CACHE_HOME": str(self.work.parent / "cache"), **(environment or {})}
        return Server(self.family, self.work / "server.log", common, environment=own)

    @contextmanager
    def under_traffic(self, seconds: float | None = None, rate: float = RATE, **how: Any) -> Iterator[Server]:
        """A server under steady traffic; at the end every answer must be right and the server alive."""
        with self.serve(**how) as server:
            traffic = self.traffic(server, seconds, rate)
            yield server
            self.check_traffic(traffic)
            self.check_alive(server)

    def traffic(self, server: Server, seconds: float | None = None, rate: float = RATE) -> Traffic:
        """Starts steady traffic."""
        return Traffic(self.subject, self.bodies, server, rate, seconds or self.options.seconds, self.options.seed)

    def check(self, what: str, held: bool, seen: object = "") -> None:
        """Notes a check."""
        self.checks.append((what, bool(held), str(seen)[:300]))

    def check_traffic(self, traffic: Traffic) -> None:
        """Every valid request must have a right answer or a clear refusal, and most an answer."""
        found = account(traffic.join())
        self.notes["traffic"] = found
        counts = found["counts"]
        self.check("every valid request: a right answer or a clear refusal", sound(found), found["said"] or "")
        self.check("there were answers", counts["answered right"] > 0, counts["answered right"])

    def check_alive(self, server: Server) -> None:
        """The server must run, answer, and have written no trace."""
        self.check("the server runs", server.alive)
        self.check("no traceback in its log", not server.faults(), server.faults()[:2] or "")
        after = account(self.traffic(server, 2.0).join())
        self.notes["after"] = after["counts"]
        every = after["counts"]["answered right"] == after["counts"]["sent"] > 0
        self.check("afterwards it answers everything", every, after["said"] or "")

    def reload(self, server: Server, timeout_s: float = 120.0) -> tuple[int, str]:
        """Asks to reload: status, and what was said."""
        request = http_request(f"/v2/repository/models/{MODEL}/load", b"")
        raw = asyncio.run(exchange(server.http, request, timeout_s))
        found = None if isinstance(raw, Exception) else split_http(raw)
        return (0, repr(raw)) if found is None else (found[0], found[2].decode("utf-8", "replace"))

    def degrees(self, server: Server) -> list[int]:
        """Degrees of what serves."""
        return [each["degree"] for each in json.loads(server.get("/api/family"))["degrees"]]

    def edit_manifest(self, edit: Callable[[dict[str, Any]], None]) -> None:
        """Changes family.json of the case's copy."""
        file = self.family / "family.json"
        manifest = json.loads(file.read_text())
        edit(manifest)
        file.write_text(json.dumps(manifest))

    def wait(self, until: Callable[[], bool], seconds: float) -> bool:
        """Waits until something is so; whether it was in time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if until():
                return True
            time.sleep(0.1)
        return until()


Case = Callable[[Bench], None]


def run_case(
    name: str, case: Case, subject: Subject, bodies: list[Body], options: FaultOptions, work: Path
) -> dict[str, Any]:
    """Runs one case on a copy of the family below a folder; JSON-ready."""
    folder = work / "".join(letter if letter.isalnum() else "-" for letter in name)
    shutil.rmtree(folder, ignore_errors=True)
    family = folder / "family"
    shutil.copytree(subject.folder, family)
    bench = Bench(subject, bodies, options, folder, family)
    began, skipped = time.monotonic(), ""
    try:
        case(bench)
    except SkippedError as reason:
        skipped = str(reason)
    seconds = time.monotonic() - began
    passed = not skipped and all(held for _, held, _ in bench.checks)
    return {"passed": passed, "skipped": skipped, "seconds": seconds, "checks": bench.checks, "notes": bench.notes}


def failed(result: Mapping[str, Any]) -> list[str]:
    """What did not hold, with what was seen."""
    return [f"{what} ({seen})" if seen else what for what, held, seen in result["checks"] if not held]
