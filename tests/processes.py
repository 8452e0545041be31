"""Processes of their own for tests, which share one import of torch and of the compiler."""

from __future__ import annotations

import multiprocessing

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tocom.export.family.compile", "tocom.export.cli.__main__"])
