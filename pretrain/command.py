"""Implement `moonlight pretrain` and `moonlight sft`: run all checks that need no process group, then train."""

from collections.abc import Sequence
from pathlib import Path

from moonlight.config.load import load_recipe
from moonlight.errors import UserError
from moonlight.train import run_folder
from moonlight.train.wandb_log import check_installed
from pretrain.local import has_launcher, launch


def train_command(recipe: Path, overrides: Sequence[str], *, force: bool, conversations: bool) -> None:
    """Train a recipe, or resume its run, in local processes; in this process if a launcher started it.

    Args:
        force: resume a run whose settings differ.
        conversations: True for `moonlight sft`, False for `moonlight pretrain`.

    Raises:
        UserError: the recipe is for the other command, or does not fit its data, checkpoint or run folder.
    """
    config = load_recipe(recipe, overrides)
    if config.data.conversations != conversations:
        other, kind = ("sft", "conversations") if config.data.conversations else ("pretrain", "text")
        raise UserError(f"recipe {recipe} trains on {kind} (data.conversations): use moonlight {other}")
    if has_launcher():
        from pretrain.__main__ import work

        work(config, force=force)
        return
    config = run_folder.resolve_train_steps(config)
    config.check_batches(config.parallel.num_processes)
    check_installed(config)
    run_folder.check_data(config)
    run_folder.check_initial_checkpoint(config)
    run_folder.check_resumable(run_folder.run_path(config), config, force=force)
    if run_folder.is_finished(config):
        print(f"{run_folder.run_path(config)}: this run is already finished")
        return
    arguments = [str(recipe), *overrides, *(["--force"] if force else [])]
    launch(config.parallel.num_processes, arguments, config.train.threads_per_process, config.train.max_restarts)
