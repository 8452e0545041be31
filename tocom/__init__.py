"""ToCom: one fine-tuned Vision Transformer as a family of engines, one per token-compression degree.

```
import tocom

family = tocom.load("engines/digits")
family.predict("photo.png", budget_ms=5)
```

This package is the public door and the method in PyTorch (`tocom.merging`, `tocom.compensator`, ...). `tocom.runtime`
runs families and needs no torch, `tocom.export` compiles them, `tocom.calib` trains and quantizes, `tocom.serving`
serves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tocom import runtime

if TYPE_CHECKING:
    from tocom.runtime import LoadedFamily, Prediction, load

__all__ = ["LoadedFamily", "Prediction", "load"]


def __getattr__(name: str) -> object:
    """Imports numpy and Pillow when they are first needed: commands that only explain themselves answer at once.

    Raises:
        AttributeError: There is no such name.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(runtime, name)
