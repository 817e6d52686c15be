"""Training checkpoints to Hugging Face folders and back, with model card, verification, averaging and release.

Each command runs in one process and reads tensor by tensor. The package imports `moonlight`, and neither `pretrain`
nor `eval`; only `verify` builds a model.
"""
