"""The torch-free room: what a deployed family needs; numpy, Pillow and one engine library suffice."""
