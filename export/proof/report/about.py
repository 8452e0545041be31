"""What a report is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tocom.export.proof.report.pictures import MergePicture

Pictures = Mapping[int, Sequence[MergePicture]]


@dataclass(frozen=True)
class About:
    """What a report is about.

    Attributes:
        title: Of the report.
        model: Name of the model.
        candidate: What was validated.
        against: What it was compared with.
        date: When.
        versions: Library -> version.
        checkpoint_sha256: Hash of the weights; None where unknown.
        compensator_sha256: Hash of the compensator; None without one.
        command: That makes the report again.
    """

    title: str
    model: str
    candidate: str
    against: str
    date: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    checkpoint_sha256: str | None = None
    compensator_sha256: str | None = None
    command: str = ""
