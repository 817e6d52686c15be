"""`moonlight plan`: memory, communication and step time of a recipe on N GPUs, from formulas alone.

Imports config, placement, hardware and the mapping of checkpoint tensors, without torch. Two modules do import torch:
`dry_run` and `comm_counter`, which build one real rank on the meta device and count it.
"""
