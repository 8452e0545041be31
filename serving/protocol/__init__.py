"""The Open Inference Protocol, the limits on requests, and the page's routes, without any server."""
