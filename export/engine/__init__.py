"""ONNX graph -> engine, and how long it takes."""
