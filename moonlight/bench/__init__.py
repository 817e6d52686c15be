"""Measurements: ours and its peers in one process, behind a check that both compute the same."""
