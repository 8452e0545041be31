"""What token reductions are called, in commands and in files; needs no torch."""

MERGE = "merge"
PRUNE = "prune"
REDUCTIONS = (MERGE, PRUNE)
