"""Assignment of parameters to Muon or AdamW, of rows to owner ranks, and the bytes that follow. No torch.

`owners` assigns owner ranks and builds buckets, `param_groups` holds the rules, `comm_bytes` counts bytes. Imports
moonlight.config and the layers below only; both the optimizer and `moonlight plan` import this package.
"""
