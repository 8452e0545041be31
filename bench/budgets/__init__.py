"""Frontiers and cascades of the example and of the experiment's tasks."""
