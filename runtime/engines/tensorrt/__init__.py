"""TensorRT and TensorRT for RTX, which share one runner."""
