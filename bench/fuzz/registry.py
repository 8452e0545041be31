"""All entry points, and the order in which cases are run."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from bench.fuzz import entries_family, entries_files, entries_graph, entries_images
from bench.fuzz.case import Case, Entry

ENTRIES: dict[str, Entry] = {
    entry.name: entry
    for module in (entries_family, entries_graph, entries_files, entries_images)
    for entry in module.ENTRIES
}


def cases(seed: int, only: str = "") -> Iterator[Case]:
    """Cases without end: entry points by their weights, each one's kinds of damage in turn."""
    chosen = [entry for entry in ENTRIES.values() if only.lower() in entry.name.lower()]
    queue = [(0.5 / entry.weight, index) for index, entry in enumerate(chosen)]
    heapq.heapify(queue)
    count = [0] * len(chosen)
    while queue:
        when, index = heapq.heappop(queue)
        kinds = list(chosen[index].kinds)
        number, kind = divmod(count[index], len(kinds))
        yield Case(chosen[index].name, kinds[kind], number, seed)
        count[index] += 1
        heapq.heappush(queue, (when + 1 / chosen[index].weight, index))
