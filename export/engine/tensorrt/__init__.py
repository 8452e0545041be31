"""Plans: engines of NVIDIA TensorRT, built from a graph."""
