"""What all campaigns share: the command line, state that a kill does not lose, the machine's lines, and pages."""
