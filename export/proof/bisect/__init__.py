"""A failed validation -> the block, operator or piece of the graph that is to blame."""
