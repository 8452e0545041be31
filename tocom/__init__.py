"""The method in PyTorch: token merging, merge schedules, the compensator and the reference ViT."""
