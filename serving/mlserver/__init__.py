"""A family behind MLServer: HTTP and gRPC."""
