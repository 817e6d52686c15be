"""Scaling ladders and ablations."""
