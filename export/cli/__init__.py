"""The `tocom` command: one file per command, and what they share."""
