"""A family that answers requests, without any protocol: queue, batches, degree, engine processes."""
