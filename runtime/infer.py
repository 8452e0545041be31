"""The command that classifies images with an engine of a family: `python runtime/infer.py --engines DIR IMAGE...`."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

if not __package__:
    # Run as a file, perhaps from a copied folder: this folder is then a package of its own, under whatever name.
    # Python put it on the path, where our modules could shadow a library's.
    _here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != _here]
    __package__ = re.sub(r"\W", "_", _here.name)
    _spec = importlib.util.spec_from_file_location(__package__, _here / "__init__.py")
    sys.modules[__package__] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[__package__])

import numpy as np

from .degrees.cascade import run
from .errors import GateError, InputError, one_line, readable
from .predictor import LoadedFamily, Prediction
from .preprocess import find_images

_Fail = Callable[[object], None]

_PROG = "python runtime/infer.py"
_EXAMPLES = """\
examples:
  python runtime/infer.py --engines engines/digits photo.png          the least compressed engine, one line per image
  python runtime/infer.py --engines engines/digits --degree 8 folder  every image below a folder
  python runtime/infer.py --engines engines/digits --budget-ms 5 a.png  the most accurate degree that takes 5 ms or less
  find photos -name '*.jpg' | python runtime/infer.py --engines engines/digits --json -

Images that lie in folders named like their class (or its index) are also scored: the last line on stderr
then tells the share that is correct. A budget goes by times measured on this machine, once, and by accuracies that
the family was compiled with. Exit status: 0 done, 1 no degree keeps to the budget or accuracy, 2 bad usage or an image
that could not be used.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help explains the options)")


