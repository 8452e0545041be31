"""Engines on a CPU, ours beside what a user would pick instead."""
