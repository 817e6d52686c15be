"""What the multi-process tests run on each rank, and how their answers are put together into whole tensors."""

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

Recipe = RunConfig

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
}
"""Name -> (processes, layout)."""


def recipe(parallel: ParallelConfig = ParallelConfig(), **train: Any) -> Recipe:  # noqa: B008
    """A Moonlight of four layers, small enough that a step takes a moment."""
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


def global_batch(run: Recipe, step: int, masked: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens [global_batch_size, sequence_length + 1] of a step, and which labels count."""
    generator = torch.Generator().manual_seed(1000 + step)
    shape = (run.train.global_batch_size, run.data.sequence_length)
    tokens = torch.randint(0, run.model.vocab_size, (shape[0], shape[1] + 1), generator=generator)
    mask = (torch.rand(shape, generator=generator) >= masked).float()
    return tokens, mask


def local_batches(run: Recipe, step: int, masked: float = 0.0) -> list[Any]:
    """This data-parallel rank's micro-batches of a step."""
    from megatron.core import parallel_state

    from moonlight.train.forward_backward import MicroBatch, compute_document_ids

    tokens, mask = global_batch(run, step, masked)
    apart = run.data.mask_documents or run.data.reset_positions
    if apart:
        tokens = torch.where(tokens % 8 == 0, 0, tokens)  # 0 ends documents of eight tokens or so
    size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    mine, my_mask = tokens.chunk(size)[rank], mask.chunk(size)[rank]
    return [
        MicroBatch(t[:, :-1], t[:, 1:], m, compute_document_ids(t[:, :-1], 0) if apart else None)
        for t, m in zip(mine.split(run.train.micro_batch_size), my_mask.split(run.train.micro_batch_size), strict=True)
    ]


def build(run: Recipe) -> tuple[list[Any], Any]:
    """Groups, model chunks with initial weights, and their optimizer."""
    from moonlight import parallel
    from moonlight.model.build import build_model
    from moonlight.model.shards import init_weights
    from moonlight.optim.distributed_muon import build_optimizer

    parallel.init_model_parallel(run.parallel, run.train.seed)
    models = build_model(run)
    optimizer = build_optimizer(models, run)
    with optimizer.loading_masters() as state:
        init_weights(state, run.model, run.train.seed)
    return models, optimizer


Piece = tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]


def collect(models: list[Any]) -> list[Piece]:
    """(key, whole shape, offset, values) of every tensor of the model on this rank."""
    from moonlight.model.shards import collect_sharded_tensors, local_chunks

    return flatten({key: local_chunks(sharded) for key, sharded in collect_sharded_tensors(models).items()})


def flatten(state: dict[str, Any]) -> list[Piece]:
    """The rectangles of `LocalChunks`, as arrays."""
    return [
        (key, pieces.shape, offset, values.detach().float().numpy().copy())
        for key, pieces in state.items()
        for offset, values in pieces.chunks
    ]


def flatten_gradients(optimizer: Any) -> list[Piece]:
    """Return this rank's rows of the gradients summed over all ranks, as arrays."""
    from moonlight.optim.distributed_muon import owned_chunks

    return flatten(owned_chunks((owned.param.key, owned, owned.grad) for owned in optimizer.owned))


def assemble(answers: list[list[Piece]]) -> dict[str, np.ndarray]:
    """Whole tensors from the pieces of all ranks: every element given, and replicas agreeing to the last bits."""
    whole: dict[str, np.ndarray] = {}
    for answer in answers:
        for key, shape, offset, values in answer:
            tensor = whole.setdefault(key, np.full(shape, np.nan, dtype=np.float32))
            where = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
            known = ~np.isnan(tensor[where])
            np.testing.assert_allclose(tensor[where][known], values[known], rtol=1e-5, atol=1e-7, err_msg=key)
            tensor[where] = values
    for key, tensor in whole.items():
        assert not np.isnan(tensor).any(), f"{key}: elements that no rank holds"
    return whole


