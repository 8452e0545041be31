"""What the user brings: options, checkpoint, compensator and images, checked before anything is written."""
