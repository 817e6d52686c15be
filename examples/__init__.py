"""Examples of the Muon optimizer alone: programs that train plain torch models with Muon and with AdamW.

The package imports `moonlight.optim.muon`, `moonlight.studies` and helpers; no other package imports it.
"""