def main(argv: list[str] | None = None, *, prog: str = _PROG) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; those of the process by default.
        prog: How the user calls it. As "tocom infer" the family is the first argument, as in all its commands;
            --engines is still understood.

    Returns:
        Exit status: 0 done; 1 no degree keeps to the budget or accuracy; 2 bad usage, or some image could not be used
        (the others were still classified); 130 interrupted; 141 the reader of the output stopped reading.
    """
    _keep_odd_names_printable()
    try:
        return _run(_parser(prog, argv if argv is not None else sys.argv[1:]).parse_args(argv))
    except BrokenPipeError:
        _abandon_stdout()
        return 141
    except KeyboardInterrupt:
        return 130
    except GateError as error:
        _complain(error)
        return 1
    except (InputError, OSError) as error:
        _complain(error)
        return 2


def _parser(prog: str, argv: list[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog,
        description="Classify images with an engine of a compiled family. Needs neither torch nor timm.",
        epilog=_EXAMPLES if prog == _PROG else _EXAMPLES.replace(f"{_PROG} --engines", prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    family = "folder of the family (family.json)"
    if prog == _PROG or any(argument.partition("=")[0] == "--engines" for argument in argv):
        parser.add_argument("--engines", required=True, metavar="DIR", type=Path, help=family)
    else:
        parser.add_argument("engines", metavar="FAMILY", type=Path, help=family)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders, or - for paths on stdin")
    parser.add_argument("--degree", type=int, metavar="R", help="which engine (default: the lowest degree there is)")
    parser.add_argument("--budget-ms", type=float, metavar="MS", help="the most accurate degree that takes no longer")
    parser.add_argument("--min-accuracy", type=float, metavar="SHARE", help="the fastest degree as accurate, in 0..1")
    parser.add_argument("--cascade", action="store_true", help="a high degree first, a lower one where that is unsure")
    parser.add_argument("--top-k", type=_at_least_one, default=1, metavar="K", help="classes per image (default: 1)")
    parser.add_argument("--json", action="store_true", help="one JSON object per image and line")
    parser.add_argument("--batch", type=_at_least_one, metavar="B", help="images per call (default: 32; by a budget 1)")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="class names, one a line, instead of the family's")
    parser.add_argument("--throughput", action="store_true", help="many images a second before a short single call")
    parser.add_argument("--threads", type=_at_least_one, metavar="T", help="CPU threads (default: the engine's choice)")
    return parser


def option_names() -> set[str]:
    """Every option of the command, with its dashes."""
    return {name for action in _parser(_PROG, [])._actions for name in action.option_strings}


def _at_least_one(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, got {one_line(text)}")
    return number


def _run(options: argparse.Namespace) -> int:
    settings = {"threads": options.threads, "throughput": options.throughput}
    with LoadedFamily(options.engines, **settings) as family:
        _ensure_one_wish(options)
        batch_size = options.batch or (32 if options.budget_ms is None else 1)
        degrees, why = _choose(family, options, batch_size)
        for degree in degrees:
            family.check(degree)
        if why is not None:
            _complain(why)
        if options.degree is not None or why is None:
            _warn_of_no_gain(family, degrees[0])
        manifest = family.family
        names = manifest.class_names if options.classes is None else _read_names(options.classes, manifest.classes)
        for degree in degrees:
            prepared_for = batch_size if degree == degrees[0] and (options.cascade or why is not None) else None
            family.open(degree, batch=prepared_for)  # of a cascade, fewer images go on, never the same number
        return _classify(family, degrees, options, batch_size, names)


def _ensure_one_wish(options: argparse.Namespace) -> None:
    wishes = {"--degree": options.degree, "--budget-ms": options.budget_ms, "--min-accuracy": options.min_accuracy,
              "--cascade": options.cascade or None}  # fmt: skip
    names = [name for name, value in wishes.items() if value is not None]
    if len(names) > 1 and names != ["--budget-ms", "--min-accuracy"]:
        raise InputError(f"{' and '.join(names)} exclude each other: give a degree, or a budget or an accuracy to "
                         "choose one by, or --cascade")  # fmt: skip
    if options.budget_ms is not None and (options.threads or options.throughput):
        raise InputError("--budget-ms goes by times with the engine's own choice of threads: leave out --threads and "
                         "--throughput")  # fmt: skip


def _choose(family: LoadedFamily, options: argparse.Namespace, batch: int) -> tuple[tuple[int, ...], str | None]:
    """Degrees in the order in which they may run, and how they were chosen; None where the user named them."""
    if options.cascade:
        stages = family.cascade.stages
        thresholds = ", ".join(f"{stage.threshold:.3f} at degree {stage.degree}" for stage in stages[:-1])
        why = f"images go on to the next degree below a confidence of {thresholds}" if thresholds else None
        return family.cascade.degrees, why
    wish = {"budget_ms": options.budget_ms, "min_accuracy": options.min_accuracy}
    if options.budget_ms is None and options.min_accuracy is None:
        return (family.choose(degree=options.degree),), None
    points = {point.degree: point for point in family.points(batch, tell=_complain)}
    chosen = points[family.choose(**wish, batch=batch)]
    rule = "the fastest" if options.budget_ms is None else "the most accurate"
    limits = [] if options.budget_ms is None else [f"takes {options.budget_ms:g} ms or less"]
    limits += [] if options.min_accuracy is None else [f"has an accuracy of {options.min_accuracy:g} or more"]
    accuracy = "" if chosen.top1 is None else f", accuracy {chosen.top1:.4g}"
    why = (f"chose degree {chosen.degree}, {rule} that {' and '.join(limits)} at batch {batch}: "
           f"{chosen.p50_ms:.3g} ms{accuracy}")  # fmt: skip
    return (chosen.degree,), why


def _warn_of_no_gain(family: LoadedFamily, degree: int) -> None:
    if idle := [batch for batch, pays in family.family.entry(degree).pays.items() if not pays]:
        _complain(f"degree {degree} was not faster than degree 0 where it was compiled, at batch {', '.join(idle)}")


def _classify(
    family: LoadedFamily,
    degrees: tuple[int, ...],
    options: argparse.Namespace,
    batch_size: int,
    names: tuple[str, ...] | None,
) -> int:
    """Classifies all images and prints what they are; returns the exit status."""
    failures: list[str] = []

    def fail(error: object) -> None:
        failures.append(str(error))
        _complain(error)

    score, start = _Score(names, family.family.classes), time.perf_counter()
    for batch in _batches(_prepare(_paths(options.images, fail), family, fail), batch_size):
        pixel_values = np.concatenate([pixels for _, pixels in batch])
        if options.cascade:
            answer = run(family.cascade, family.logits, pixel_values)
            logits, answered = answer.logits, answer.degrees.tolist()
        else:
            logits, answered = family.logits(pixel_values, degrees[0]), [degrees[0]] * len(batch)
        results: list[tuple[Path, Prediction]] = []
        for (path, _), row, degree in zip(batch, logits, answered, strict=True):
            if np.isfinite(row).all():
                results.append((path, Prediction.of(row, names, options.top_k, degree)))
                score.add(*results[-1])
            else:
                fail(f"{one_line(path)}: logits must be finite, got others: compile degree {degree} again")
        _print(_json_lines(results) if options.json else _aligned_lines(results))
    ran = f"{'cascade of degrees' if options.cascade else 'degree'} {', '.join(map(str, degrees))}"
    _tell_summary(score, len(failures), ran, time.perf_counter() - start)
    return 2 if failures else 0


def _read_names(file: Path, classes: int) -> tuple[str, ...]:
    try:
        names = tuple(file.read_text(encoding="utf-8-sig").splitlines())
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        raise InputError(f"--classes {one_line(file)} cannot be read: {one_line(error)}") from error
    if len(names) != classes:
        raise InputError(f"--classes must name the family's {classes} classes, one a line, got {len(names)} lines")
    return names


class _Score:
    """Counts how many images lie in a folder named like the predicted class.

    A folder name is read as a class name or as a class index, but one way for all images: with classes called "0", "1",
    "10", the folder "10" must not mean one class for one image and another for the next.
    """

    def __init__(self, names: tuple[str, ...] | None, classes: int) -> None:
        self._names = frozenset(names or ())
        self._indices = {str(index): index for index in range(classes)}
        self.degrees: Counter[int] = Counter()
        self.images = self._named = self._named_right = self._indexed = self._indexed_right = 0

    def add(self, path: Path, result: Prediction) -> None:
        # absolute: an image given as "cat.png" from within its folder has the same label
        label = path.absolute().parent.name
        self.images += 1
        self.degrees[result.degree] += 1
        self._named += label in self._names
        self._named_right += label == result.names[0]
        self._indexed += label in self._indices
        self._indexed_right += self._indices.get(label) == result.classes[0]

    @property
    def correct(self) -> int | None:
        """Images classified correctly; None unless the label of every image is known."""
        if self.images and self._named == self.images:
            return self._named_right
        if self.images and self._indexed == self.images:
            return self._indexed_right
        return None


def _paths(arguments: Iterable[str], fail: _Fail) -> Iterator[Path]:
    for argument in arguments:
        for path in _lines_of_stdin() if argument == "-" else (argument,):
            try:
                yield from find_images([path])
            except InputError as error:
                fail(error)


def _lines_of_stdin() -> Iterator[str]:
    if sys.stdin is None:
        raise InputError("- stands for paths on stdin, which is closed")
    for line in sys.stdin:
        if path := line.rstrip("\r\n"):
            yield path


def _prepare(paths: Iterable[Path], family: LoadedFamily, fail: _Fail) -> Iterator[tuple[Path, np.ndarray]]:
    for path in paths:
        try:
            pixels = family.prepare(path)
        except InputError as error:
            message = str(error)
            fail(message if one_line(path) in message else f"{one_line(path)}: {message}")
        else:
            yield path, pixels


def _batches(prepared: Iterable[tuple[Path, np.ndarray]], batch_size: int) -> Iterator[list[tuple[Path, np.ndarray]]]:
    batch: list[tuple[Path, np.ndarray]] = []
    for item in prepared:
        batch.append(item)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _json_lines(results: Iterable[tuple[Path, Prediction]]) -> Iterator[str]:
    for path, result in results:
        predictions = [
            {"class": index, "name": name, "probability": probability}
            for index, name, probability in zip(result.classes, result.names, result.probabilities, strict=True)
        ]
        yield json.dumps({"file": str(path), "degree": result.degree, "predictions": predictions})


def _aligned_lines(results: Iterable[tuple[Path, Prediction]]) -> Iterator[str]:
    rows = [
        (one_line(path), str(index) if name is None else one_line(name), probability)
        for path, result in results
        for index, name, probability in zip(result.classes, result.names, result.probabilities, strict=True)
    ]
    path_width = max((len(path) for path, _, _ in rows), default=0)
    name_width = max((len(name) for _, name, _ in rows), default=0)
    for path, name, probability in rows:
        yield f"{path:<{path_width}}  {name:<{name_width}}  {probability:.4f}"


def _print(lines: Iterable[str]) -> None:
    """Prints and flushes, so that a reader gets each batch as soon as it is done."""
    for line in lines:
        print(line)
    print(end="", flush=True)


def _tell_summary(score: _Score, failed: int, engines: str, elapsed: float) -> None:
    parts = [f"{score.images} image{'' if score.images == 1 else 's'}", engines]
    if score.images:
        parts.append(f"{score.images / max(elapsed, 1e-9):.1f} images/s")
    if len(score.degrees) > 1:
        parts += [f"{count / score.images:.1%} at degree {degree}" for degree, count in sorted(score.degrees.items())]
    if score.correct is not None:
        share = score.correct / score.images
        parts.append(f"{share:.2%} correct ({score.correct} of {score.images}, labels from folder names)")
    if failed:
        parts.append(f"{failed} failed")
    _complain(", ".join(parts))


def _complain(message: object) -> None:
    print(f"infer: {readable(message)}", file=sys.stderr)


def _keep_odd_names_printable() -> None:
    """File names need not be valid text: read them losslessly, print what cannot be printed as escapes."""
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    ):
        # A stream that is closed, replaced by another kind, or already read from stays as it is.
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors=errors)


def _abandon_stdout() -> None:
    """Sends the rest nowhere, or Python would flush into the broken stream at exit and complain about it."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a file descriptor needs no care
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)


if __name__ == "__main__":
    sys.exit(main())
