"""What low precision does to a network that merges tokens: an accuracy study."""
