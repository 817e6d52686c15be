"""Training checkpoints, written and read by all ranks together."""
