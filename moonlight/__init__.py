"""Train DeepSeek-V3-style mixtures of experts with Muon, from text to a Hugging Face checkpoint."""

__version__ = "0.1.0"
