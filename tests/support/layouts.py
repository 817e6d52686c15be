"""Functions that multi-process tests run on each rank, and the assembly of their answers into full tensors."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moonlight.config.data import DataConfig
from moonlight.config.model import ModelConfig
from moonlight.config.optimizer import OptimizerConfig
from moonlight.config.parallel import ParallelConfig
from moonlight.config.run import RunConfig
from moonlight.config.schedule import ScheduleConfig
from moonlight.config.train import TrainConfig

LAYOUTS: dict[str, tuple[int, ParallelConfig]] = {
    "1": (1, ParallelConfig()),
    "DP2": (2, ParallelConfig()),
    "DP4": (4, ParallelConfig()),
    "TP2": (2, ParallelConfig(tensor_parallel_size=2)),
    "TP2-ETP2": (2, ParallelConfig(tensor_parallel_size=2, expert_tensor_parallel_size=2)),
    "PP2": (2, ParallelConfig(pipeline_parallel_size=2)),
    "PP2-interleaved": (2, ParallelConfig(pipeline_parallel_size=2, virtual_pipeline_parallel_size=2)),
    "EP2": (2, ParallelConfig(expert_parallel_size=2)),
    "EP2xTP2": (2, ParallelConfig(expert_parallel_size=2, tensor_parallel_size=2)),
    "EP2xTP2-4": (4, ParallelConfig(expert_parallel_size=2, tensor_parallel_size=2)),
    "EP2xTP2-ETP2-4": (
        4,
        ParallelConfig(expert_parallel_size=2, tensor_parallel_size=2, expert_tensor_parallel_size=2),
    ),
    "EP2xPP2": (4, ParallelConfig(expert_parallel_size=2, pipeline_parallel_size=2)),
    "EP2xDP2": (4, ParallelConfig(expert_parallel_size=2)),
    "TP2xPP2": (4, ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2)),
    "EP2xTP2xPP2": (4, ParallelConfig(expert_parallel_size=2, tensor_parallel_size=2, pipeline_parallel_size=2)),
}
"""Name -> (processes, layout)."""


def recipe(parallel: ParallelConfig = ParallelConfig(), **train: Any) -> RunConfig:  # noqa: B008
    """Return the config of a Moonlight with four layers, small enough for fast steps."""
    train = {"train_steps": 20, "global_batch_size": 8, "micro_batch_size": 2, "seed": 5} | train
    return RunConfig(
        name="test",
        model=ModelConfig(
            vocab_size=96,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=8,
            intermediate_size=64,
            moe_intermediate_size=24,
            num_experts=8,
            num_experts_per_tok=2,
            num_shared_experts=2,
            max_position_embeddings=64,
            initializer_range=0.08,
            aux_loss_alpha=0.01,
        ),
        data=DataConfig(path="none", tokenizer="none", sequence_length=32),
        optimizer=OptimizerConfig(newton_schulz_dtype="float32"),
        schedule=ScheduleConfig(lr=2e-3, warmup_steps=2),
        parallel=replace(parallel, bucket_size=4_000),  # several buckets, several rounds
        train=TrainConfig(**train),
    )


def global_batch(config: RunConfig, step: int, masked: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random tokens [global_batch_size, sequence_length + 1] of a step, and the loss mask of their labels."""
    generator = torch.Generator().manual_seed(1000 + step)
    shape = (config.train.global_batch_size, config.data.sequence_length)
    tokens = torch.randint(0, config.model.vocab_size, (shape[0], shape[1] + 1), generator=generator)
    mask = (torch.rand(shape, generator=generator) >= masked).float()
    return tokens, mask


