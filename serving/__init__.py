"""Families behind servers: MLServer, Ray Serve, Triton repositories, and the page."""
