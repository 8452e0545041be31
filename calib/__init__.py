"""What is learned from data: for now, self-distillation of the compensator."""
