"""Damaged files at every entry point: a clear refusal or a right answer, and nothing else."""
