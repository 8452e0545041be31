"""What was proven already: one line of JSON per model, so that a campaign that is interrupted goes on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tocom.runtime.errors import InputError, one_line

Record = dict[str, Any]  # see `bench.proof.case.check`
_MEASURING = ("decisions.py", "observe.py", "parts.py", "validate.py")


@dataclass
class State:
    """The models of a campaign.

    Attributes:
        file: Where they are kept; a line is added as each is proven.
        records: By the model's number.
    """

    file: Path
    records: dict[int, Record] = field(default_factory=dict)

    @classmethod
    def load(cls, file: Path) -> State:
        """What was kept, but for a line that a kill cut off.

        Raises:
            InputError: The file is of other code, whose models are other ones.
        """
        code, state = fingerprint(), cls(file)
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"code": code}) + "\n")
            return state
        text = file.read_text()
        if not text.endswith("\n"):
            file.write_text(text + "\n")
        for line in text.splitlines():
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if found.get("code", code) != code:
                raise InputError(f"{one_line(file)} is of other models or measurements: give --fresh to begin anew.")
            if "drawn" in found:
                state.records[found["drawn"]["number"]] = found
        return state

    def add(self, record: Record) -> None:
        """Keeps what a model came to."""
        self.records[record["drawn"]["number"]] = record
        with self.file.open("a") as lines:
            lines.write(json.dumps(record) + "\n")


def fingerprint() -> str:
    """Tells the models and what is measured of them from others."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256(Path(__file__).with_name("models.py").read_bytes())
    for name in _MEASURING:
        digest.update((root / "export" / "proof" / name).read_bytes())
    return digest.hexdigest()[:16]
