"""Training checkpoints, written and read by all ranks: torch's distributed checkpoint format plus `state.json`.

May import `placement`, `parallel`, `config` and the modules below them; not `data`, the model, the optimizer or
Megatron. `direct_io`, `hf_mapping` and `state` run without torch.
"""
