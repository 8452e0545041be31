"""Results in one form of file, and pages that are written from them alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import pandas as pd

from bench.harness.machine import machine, versions
from bench.harness.run import Places, command_line
from tocom.runtime.errors import InputError, one_line
from tocom.runtime.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BENCH = Path(__file__).resolve().parents[1]
_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
          "legend.frameon": False}  # fmt: skip
_NUMBER = r"-|\**[-+±<]?\d.*"


def setup(libraries: Iterable[str], **more: Any) -> dict[str, Any]:
    """The head of a results file: how, when and where it was measured."""
    today = pd.Timestamp.now().date().isoformat()
    return {"command": command_line(), "date": today, "machine": machine(), "libraries": versions(libraries), **more}


def keep_results(place: Places, libraries: Iterable[str], results: Mapping[str, Any], **more: Any) -> None:
    """Writes a campaign's results below such a head."""
    write_results(place.results, {"setup": setup(libraries, **more), **results})


def report(place: Places, write: Callable[[dict[str, Any], Path], None]) -> dict[str, Any]:
    """Writes a campaign's page from its results, and returns them."""
    results = read_results(place.results)
    write(results, place.page)
    print(f"wrote {place.page}")
    return results


def write_results(file: Path, results: Mapping[str, Any]) -> None:
    """Writes results as JSON, a record to a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, (_lines(results) + "\n").encode())


def read_results(file: Path) -> dict[str, Any]:
    """The results that a page is written from.

    Raises:
        InputError: There are none.
    """
    try:
        return json.loads(file.read_text())
    except FileNotFoundError as error:
        raise InputError(f"nothing finished lies in {one_line(file)}: run without --report-only") from error


def _lines(value: Any) -> str:
    """JSON in which every record without records inside stands on a line."""
    inside = list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    if not any(map(_holds_records, inside)):
        return json.dumps(value)
    if isinstance(value, Mapping):
        return "{\n" + ",\n".join(f"{json.dumps(name)}: {_lines(each)}" for name, each in value.items()) + "\n}"
    return "[\n" + ",\n".join(map(_lines, value)) + "\n]"


def _holds_records(value: Any) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, list | tuple) and any(map(_holds_records, value)))


def render(template: str, out: Path, **values: Any) -> None:
    """Writes a page from a template below bench/, which has the filters `table` and `spread`."""
    loader = jinja2.FileSystemLoader(BENCH)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True, keep_trailing_newline=True)  # fmt: skip
    environment.filters |= {"table": table, "spread": spread, "listed": listed}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, environment.get_template(template).render(values).encode())


def table(rows: pd.DataFrame | Sequence[Mapping[str, Any]]) -> str:
    """A table in Markdown: numbers to the right, text to the left, nothing for None."""
    frame = pd.DataFrame(rows).convert_dtypes().astype(object)  # whole numbers stay whole beside missing ones
    frame = frame.where(frame.notna(), "").astype(str)
    align = ["right" if frame[name].replace("", "0").str.fullmatch(_NUMBER).all() else "left" for name in frame]
    return frame.to_markdown(index=False, disable_numparse=True, colalign=align)


def spread(quartiles: Sequence[float] | None, form: str) -> str:
    """A median with its quartiles, each in a format; nothing where there is none.

    >>> spread((0.9, 1, 1.2), "{:.1f}x")
    '1.0x (0.9x to 1.2x)'
    """
    if quartiles is None:
        return ""
    low, middle, high = map(form.format, quartiles)
    return f"{middle} ({low} to {high})"


def listed(names: Sequence[Any]) -> str:
    """Names or numbers in a sentence.

    >>> listed([1, 2.5, "c"])
    '1, 2.5 and c'
    """
    *head, last = map(str, names)
    return f"{', '.join(head)} and {last}" if head else last


def cell(text: str) -> str:
    """Text from elsewhere as code in a cell of a table."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text[:200])
    return "`` " + shown.replace("|", "\\|").replace("`", "'") + " ``" if shown else ""


@contextmanager
def figure(file: Path, *shape: int, **how: Any) -> Iterator[tuple[Figure, Any]]:
    """A figure with its axes, as `pyplot.subplots` makes them, written at the end to a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(_STYLE):
        drawn, axes = pyplot.subplots(*shape, **how)
        yield drawn, axes
        file.parent.mkdir(parents=True, exist_ok=True)
        drawn.tight_layout()
        drawn.savefig(file, dpi=110, metadata={"Software": None})
        pyplot.close(drawn)
