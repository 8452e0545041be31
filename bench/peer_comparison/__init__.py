"""A straightforward export compared by Polygraphy alone, beside the proof: which tells a flip from a fault."""
