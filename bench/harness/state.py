"""What was finished already, so that a campaign that was interrupted goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tocom.runtime.errors import InputError, one_line
from tocom.runtime.files import write_atomically


@dataclass
class State:
    """Results by name, in a file of JSON lines: the settings, then one line for each result as it comes.

    Adding a result writes one line. Of a line that a kill cut off nothing is taken; the last line of a name counts.
    """

    file: Path  # where they are kept
    settings: dict[str, Any]  # JSON-ready; what makes results of two runs comparable
    results: dict[str, Any] = field(default_factory=dict)  # JSON-ready

    @classmethod
    def load(cls, file: Path, settings: dict[str, Any], *, fresh: bool = False) -> State:
        """Goes on with what a file holds, or begins one.

        Raises:
            InputError: The file is of other settings, or of something else.
        """
        state = cls(file, json.loads(json.dumps(settings)))
        if fresh or not file.exists():
            state._write()
            return state
        lines = list(_read(file.read_text()))
        if not lines or lines[0].get("settings") != state.settings:
            raise InputError(f"{one_line(file)} is of other settings: give --fresh to begin anew, or another --work")
        state.results = {line["name"]: line["result"] for line in lines[1:]}
        if not file.read_bytes().endswith(b"\n"):
            state._write()
        return state

    def keep(self, name: str, result: Any) -> Any:
        """Adds a result."""
        self.results[name] = json.loads(json.dumps(result))
        with self.file.open("a") as lines:
            lines.write(json.dumps({"name": name, "result": result}) + "\n")
        return self.results[name]

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """The result that is there, or else is measured now and kept."""
        return self.results[name] if name in self.results else self.keep(name, measure())

    def forget(self, names: Iterable[str]) -> None:
        """Lets go of results, so that they are measured again."""
        for name in list(names):
            self.results.pop(name, None)
        self._write()

    def _write(self) -> None:
        lines = [{"settings": self.settings}, *({"name": name, "result": each} for name, each in self.results.items())]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.file, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _read(text: str) -> Iterable[dict[str, Any]]:
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue  # cut off by a kill
        if isinstance(found, dict) and ("settings" in found or {"name", "result"} <= found.keys()):
            yield found


def fingerprint(files: Iterable[Path]) -> str:
    """Tells code that decides what cases are from other code: a case's number means nothing without it."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