def local_batches(config: RunConfig, step: int, masked: float = 0.0) -> list[Any]:
    """Return this data-parallel rank's micro-batches of a step."""
    from megatron.core import parallel_state

    from moonlight.train.forward_backward import MicroBatch, compute_document_ids

    tokens, mask = global_batch(config, step, masked)
    apart = config.data.mask_documents or config.data.reset_positions
    if apart:
        tokens = torch.where(tokens % 8 == 0, 0, tokens)  # 0 ends a document: about eight tokens each
    size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    local_tokens, local_mask = tokens.chunk(size)[rank], mask.chunk(size)[rank]
    return [
        MicroBatch(t[:, :-1], t[:, 1:], m, compute_document_ids(t[:, :-1], 0) if apart else None)
        for t, m in zip(
            local_tokens.split(config.train.micro_batch_size),
            local_mask.split(config.train.micro_batch_size),
            strict=True,
        )
    ]


def build(config: RunConfig) -> tuple[list[Any], Any]:
    """Create the process groups; return model chunks with initial weights, and their optimizer."""
    from moonlight import parallel
    from moonlight.model.build import build_model
    from moonlight.model.shards import init_weights
    from moonlight.optim.distributed_muon import build_optimizer

    parallel.init_model_parallel(config.parallel, config.train.seed)
    model_chunks = build_model(config)
    optimizer = build_optimizer(model_chunks, config)
    with optimizer.loading_masters() as state:
        init_weights(state, config.model, config.train.seed)
    return model_chunks, optimizer


Chunk = tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]


def collect(model_chunks: list[Any]) -> list[Chunk]:
    """Return (key, full shape, offset, values) of every model tensor on this rank."""
    from moonlight.model.shards import collect_sharded_tensors, local_chunks

    return flatten({key: local_chunks(sharded) for key, sharded in collect_sharded_tensors(model_chunks).items()})


def flatten(state: dict[str, Any]) -> list[Chunk]:
    """Return the chunks of every `LocalChunks`, as arrays."""
    return [
        (key, tensor_chunks.shape, offset, values.detach().float().numpy().copy())
        for key, tensor_chunks in state.items()
        for offset, values in tensor_chunks.chunks
    ]


def flatten_gradients(optimizer: Any) -> list[Chunk]:
    """Return this rank's rows of the gradients summed over all ranks, as arrays."""
    from moonlight.optim.distributed_muon import owned_chunks

    return flatten(owned_chunks((owned.param.key, owned, owned.grad) for owned in optimizer.owned))


def assemble(answers: list[list[Chunk]]) -> dict[str, np.ndarray]:
    """Assemble full tensors from the chunks of all ranks.

    Every element must be present, and replicas must agree within rounding.
    """
    full: dict[str, np.ndarray] = {}
    for answer in answers:
        for key, shape, offset, values in answer:
            tensor = full.setdefault(key, np.full(shape, np.nan, dtype=np.float32))
            index = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
            filled = ~np.isnan(tensor[index])
            np.testing.assert_allclose(tensor[index][filled], values[filled], rtol=1e-5, atol=1e-7, err_msg=key)
            tensor[index] = values
    for key, tensor in full.items():
        assert not np.isnan(tensor).any(), f"{key}: elements that no rank holds"
    return full


def first_gradients(config: RunConfig, masked: float = 0.0) -> dict[str, Any]:
    """Return loss, weights, gradient chunks and auxiliary losses of the first step."""
    from moonlight.train.forward_backward import find_routers, forward_backward

    model_chunks, optimizer = build(config)
    weights = collect(model_chunks)
    optimizer.data_parallel.zero_grad_buffer()
    loss, _ = forward_backward(model_chunks, config, local_batches(config, 0, masked))
    return {
        "loss": loss.item(),
        "weights": weights,
        "gradients": flatten_gradients(optimizer),
        "aux": [router.aux_loss.item() for router in find_routers(model_chunks)],
    }


def one_step(model_chunks: list[Any], optimizer: Any, config: RunConfig, step: int) -> Any:
    """Run a training step on `local_batches`, and return its result."""
    from moonlight.config.timeline import RunSchedule
    from moonlight.train.step import train_step

    return train_step(model_chunks, optimizer, config, local_batches(config, step), RunSchedule(config).at(step))


