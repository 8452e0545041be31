"""The picture: how far healthy parts are off, and where the gates are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot

from bench.proof.state import Record
from bench.proof.tables import by_engine
from tocom.export.proof.parts import PARTS

_STYLE = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}
_LEAST = 0.05  # units; what is less is drawn here


def draw(records: Sequence[Record], file: Path) -> None:
    """One panel per engine: every model's worst error of every kind of part, in unit roundoffs, and the gate.

    Args:
        records: Models.
        file: PNG to write.
    """
    engines = by_engine(records)
    with pyplot.rc_context(_STYLE):
        columns = min(3, len(engines))
        rows = -(-len(engines) // columns)
        figure, axes = pyplot.subplots(
            rows, columns, figsize=(3.1 * columns, 2.3 * rows), sharex=True, sharey=True, squeeze=False
        )
        for axis, ((backend, precision), of_it) in zip(axes.flat, engines.items(), strict=False):
            for height, part in enumerate(reversed([each for each in PARTS if each != "decision"])):
                values = np.array([r["units"][part] for r in of_it if part in r.get("units", {})])
                jitter = np.random.default_rng(0).uniform(-0.25, 0.25, len(values))
                passed = np.array([r["passed"] for r in of_it if part in r.get("units", {})], bool)
                for chosen, colour in ((passed, "#1f5fa8"), (~passed, "#c23b22")):
                    axis.plot(np.maximum(values[chosen], _LEAST), height + jitter[chosen], ".", color=colour,
                              markersize=2.5, alpha=0.7)  # fmt: skip
            allowed = next((record["allowed"]["part"] for record in of_it if "allowed" in record), None)
            if allowed is not None:
                axis.axvline(allowed, color="#b5651d", linewidth=1.2)
            axis.set(title=f"{backend} {precision}", xscale="log", ylim=(-0.6, len(PARTS) - 1.4))
            axis.set_yticks(range(len(PARTS) - 1), list(reversed([each for each in PARTS if each != "decision"])))
        for axis in axes[-1]:
            axis.set_xlabel("worst error, units of u")
        for axis in axes.flat[len(engines) :]:
            axis.set_visible(False)
        figure.tight_layout()
        figure.savefig(file, dpi=100, metadata={"Software": None})
        pyplot.close(figure)
