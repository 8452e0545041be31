"""Temporary files that outlive no process for long."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timing

ROOT = Path(__file__).resolve().parents[3]
CODE = """
import sys, tempfile
from tocom.serving.service.scratch import own_scratch
print(own_scratch(), flush=True)
tempfile.mkdtemp()
sys.stdin.read()
"""


def started(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CODE],
        env={**os.environ, "TMPDIR": str(folder)},
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_what_a_killed_process_left_is_cleared_away_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="there are no such locks on this system")
    (tmp_path / "another").mkdir()
    with started(tmp_path) as first, started(tmp_path) as second:
        own = [Path(process.stdout.readline().strip()) for process in (first, second)]
        assert all(folder.is_dir() and folder.parent == tmp_path for folder in own)
        first.kill()
        first.wait()
        with started(tmp_path) as third:
            mine = Path(third.stdout.readline().strip())
            assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "another", own[1], mine])
            third.stdin.close()
        second.stdin.close()
