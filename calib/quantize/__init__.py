"""Post-training quantization of a network that reduces tokens: ranges, migrations, rounding, and what they cost."""
