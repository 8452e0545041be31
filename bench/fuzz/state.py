"""What was run already: one line of JSON per case, so that a campaign that is interrupted goes on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from bench.fuzz.case import Case
from bench.fuzz.outcome import FINE, Outcome
from tocom.runtime.errors import InputError, one_line
from tocom.runtime.files import write_atomically


@dataclass
class State:
    """The outcomes of a campaign.

    Attributes:
        file: Where they are kept; a line is added as each case ends.
        outcomes: By the case's key.
        seconds: That they took, all runs together.
    """

    file: Path
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def load(cls, file: Path) -> State:
        """What was kept, but for a line that a kill cut off.

        Raises:
            InputError: The file is of other code, whose cases are other ones.
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
                raise InputError(f"{one_line(file)} is of other mutations than these: give --fresh to begin anew.")
            state.seconds += found.get("seconds", 0.0)
            if "case" in found:
                state.outcomes[found["case"]] = Outcome(**found["outcome"])
        return state

    def add(self, case: Case, outcome: Outcome, seconds: float = 0.0) -> None:
        """Keeps an outcome, and how long it took to get it."""
        self.outcomes[case.key] = outcome
        self.seconds += seconds
        with self.file.open("a") as lines:
            line = {"case": case.key, "outcome": outcome.to_json(), "seconds": round(seconds, 3)}
            lines.write(json.dumps(line) + "\n")

    def forget_faults(self) -> None:
        """Lets go of the cases that were faulty, so that they are run again."""
        kept = {key: each for key, each in self.outcomes.items() if each.verdict in FINE}
        lines = [json.dumps({"case": key, "outcome": each.to_json()}) for key, each in kept.items()]
        first = json.dumps({"code": fingerprint(), "seconds": self.seconds})
        write_atomically(self.file, "\n".join([first, *lines, ""]).encode())
        self.outcomes = kept


def fingerprint() -> str:
    """Tells the mutations from others: a case is named by a number, and means nothing without them."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("mutate_*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
