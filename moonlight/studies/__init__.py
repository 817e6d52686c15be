"""`moonlight scaling` and `moonlight ablate`: scaling ladders and ablations, with their runs, fits, tables and plots.

May import every layer below: pretrain, checkpoints, train, plan, optim, data, placement, config. Not bench, report, cli
or megatron. The runs are processes of `moonlight pretrain`; torch is imported only to read their checkpoints.
"""
