"""What is learned from data: the compensator, by self-distillation, and the scale it is applied at."""
