"""The torch-free room: what a deployed family needs; numpy, Pillow and one engine library suffice.

```
family = tocom.load("engines/digits")
family.predict("photo.png", budget_ms=5)
```
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .predictor import LoadedFamily, Prediction, load

__all__ = ["LoadedFamily", "Prediction", "load"]

# Both engine libraries report to their makers over the network as soon as they are imported, unless told otherwise
# before. OpenVINO's module for that also fails where a user has no home folder; without it a stub takes its place.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
sys.modules.setdefault("openvino_telemetry", None)


def __getattr__(name: str) -> object:
    """Imports numpy and Pillow when they are first needed: commands that only explain themselves answer at once.

    Raises:
        AttributeError: There is no such name.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import predictor

    return getattr(predictor, name)
