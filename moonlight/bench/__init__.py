"""`moonlight bench`: benchmarks against peer implementations, each behind a correctness gate that must pass first.

May import every layer below, and Megatron. Not studies, report or cli. Optional peers (muon-optimizer, datasets,
gram-newton-schulz) are imported only if installed.
"""
