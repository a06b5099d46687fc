"""One training run: setup, loop, checkpoints, resumption."""
