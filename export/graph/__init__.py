"""What an ONNX graph goes through, from fused weights to the file that an engine opens."""
