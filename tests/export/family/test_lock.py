"""One command at a time writes into a family's folder, and a dead one leaves nothing behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tocom.export.family.lock import locked
from tocom.runtime.errors import InputError

HOLDS = """
import sys, time
from pathlib import Path
from tocom.export.family.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_another_process_holds_it_until_it_dies(tmp_path: Path, end: signal.Signals) -> None:
    out = tmp_path / "family"
    with subprocess.Popen([sys.executable, "-c", HOLDS, out], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another compile or choose-scale is writing into") as refused, locked(out):
            pass
        assert "\n" not in str(refused.value)
        other.send_signal(end)
    with locked(out):
        pass
    assert [file.name for file in out.iterdir()] == [".lock"]


def test_it_is_let_go_of_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    with locked(tmp_path), pytest.raises(InputError), locked(tmp_path):
        pass


def test_a_process_started_meanwhile_does_not_hold_it(tmp_path: Path) -> None:
    with locked(tmp_path):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        with locked(tmp_path):
            pass
    finally:
        child.kill()
        child.wait()


def test_what_is_no_file_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(IsADirectoryError), locked(tmp_path):
        pass
