"""The shipped example and the script that reproduces it."""
