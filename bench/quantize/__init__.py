"""What low precision costs networks that merge tokens, with default settings."""
