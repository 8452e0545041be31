"""The compiler: fuse, lower to ONNX, build an engine, validate it; and the `tocom` command."""
