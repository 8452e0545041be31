"""A family behind Ray Serve."""
