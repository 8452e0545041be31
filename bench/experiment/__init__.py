"""The paper's central experiment at a scale that fits a small machine: `make experiment`."""
