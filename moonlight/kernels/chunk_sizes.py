"""Sizes in which the pass through the model goes to work, which the plan has to know too."""

EXPERT_ROW_ALIGNMENT = {"cpu": 32, "cuda": 8, "meta": 8}
"""Tokens of which every expert's run is a multiple. oneDNN compiles a product for every new size, which takes as long
as ten such products, so there must be few; on a GPU 16 bytes suffice."""

CHUNK_ELEMENTS = 2**24
"""Logits of a chunk, 32 MiB in bfloat16, as long as that is LEAST_ROWS tokens."""
MIN_ROWS = 1024
"""Of a chunk: the gradient of the weight is as large as 163,840 columns, and is added to once a chunk."""


def logits_chunk_rows(vocabulary: int) -> int:
    """Tokens whose logits, each `vocabulary` on this rank, are there at once."""
    return max(MIN_ROWS, CHUNK_ELEMENTS // vocabulary)
