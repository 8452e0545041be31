"""Which stages there are, what each needs, and running them side by side, one thread each."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.experiment import stages
from bench.experiment.protocol import Protocol
from bench.harness.run import Tell

BACKBONE, LATENCY = "backbone.safetensors", "latency.json"


@dataclass(frozen=True)
class Job:
    """One stage with its arguments."""

    name: str  # the file it leaves in the work folder
    run: Callable[..., None]  # the stage
    arguments: Mapping[str, Any]  # what it is given after the bench and the name
    needs: tuple[str, ...]  # files of other jobs


def jobs(protocol: Protocol) -> list[Job]:
    """All jobs but the backbone, in the order they should begin."""
    plan = [
        Job(f"compensator-{method}.safetensors", stages.distill_method, {"method": method}, (BACKBONE,))
        for method in protocol.methods
    ]
    for seed in protocol.seeds:
        for source in protocol.sources:
            for task in protocol.tasks:
                name = stages.checkpoint_name(task, source, seed)
                given = {"task": task, "source": source, "seed": seed}
                plan.append(Job(name, stages.finetune, given, (BACKBONE,)))
    assessments = [("ink", 0, None)] + [
        (task, source, seed) for seed in protocol.seeds for source in protocol.sources for task in protocol.tasks
    ]
    for task, source, seed in assessments:
        checkpoint = BACKBONE if seed is None else stages.checkpoint_name(task, source, seed)
        for method in protocol.methods if source == 0 else protocol.methods[:1]:
            given = {"checkpoint": checkpoint, "task": task, "source": source, "method": method}
            needs = (checkpoint, f"compensator-{method}.safetensors")
            plan.append(Job(assessment_name(task, source, seed, method), stages.assess, given, needs))
    for seed in protocol.seeds:
        needs = tuple(stages.checkpoint_name(task, source, seed) for task in protocol.tasks
                      for source in (0, max(protocol.sources)))  # fmt: skip
        given = {"seed": seed, "degree": max(protocol.sources)}
        plan.append(Job(f"transfer-{seed}.json", stages.transfer, given, needs))
    return plan


def assessment_name(task: str, source: int, seed: int | None, method: str) -> str:
    """File of an assessment; the backbone on its own task has no seed."""
    return f"{task}-{source}-{'backbone' if seed is None else seed}-{method}.json"


def run_jobs(bench: stages.Bench, plan: Sequence[Job], tell: Tell) -> None:
    """Runs what is not there yet, as many at once as there are cores (one on a GPU).

    Every file that is needed is there or comes from an earlier job of the plan.
    """
    todo = [job for job in plan if not (bench.work / job.name).exists()]
    workers = 1 if bench.device != "cpu" else len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,))
    try:
        running: dict[Future[None], Job] = {}
        while todo or running:
            ready = [job for job in todo if all((bench.work / need).exists() for need in job.needs)]
            for job in ready[: workers - len(running)]:
                todo.remove(job)
                running[pool.submit(job.run, bench, job.name, **job.arguments)] = job
            names = ", ".join(Path(job.name).stem for job in running.values())
            tell(names, len(plan) - len(todo) - len(running))
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                future.result()
        tell("stages", len(plan))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
