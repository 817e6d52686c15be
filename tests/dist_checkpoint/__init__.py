"""Tests of dist_checkpoint."""
