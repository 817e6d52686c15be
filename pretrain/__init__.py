"""The training command: `moonlight pretrain`, or `torchrun ... -m pretrain`."""
