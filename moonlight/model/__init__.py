"""The Moonlight model on Megatron-Core. See `build` for the entry."""
