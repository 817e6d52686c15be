"""Evaluation of exported models: benchmark suites, held-out text, exact match; also generation and the code sandbox.

The package reads Hugging Face folders with transformers or vLLM. It imports `moonlight`, and neither `pretrain` nor
`checkpoints`; `confine` imports only the standard library.
"""
