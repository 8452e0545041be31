"""Processes that hold engines: they do not outlive their server, however it ends."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.waiting import eventually


def lives(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent to notice does not."""
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_an_engine_process_ends_with_a_server_that_is_killed(tiny_family: Path, tmp_path: Path) -> None:
    server = tmp_path / "server.py"
    server.write_text(
        textwrap.dedent(f"""
        import time
        from pathlib import Path
        from tocom.serving.service.engine_process import EngineProcess

        if __name__ == "__main__":
            print(EngineProcess(Path({str(tiny_family)!r}), threads=1).pid, flush=True)
            time.sleep(600)
    """)
    )
    with subprocess.Popen([sys.executable, str(server)], stdout=subprocess.PIPE, text=True) as process:
        pid = int(process.stdout.readline())
        assert lives(pid)
        process.kill()
    eventually(lambda: not lives(pid), "the end of the engine process")
