"""Every setting of a run, and recipes on disk."""
