"""Engines on a GPU: are they right there, and how fast are they beside what a user would pick instead."""
