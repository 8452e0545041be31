"""Load tests and fault runs of `tocom serve`."""
