"""What was finished already: a JSON file beside the page, so that a kill loses no more than what was running."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.gpu.checks import PASSED, Check
from bench.gpu.speed import Group
from tocom.runtime.errors import InputError, one_line
from tocom.runtime.files import write_atomically

_FORMAT = 1


@dataclass
class State:
    """What was finished on one machine.

    Attributes:
        file: Where it is kept.
        machine: From `machine.describe`.
        checks: By model, degree and what was compared.
        matmul: Precision -> TFLOP/s of a large matrix product.
        groups: By what they are of and who took part.
    """

    file: Path
    machine: dict[str, str]
    checks: dict[str, Check] = field(default_factory=dict)
    matmul: dict[str, float] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)

    @classmethod
    def load(cls, file: Path, machine: dict[str, str]) -> State:
        """What the file holds; nothing where there is none.

        Args:
            file: Where it is kept.
            machine: The one that is there now.

        Raises:
            InputError: The file cannot be read, or is of another machine.
        """
        if not file.exists():
            return cls(file, machine)
        try:
            content = json.loads(file.read_text())
            found = cls(
                file,
                content["machine"],
                {key: Check(**value) for key, value in content["checks"].items()},
                content["matmul"],
                {key: Group.from_json(value) for key, value in content["groups"].items()},
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{one_line(file)} does not hold what this command keeps there ({type(error).__name__}): "
                             "remove it, or name another --out.") from error  # fmt: skip
        for name in {**found.machine, **machine}:
            before, now = found.machine.get(name, "none"), machine.get(name, "none")
            if before != now:
                raise InputError(f"{one_line(file)} was measured with {name} {before}, here it is {now}: remove it, or "
                                 "name another --out.")  # fmt: skip
        return found

    def check(self, model: str, degree: int, what: str, run: Callable[[], Check]) -> Check:
        """A check that passed before, or else is made now and kept."""
        key = f"{model}|{degree}|{what}"
        if key not in self.checks or self.checks[key].verdict != PASSED:
            self.checks[key] = run()
            self.save()
        return self.checks[key]

    def group(
        self, model: str, batch: int, precision: str, degrees: Sequence[int], only: Sequence[str],
        run: Callable[[], Group] | None,
    ) -> Group | None:  # fmt: skip
        """A group that was measured before, or else is now and is kept; None where it is not to be."""
        key = "|".join((model, str(batch), precision, ",".join(map(str, degrees)), *only))
        if key not in self.groups and run is not None:
            self.groups[key] = run()
            self.save()
        return self.groups.get(key)

    def save(self) -> None:
        """Writes the file."""
        content = {
            "format": _FORMAT,
            "machine": self.machine,
            "checks": {key: each.to_json() for key, each in self.checks.items()},
            "matmul": self.matmul,
            "groups": {key: each.to_json() for key, each in self.groups.items()},
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.file, (json.dumps(content, indent=1) + "\n").encode())
