"""The optimizer on its own: programs that train ordinary torch models with it, and with AdamW beside it."""
