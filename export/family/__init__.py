"""A family from start to end: compiled step by step, resumed, quantized, refitted."""
