"""Ablations: variants of one recipe, trained side by side and compared with a baseline."""
