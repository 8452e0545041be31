"""What a request says of its degree, and what it is answered with."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class DegreeRequest:
    """What a request says of the degree.

    Attributes:
        degree: This one, whatever the load.
        min_degree: At least this compressed.
        max_degree: At most this compressed, whatever the load.
        budget_ms: At least as compressed as the most accurate degree whose call for one image keeps to it, in ms; the
            service makes a min_degree of it.
        min_accuracy: At most as compressed as the most compressed degree that was measured to be as accurate, a share
            in 0..1; the service makes a max_degree of it.
    """

    degree: int | None = None
    min_degree: int | None = None
    max_degree: int | None = None
    budget_ms: float | None = None
    min_accuracy: float | None = None

    def allows(self, degree: int) -> bool:
        """Whether the request may run at a degree."""
        return (
            (self.degree is None or degree == self.degree)
            and (self.min_degree is None or degree >= self.min_degree)
            and (self.max_degree is None or degree <= self.max_degree)
        )

    def __str__(self) -> str:
        """As it is told to clients: "min_degree 8, max_degree 16".

        >>> str(DegreeRequest(min_degree=8, max_degree=16))
        'min_degree 8, max_degree 16'
        """
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return ", ".join(f"{name} {value}" for name, value in values.items()) or "any degree"


ANY_DEGREE = DegreeRequest()


@dataclass(frozen=True)
class Answer:
    """What a request is answered with.

    Attributes:
        logits: float32 [n, classes].
        degree: They were computed at.
        queue_ms: From when the request came to when its batch began, in ms.
        engine_ms: Of the batch, in ms.
    """

    logits: np.ndarray
    degree: int
    queue_ms: float
    engine_ms: float
