"""Triton kernels, each beside the torch code that says what it computes."""
