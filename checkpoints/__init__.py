"""From checkpoints to Hugging Face folders, and the proof that both hold the same model."""
