"""Muon and AdamW: update rules, Newton-Schulz, distributed Muon and data parallelism with owner ranks.

`distributed_muon.build_optimizer` builds the optimizer of a run; `muon.Muon` is a plain torch optimizer. Imports
moonlight.model, moonlight.placement, moonlight.kernels and other layers below, not moonlight.plan or moonlight.train.
"""
