"""Chunk sizes of the forward and backward pass. `moonlight plan` uses them too, so this module needs no torch."""

EXPERT_ROW_ALIGNMENT = {"cpu": 32, "cuda": 8, "meta": 8}
"""Each expert's segment of tokens is padded to a multiple of this, by device. oneDNN compiles a product for every new
size, which takes as long as ten such products, so sizes must be few. On a GPU, 16 bytes suffice."""

CHUNK_ELEMENTS = 2**24
"""Number of logits in a chunk, 32 MiB in bfloat16, if that is at least MIN_ROWS tokens."""
MIN_ROWS = 1024
"""Minimum number of tokens in a chunk: each chunk adds to the full weight gradient, 163,840 rows in Moonlight."""


def logits_chunk_rows(vocabulary: int) -> int:
    """Return the number of tokens in a chunk of logits; `vocabulary` is this rank's part."""
    return max(MIN_ROWS, CHUNK_ELEMENTS // vocabulary)