def first_gradients(run: Recipe, masked: float = 0.0) -> dict[str, Any]:
    """Loss and gradient pieces of the first step."""
    from moonlight.train.forward_backward import find_routers, forward_backward

    models, optimizer = build(run)
    weights = collect(models)
    optimizer.data_parallel.zero_grad_buffer()
    loss, _ = forward_backward(models, run, local_batches(run, 0, masked))
    return {
        "loss": loss.item(),
        "weights": weights,
        "gradients": flatten_gradients(optimizer),
        "aux": [router.aux_loss.item() for router in find_routers(models)],
    }


def one_step(models: list[Any], optimizer: Any, run: Recipe, step: int) -> Any:
    """The result of a training step on `local_batches`."""
    from moonlight.config.timeline import RunSchedule
    from moonlight.train.step import train_step

    return train_step(models, optimizer, run, local_batches(run, step), RunSchedule(run).at(step))


def train_losses(run: Recipe, steps: int) -> list[float]:
    """Losses of the first steps."""
    models, optimizer = build(run)
    return [one_step(models, optimizer, run, step).loss for step in range(1, steps + 1)]


def save(folder: Path, run: Recipe, optimizer: Any, state: Any) -> None:
    """Save one checkpoint and wait for it."""
    from moonlight.dist_checkpoint.async_save import AsyncCheckpointer

    saver = AsyncCheckpointer(folder, run, optimizer, tokenizer_sha256="")
    saver.save(state)
    saver.finalize()


def restart(run: Recipe, folder: Path, steps: int, load_first: bool) -> list[float]:
    """Train `steps` more steps and save, after loading the newest checkpoint of `folder` if asked to."""
    from moonlight.dist_checkpoint import lifecycle
    from moonlight.dist_checkpoint.state import TrainState, resolve_checkpoint

    models, optimizer = build(run)
    state = lifecycle.load_checkpoint(resolve_checkpoint(folder), run, optimizer) if load_first else TrainState()
    losses = [one_step(models, optimizer, run, step).loss for step in range(state.step + 1, state.step + 1 + steps)]
    if not load_first:
        save(folder, run, optimizer, TrainState(step=steps))
    return losses


def train_run(run: Recipe) -> None:
    """The real training loop on this rank."""
    from moonlight.train.loop import train

    train(run)


def make_run(runs: Path, data_folder: Path, tokenizer_folder: Path, layout: str = "1", **train: Any) -> Recipe:
    """A recipe of eight steps on real data, checkpoints every third."""
    world_size, parallel = LAYOUTS[layout]
    train = {"train_steps": 8, "save_every_steps": 3, "validate_every_steps": 4, "validation_sequences": 16} | train
    run = recipe(replace(parallel, num_processes=world_size), **train)
    return replace(
        run,
        name=layout,
        runs_folder=str(runs),
        model=replace(run.model, vocab_size=1024),
        data=replace(run.data, path=str(data_folder), tokenizer=str(tokenizer_folder)),
        optimizer=replace(run.optimizer, newton_schulz_dtype="bfloat16"),
    )


def load_frozen(run: Recipe, folder: Path) -> str:
    """What is said when a checkpoint is loaded into a model one of whose parameters is frozen now."""
    from moonlight import parallel
    from moonlight.dist_checkpoint import lifecycle
    from moonlight.dist_checkpoint.state import resolve_checkpoint
    from moonlight.errors import UserError
    from moonlight.model.build import build_model
    from moonlight.optim.distributed_muon import build_optimizer

    parallel.init_model_parallel(run.parallel, run.train.seed)
    models = build_model(run)
    models[0].decoder.layers[1].mlp.router.weight.requires_grad_(False)
    try:
        lifecycle.load_checkpoint(resolve_checkpoint(folder), run, build_optimizer(models, run))
    except UserError as error:
        return str(error)
    return ""


def resave(source: Path, runs: Path, parallel: ParallelConfig, tokenizer: Path) -> None:
    """Start a run of this layout from a checkpoint's weights, and save it before its first step."""
    from checkpoints.reader import open_checkpoint
    from moonlight.dist_checkpoint import lifecycle
    from moonlight.dist_checkpoint.state import TrainState

    run = recipe(parallel)
    run = replace(run, model=open_checkpoint(source).model_config, data=replace(run.data, tokenizer=str(tokenizer)))
    _, optimizer = build(run)
    lifecycle.load_weights(source, run, optimizer)
    save(runs, run, optimizer, TrainState())
