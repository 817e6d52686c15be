"""Set up a run before its first step: checks, model, optimizer, checkpoint, data, log."""

import contextlib
import dataclasses
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from moonlight import parallel
from moonlight.config.load import to_yaml
from moonlight.config.run import RunConfig
from moonlight.config.timeline import RunSchedule
from moonlight.data.loader import AnyValDataset, MixtureDataset, build_train_dataset, build_val_datasets
from moonlight.dist_checkpoint import lifecycle
from moonlight.dist_checkpoint.async_save import AsyncCheckpointer
from moonlight.dist_checkpoint.recovery import newest_valid, verify_checkpoint
from moonlight.dist_checkpoint.state import TrainState
from moonlight.files import atomic_write_text, folder_lock
from moonlight.model.build import build_model
from moonlight.model.shards import init_weights
from moonlight.optim.distributed_muon import DistributedMuon, build_optimizer
from moonlight.train import run_folder
from moonlight.train.run_log import RunLogger
from moonlight.train.shared_folder import check_shared
from moonlight.train.signals import SignalHandler
from moonlight.train.step_metrics import environment_info
from moonlight.train.wandb_log import check_installed
from moonlight.train.watchdog import GROUP_TIMEOUT_FACTOR, Watchdog


@dataclass(frozen=True)
class Run:
    """One execution of a recipe on this rank."""

    config: RunConfig
    folder: Path
    manifests: Mapping[str, dict[str, Any]]
    """Of the prepared data, by source."""
    schedule: RunSchedule
    model_chunks: list[GPTModel]
    optimizer: DistributedMuon
    checkpointer: AsyncCheckpointer
    train_dataset: MixtureDataset
    val_datasets: Mapping[str, AnyValDataset]
    log: RunLogger
    signals: SignalHandler
    watchdog: Watchdog
    eos_id: int
    """Token id that ends a document."""

    @property
    def total_steps(self) -> int:
        """Steps of the recipe."""
        return self.schedule.num_steps

    @property
    def last_step(self) -> int:
        """Step after which this process stops."""
        return self.config.train.stop_at_step or self.total_steps

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.folder / "checkpoints"


def group_timeout(config: RunConfig) -> timedelta:
    """Return the timeout of process groups: later than the watchdog, whose message is more useful."""
    return timedelta(seconds=GROUP_TIMEOUT_FACTOR * config.train.hang_timeout_seconds)


def set_up_run(config: RunConfig, stack: contextlib.ExitStack, *, force: bool) -> tuple[Run, TrainState]:
    """Check the recipe, build the run, and load the state that it starts from. Collective.

    Args:
        stack: closes what the run opens.
        force: resume a run whose settings differ, as long as model and optimizer are the same.

    Returns:
        The run, and the state of its newest valid checkpoint, or of a new run.

    Raises:
        UserError: the recipe does not fit the world, the data, the tokenizer or the run folder.
    """
    config.check_batches(dist.get_world_size())
    schedule = RunSchedule(config)
    check_installed(config)
    folder = run_folder.run_path(config)
    manifests = run_folder.check_data(config)
    tokenizer = next(iter(manifests.values()))["tokenizer"]  # the same for all sources
    if (initial := run_folder.check_initial_checkpoint(config)) is not None:
        verify_checkpoint(initial)
    is_first_rank = dist.get_rank() == 0
    signals = stack.enter_context(SignalHandler(config.train))
    watchdog = stack.enter_context(Watchdog(folder, config.train.hang_timeout_seconds))
    changed = []
    if is_first_rank:
        stack.enter_context(folder_lock(folder))
        changed = run_folder.check_resumable(folder, config, force=force)
        atomic_write_text(folder / run_folder.CONFIG_FILE, to_yaml(config))
    check_shared(folder)

    parallel.init_model_parallel(config.parallel, config.train.seed, group_timeout(config))
    model_chunks = build_model(config)
    optimizer = build_optimizer(model_chunks, config)
    newest, warnings = newest_valid(folder / "checkpoints")
    if newest is not None:
        state = lifecycle.load_checkpoint(newest, config, optimizer)
    else:
        state = TrainState(consumed_sequences=schedule.first_sequence)
        if initial is not None:
            lifecycle.load_weights(initial, config, optimizer)
        else:
            with optimizer.loading_masters() as masters:
                init_weights(masters, config.model, config.train.seed)
    checkpointer = AsyncCheckpointer(folder / "checkpoints", config, optimizer, tokenizer["sha256"])
    stack.callback(checkpointer.cancel)
    train_dataset = build_train_dataset(config, manifests, run_folder.cache_folder(config))
    val_datasets = build_val_datasets(config.data, manifests)
    log = stack.enter_context(RunLogger(folder, config, state.step, schedule.num_steps, writes=is_first_rank))
    log.started(state.step, _start_info(config), resumed=newest is not None, warnings=warnings, changed=changed)
    run = Run(
        config=config,
        folder=folder,
        manifests=manifests,
        schedule=schedule,
        model_chunks=model_chunks,
        optimizer=optimizer,
        checkpointer=checkpointer,
        train_dataset=train_dataset,
        val_datasets=val_datasets,
        log=log,
        signals=signals,
        watchdog=watchdog,
        eos_id=tokenizer["eos_id"],
    )
    return run, state


def _start_info(config: RunConfig) -> dict[str, Any]:
    """Return what events.jsonl records of a start: host, world, layout, restart count, environment."""
    return {
        "host": socket.gethostname(),
        "world_size": dist.get_world_size(),
        "layout": {key: value for key, value in dataclasses.asdict(config.parallel).items() if key.endswith("_size")},
        "restart": int(os.environ.get(parallel.RESTART_COUNT, "0")),
        "environment": environment_info(),
    }
