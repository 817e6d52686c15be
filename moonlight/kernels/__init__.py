"""Triton kernels, each next to a torch reference that computes the same, used without a GPU.

A function such as `rms_norm` selects one of the two by the device of its inputs. Imports torch and Triton only;
`chunk_sizes` runs without torch. Models and optimizers import this package.
"""
