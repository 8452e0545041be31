"""python -m bench.budgets: see --help."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, partial
from typing import Annotated, Any

import typer

from bench.harness import run
from bench.harness.state import State

_LIBRARIES = ("torch", "openvino")


def budgets(
    only: Annotated[str, typer.Option(help="Only these subjects, e.g. example,board-0.")] = "",
    again: Annotated[
        bool, typer.Option("--again", help="Measure times anew: where the machine was busy the last time.")
    ] = False,
    common: run.Common = run.COMMON,
) -> None:
    """Measure frontiers and cascades of the example and of the experiment's checkpoints (`make experiment`).

    The same command goes on where it stopped. Times come last, one subject after the other: let the machine do nothing
    else. --quick --only example needs no experiment.
    """
    from bench.budgets.page import write_page
    from bench.harness.page import keep_results, report

    place = common.places("budgets")
    if not common.report_only:
        from bench.budgets.measure import FULL, QUICK

        effort = QUICK if common.quick else FULL
        subjects = subjects_of(effort)
        chosen = run.names("only", only, subjects)
        state = State.load(place.state, vars(effort), fresh=common.fresh)
        if again:
            state.forget([name for name in state.results if name.startswith("times")])
            for file in (place.work / "latency").glob("*.json"):
                file.unlink()
        cases = cases_of([subjects[name] for name in chosen], effort, place)
        found: dict[str, dict[str, Any]] = {}
        for name, result in run.run_cases(state, cases).items():
            stage, _, subject = name.partition(" of ")
            found.setdefault(subject, {})[stage] = result
        keep_results(place, _LIBRARIES, {"subjects": found}, **vars(effort))
    report(place, write_page)


def subjects_of(effort: Any) -> dict[str, Any]:
    """By name, the example first."""
    from bench.budgets.subjects import Subject

    found = [Subject("example", "board")]
    found += [Subject(f"{task}-{seed}", task) for task in effort.tasks for seed in effort.seeds]
    return {subject.name: subject for subject in found}


def cases_of(subjects: list[Any], effort: Any, place: run.Places) -> dict[str, Callable[[], Any]]:
    """Everything that is measured, times last, and only of one fine-tuning of a task: they hardly depend on weights."""
    from bench.budgets import measure
    from tocom.runtime.degrees.local_latency import this_machine

    @cache
    def given(subject: Any) -> measure.Given:
        engines = subject.compile(place.work, effort.compile_sheets)
        return measure.Given.of(subject, engines, effort, place.work / f"logits-{subject.name}.npz")

    def times(subject: Any) -> dict[str, Any]:
        rows = measure.by_time(given(subject), effort, place.work / "latency")
        return {"machine": this_machine(), "load": os.getloadavg()[0], "rows": rows}

    stages = {
        "singles": lambda subject: measure.singles(given(subject)),
        "equal": lambda subject: measure.at_equal_cost(given(subject)),
        "gmacs": lambda subject: measure.by_gmacs(given(subject), effort),
        "promises": lambda subject: measure.promises(given(subject), effort),
    }
    cases = {f"{name} of {each.name}": partial(stage, each) for each in subjects for name, stage in stages.items()}
    timed = [each for each in subjects if each.seed in (None, effort.seeds[0])]
    return cases | {f"times of {each.name}": partial(times, each) for each in timed}


if __name__ == "__main__":
    run.main("bench.budgets", budgets)
