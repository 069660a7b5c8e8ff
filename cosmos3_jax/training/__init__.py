"""Training of the two towers: loss, step, files. Needs the extra `train` (optax, orbax)."""
