"""From files of text to token ids on disk: reading, tokenizer, preparing."""
