"""Assign layers to pipeline stages. No torch.

All stages hold the same number of layers. If the layers do not divide evenly, the head counts as one more layer after
the last: 27 layers in 4 stages are 7, 7, 7 and 6.
"""

from moonlight.config.checks import require


def head_counts_as_layer(num_layers: int, num_chunks: int) -> bool:
    """Return True if the last of `num_chunks` model chunks has one layer less, because it holds the head."""
    return num_layers % num_chunks != 0


def check_pipeline(num_layers: int, pipeline_parallel_size: int, virtual_pipeline_parallel_size: int) -> None:
    """Raise UserError unless the layers, or layers and head, divide evenly among the model chunks."""
    chunks = pipeline_parallel_size * virtual_pipeline_parallel_size
    require(
        num_layers % chunks == 0 or (num_layers + 1) % chunks == 0,
        f"model.num_hidden_layers is {num_layers}: it, or one more (the head counted as a layer), must be a multiple "
        f"of pipeline_parallel_size x virtual_pipeline_parallel_size ({chunks})",
    )


def stage_layers(
    num_layers: int, pipeline_parallel_size: int, virtual_pipeline_parallel_size: int
) -> list[list[range]]:
    """Return the layers, counted from 0, of every chunk of every stage: `[stage][chunk]`, interleaved like Megatron."""
    layers_per_chunk = -(-num_layers // (pipeline_parallel_size * virtual_pipeline_parallel_size))

    def chunk(index: int) -> range:
        return range(index * layers_per_chunk, min((index + 1) * layers_per_chunk, num_layers))

    return [
        [chunk(virtual * pipeline_parallel_size + stage) for virtual in range(virtual_pipeline_parallel_size)]
        for stage in range(pipeline_parallel_size)
    ]
