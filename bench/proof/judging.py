"""Is what was measured of a model within the gates? By those of today, so that another gate needs no new campaign."""

from __future__ import annotations

from bench.proof.state import Record
from bench.proof.tables import MIDDLE_TOKEN
from tocom.export.proof.gates import GATES
from tocom.export.proof.parts import PARTS


def judged(record: Record) -> Record:
    """A model's record with the verdict of the gates in use.

    Args:
        record: See `bench.proof.case.measured`; one without measurements keeps its verdict.
    """
    if "units" not in record:
        return record
    gates, units = GATES[record["precision"]], record["units"]
    allowed = {**record["allowed"], "part": gates.part, MIDDLE_TOKEN: gates.middle}
    limits = {**dict.fromkeys(PARTS, gates.part), MIDDLE_TOKEN: gates.middle}
    faults = [f"{name}: {units[name]:.1f} u, allowed {limit:g} u" for name, limit in limits.items()
              if not units.get(name, 0.0) <= limit]  # fmt: skip
    if record["unexplained"]:
        faults.append(f"{record['unexplained']} decisions unexplained")
    faults += [f"{name}: {share:.2f} of what is allowed" for name, share in record["shares"].items() if not share <= 1]
    return {**record, "allowed": allowed, "passed": not faults, "faults": faults}
