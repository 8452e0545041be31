"""What was measured already, so that a run that was interrupted goes on."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tocom.runtime.errors import InputError, one_line
from tocom.runtime.files import write_atomically


@dataclass
class State:
    """Results by name, beside the settings that they were measured with.

    Attributes:
        file: Where they are kept.
        settings: JSON-ready.
        results: JSON-ready.
    """

    file: Path
    settings: dict[str, Any]
    results: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, file: Path, settings: dict[str, Any], *, fresh: bool = False) -> State:
        """Goes on with what is in a file.

        Args:
            file: Need not exist.
            settings: Of this run.
            fresh: Whether to begin anew.

        Raises:
            InputError: The file is of other settings.
        """
        settings = json.loads(json.dumps(settings))
        if fresh or not file.exists():
            return cls(file, settings)
        kept = json.loads(file.read_text())
        if kept["settings"] != settings:
            raise InputError(f"{one_line(file)} is of other settings: give --fresh to begin anew")
        return cls(file, settings, kept["results"])

    def keep(self, name: str, result: Any) -> None:
        """Adds a result and writes everything."""
        self.results[name] = result
        self.file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"settings": self.settings, "results": self.results}, indent=1)
        write_atomically(self.file, text.encode())
