"""A recipe on N GPUs, from formulas alone: memory, bytes on the wire, seconds. No model is built, no torch imported."""
