"""The cases: what is broken, and what must come of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.serving.accounts import LOST
from bench.serving.case import Bench, Case, SkippedError
from bench.serving.fault_clients import bad_requests, many_connections, slow_clients
from bench.serving.soak import soak
from bench.serving.traffic import account, sound


def _kill_worker(bench: Bench) -> None:
    """At work, and once while it starts again."""
    with bench.serve() as server:
        traffic = bench.traffic(server, 2 * bench.options.seconds)
        killed: list[int] = []
        for pause_s in (bench.options.seconds / 4, bench.options.seconds / 2, 0.5):
            time.sleep(pause_s)
            bench.wait(lambda: bool(set(server.workers) - set(killed)), 60)
            for pid in set(server.workers) - set(killed):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
        bench.check_traffic(traffic)
        bench.notes["kills"] = len(killed)
        restarts = server.metric("tocom_worker_restarts")
        bench.check("three processes were killed, and one serves", len(killed) == 3 and server.workers, killed)
        bench.check("the metrics count restarts", 1 <= restarts <= len(killed), restarts)
        bench.check_alive(server)


def _hang_worker(bench: Bench) -> None:
    """A stopped process: a batch counts as hung after a minute, and what waits longer than 30 s is refused."""
    with bench.under_traffic(70.0, rate=2.0) as server:
        time.sleep(2)
        stopped = server.workers
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        bench.check("metrics answer meanwhile", "tocom_queued_images" in server.get("/metrics"))
        again = bench.wait(lambda: not set(stopped) & set(server.workers) and bool(server.workers), 120)
        bench.check("the hung process was replaced", again, f"after {time.monotonic() - began:.0f} s")
        bench.notes["replaced_s"] = time.monotonic() - began


def _corrupt(bench: Bench) -> None:
    with bench.under_traffic() as server:
        time.sleep(bench.options.seconds / 4)
        for file in bench.family.iterdir():
            if file.suffix in (".onnx", ".bin"):
                content = bytearray(file.read_bytes())
                middle = len(content) // 2
                content[middle : middle + 64] = bytes(64 * [0xA5])
                file.write_bytes(content)
        time.sleep(1)
        for pid in server.workers:  # so that engines are opened again, from what is not damaged
            os.kill(pid, signal.SIGKILL)
        bench.edit_manifest(_only(0, 8, 16))
        status, said = bench.reload(server)
        bench.check("reloading the damaged family is refused (409)", status == 409, f"{status} {said}")
        bench.check_alive(server)


def _only(*degrees: int) -> Any:
    """Edits a manifest so that it has some degrees only: another version of the family."""

    def edit(manifest: dict[str, Any]) -> None:
        manifest["engines"] = [each for each in manifest["engines"] if each["degree"] in degrees]

    return edit


def _replace(bench: Bench) -> None:
    whole = (bench.family / "family.json").read_text()
    everything = [each["degree"] for each in json.loads(whole)["engines"]]
    with bench.under_traffic() as server:
        for number in range(3):
            time.sleep(1)
            if number % 2:
                (bench.family / "family.json").write_text(whole)
            else:
                bench.edit_manifest(_only(0, 8, 16))
            expected = everything if number % 2 else [0, 8, 16]
            before = bench.degrees(server)
            bench.check("the old one serves until it is asked to reload", before != expected, before)
            status, said = bench.reload(server)
            after = bench.degrees(server)
            bench.check("the new one takes over", (status, after) == (200, expected), f"{status} {said} {after}")


def _replace_broken(bench: Bench) -> None:
    whole = (bench.family / "family.json").read_text()
    engines = {file.name: file.read_bytes() for file in bench.family.glob("*.onnx")}
    with bench.under_traffic(2 * bench.options.seconds) as server:
        degrees = bench.degrees(server)
        for what, damage in _BROKEN.items():
            damage(bench)
            status, said = bench.reload(server)
            clear = status == 409 and "\n" not in said and "Traceback" not in said
            bench.check(f"{what}: refused (409) in one line", clear, f"{status} {said}")
            bench.check(f"{what}: the old one goes on", bench.degrees(server) == degrees)
            (bench.family / "family.json").write_text(whole)
            for name, content in engines.items():
                (bench.family / name).write_bytes(content)


def _cut_engine(bench: Bench) -> None:
    bench.edit_manifest(_only(0, 8, 16))
    file = next(bench.family.glob("r16*.onnx"))
    file.write_bytes(file.read_bytes()[:1000])


def _forged_engine(bench: Bench) -> None:
    """No engine, but with the hash of what it is: only opening it can tell."""
    from tocom.runtime.files import sha256_file

    file = next(bench.family.glob("r16*.onnx"))
    file.write_bytes(os.urandom(5000))
    digest = sha256_file(file)

    def edit(manifest: dict[str, Any]) -> None:
        for entry in manifest["engines"]:
            if entry["engine"] == file.name:
                entry["sha256"][file.name] = digest

    bench.edit_manifest(edit)


_BROKEN: dict[str, Any] = {
    "no JSON": lambda bench: (bench.family / "family.json").write_text("{"),
    "no manifest": lambda bench: (bench.family / "family.json").unlink(),
    "no engines": lambda bench: bench.edit_manifest(_only()),
    "an engine cut off": _cut_engine,
    "an engine that is noise": _forged_engine,
    "other classes": lambda bench: bench.edit_manifest(lambda manifest: manifest.update(classes=7, class_names=None)),
}


@contextmanager
def _small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        raise SkippedError("mounting a small disk needs the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def _full_disk(bench: Bench) -> None:
    with _small_disk(bench.work / "disk", 64) as disk, bench.under_traffic(environment={"TMPDIR": str(disk)}) as server:
        time.sleep(1)
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(1 << 16))
        bench.edit_manifest(_only(0, 8, 16))
        degrees = bench.degrees(server)
        status, said = bench.reload(server)
        clear = status == 503 and "Traceback" not in said and "No space" in said
        bench.check("reloading is refused (503) in one line", clear, f"{status} {said}")
        bench.check("the old one goes on", bench.degrees(server) == degrees)
        left = [file.name for file in disk.rglob("*") if file.is_file() and file.name != "filler"]
        bench.notes["files of the server on the disk"] = len(left)
        (disk / "filler").unlink()
        status, said = bench.reload(server)
        new = status == 200 and bench.degrees(server) == [0, 8, 16]
        bench.check("with space it takes over", new, f"{status} {said}")


def _end(bench: Bench) -> None:
    """What the server has taken on when it is told to end is answered; afterwards nobody listens."""
    server = bench.serve()
    traffic = bench.traffic(server, rate=40.0)
    time.sleep(bench.options.seconds / 2)
    began = time.monotonic()
    status = server.stop()
    bench.notes["ended_s"] = time.monotonic() - began
    traffic.stop()
    judged = traffic.join()
    bench.check("exit status 0", status == 0, status)
    bench.check("no traceback in its log", not server.faults(), server.faults()[:2] or "")
    late = [each for each in judged if each.at_s > began - traffic.began]
    # a connection that the system refuses has not reached the server, nor has what gRPC cancels by itself, which has
    # no other word for what comes between its end and the client's notice of it
    gone = [each for each in late if each.outcome == LOST and "refused" in each.text.lower()]
    gone += [each for each in late if each.text == "CANCELLED: CANCELLED"]
    bench.notes["sent after it had ended"] = len(gone)
    found = account([each for each in judged if each not in gone])
    bench.notes["traffic"] = found
    bench.check("every accepted request: a right answer or a clear refusal", sound(found), found["said"])


def _slow(bench: Bench) -> None:
    with bench.serve() as server:
        traffic = bench.traffic(server, 30.0)
        ended = slow_clients(server, 40, 28.0)
        bench.notes["slow"] = ended
        bench.check("slow headers are ended within 12 s", ended["headers"]["longest_s"] < 12, ended["headers"])
        bench.check("slow bodies are ended within 23 s", ended["body"]["longest_s"] < 23, ended["body"])
        bench.check_traffic(traffic)
        counts = bench.notes["traffic"]["counts"]
        bench.check("nobody else notices", counts["answered right"] == counts["sent"], counts)
        bench.check_alive(server)


def _connections(bench: Bench) -> None:
    with bench.serve() as server:
        seen = many_connections(server, 1500)
        bench.notes["connections"] = seen
        bench.check("no more than the limit stay open", seen["open"] <= 1024, seen)
        bench.check("the others are refused with 503 and Retry-After", seen["refused"] + seen["open"] == 1500, seen)
        bench.check_alive(server)


def _malformed(bench: Bench) -> None:
    with bench.serve() as server:
        found, traffic = bad_requests(bench, server)
        bench.notes["malformed"] = found
        bad = {kind: count for kind, count in found["verdicts"].items()
               if kind not in ("refused", "closed", "busy", "answered")}  # fmt: skip
        bench.check("every malformed request is refused in clear words", not bad, {**bad, **found["faults"]})
        bench.check_traffic(traffic)
        bench.check_alive(server)


CASES: dict[str, Case] = {
    "the engine process is killed": _kill_worker,
    "the engine process hangs": _hang_worker,
    "engine files are damaged": _corrupt,
    "the family is replaced": _replace,
    "the family is replaced by a broken one": _replace_broken,
    "the disk is full": _full_disk,
    "the server is told to end": _end,
    "slow clients": _slow,
    "too many connections": _connections,
    "malformed requests": _malformed,
    "soak": soak,
}
