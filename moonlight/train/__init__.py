"""The training loop, the run folder, and the modules that the loop calls: metrics, signals, watchdog, spikes.

May import `plan`, `optim`, `model`, `data`, `dist_checkpoint` and the modules below them; not `cli`, `bench`,
`studies`, `report`, `pretrain`, `checkpoints` or `eval`.
"""
