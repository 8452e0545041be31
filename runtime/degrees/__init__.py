"""Which degree runs: by a budget, an accuracy or a cascade, from times of this machine."""
