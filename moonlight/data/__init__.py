"""Training data: readers, tokenizers, preparation of text and conversations, datasets, mixtures.

Imports moonlight.config, moonlight.files and other layers below. It does not import moonlight.dist_checkpoint,
moonlight.model or any other layer above. Only `loader` imports torch when it is imported.
"""