def train_losses(config: RunConfig, steps: int) -> list[float]:
    """Return the losses of the first steps."""
    model_chunks, optimizer = build(config)
    return [one_step(model_chunks, optimizer, config, step).loss for step in range(1, steps + 1)]


def save(folder: Path, config: RunConfig, optimizer: Any, state: Any) -> None:
    """Save one checkpoint and wait for it."""
    from moonlight.dist_checkpoint.async_save import AsyncCheckpointer

    checkpointer = AsyncCheckpointer(folder, config, optimizer, tokenizer_sha256="")
    checkpointer.save(state)
    checkpointer.finalize()


def restart(config: RunConfig, folder: Path, steps: int, load_first: bool) -> list[float]:
    """Train `steps` steps and return their losses.

    With `load_first`, start from the newest checkpoint of `folder`; otherwise save one there at the end.
    """
    from moonlight.dist_checkpoint import lifecycle
    from moonlight.dist_checkpoint.state import TrainState, resolve_checkpoint

    model_chunks, optimizer = build(config)
    state = lifecycle.load_checkpoint(resolve_checkpoint(folder), config, optimizer) if load_first else TrainState()
    losses = [
        one_step(model_chunks, optimizer, config, step).loss for step in range(state.step + 1, state.step + 1 + steps)
    ]
    if not load_first:
        save(folder, config, optimizer, TrainState(step=steps))
    return losses


def train_run(config: RunConfig) -> None:
    """Run the real training loop on this rank."""
    from moonlight.train.loop import train

    train(config)


def make_run(runs: Path, data_folder: Path, tokenizer_folder: Path, layout: str = "1", **train: Any) -> RunConfig:
    """Return a config of eight steps on real data, with a checkpoint every three steps."""
    world_size, parallel = LAYOUTS[layout]
    train = {"train_steps": 8, "save_every_steps": 3, "validate_every_steps": 4, "validation_sequences": 16} | train
    config = recipe(replace(parallel, num_processes=world_size), **train)
    return replace(
        config,
        name=layout,
        runs_folder=str(runs),
        model=replace(config.model, vocab_size=1024),
        data=replace(config.data, path=str(data_folder), tokenizer=str(tokenizer_folder)),
        optimizer=replace(config.optimizer, newton_schulz_dtype="bfloat16"),
    )


def load_frozen(config: RunConfig, folder: Path) -> str:
    """Return the error of loading a checkpoint into a model that has since frozen a parameter."""
    from moonlight import parallel
    from moonlight.dist_checkpoint import lifecycle
    from moonlight.dist_checkpoint.state import resolve_checkpoint
    from moonlight.errors import UserError
    from moonlight.model.build import build_model
    from moonlight.optim.distributed_muon import build_optimizer

    parallel.init_model_parallel(config.parallel, config.train.seed)
    model_chunks = build_model(config)
    model_chunks[0].decoder.layers[1].mlp.router.weight.requires_grad_(False)
    try:
        lifecycle.load_checkpoint(resolve_checkpoint(folder), config, build_optimizer(model_chunks, config))
    except UserError as error:
        return str(error)
    return ""


def resave(source: Path, runs: Path, parallel: ParallelConfig, tokenizer: Path) -> None:
    """Start a run of this layout from a checkpoint's weights, and save it before its first step."""
    from checkpoints.reader import open_checkpoint
    from moonlight.dist_checkpoint import lifecycle
    from moonlight.dist_checkpoint.state import TrainState

    config = recipe(parallel)
    config = replace(
        config, model=open_checkpoint(source).model_config, data=replace(config.data, tokenizer=str(tokenizer))
    )
    _, optimizer = build(config)
    lifecycle.load_weights(source, config, optimizer)
    save(runs, config, optimizer, TrainState())
