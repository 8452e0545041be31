"""Engines: a file and an engine library in, a runner that turns images into logits out."""
