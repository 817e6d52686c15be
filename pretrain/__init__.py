"""Launch training: `moonlight pretrain` locally, `torchrun ... -m pretrain` on many nodes, and the health check.

May import `moonlight.train` and the modules below it; not `checkpoints`, `eval`, Megatron, or the packages above
(`moonlight.cli`, `bench`, `studies`, `report`).
"""
