"""What `moonlight pretrain` and `moonlight sft` do: check everything that can be checked at once, then train."""

from collections.abc import Sequence
from pathlib import Path

from moonlight.config.load import load_recipe
from moonlight.errors import UserError
from moonlight.train import run_folder
from moonlight.train.wandb_log import check_installed
from pretrain.local import launch, under_launcher


def train_command(recipe: Path, overrides: Sequence[str], *, force: bool, conversations: bool) -> None:
    """Train a recipe, or go on where the run stopped, in local processes unless a launcher started this one.

    Args:
        force: go on with a run of other settings.
        conversations: whether the command is for tuning on conversations, or for text.

    Raises:
        UserError: the recipe is for the other command, or does not fit its data, its checkpoint or its folder.
    """
    run = load_recipe(recipe, overrides)
    if run.data.conversations != conversations:
        other, kind = ("sft", "conversations") if run.data.conversations else ("pretrain", "text")
        raise UserError(f"recipe {recipe} trains on {kind} (data.conversations): use moonlight {other}")
    if under_launcher():
        from pretrain.__main__ import work

        work(run, force=force)
        return
    run = run_folder.count_steps(run)
    run.check_batches(run.parallel.num_processes)
    check_installed(run)
    run_folder.check_data(run)
    run_folder.check_initial_checkpoint(run)
    run_folder.check_folder(run_folder.path(run), run, force=force)
    if run_folder.is_finished(run):
        print(f"{run_folder.path(run)}: this run has finished already")
        return
    arguments = [str(recipe), *overrides, *(["--force"] if force else [])]
    launch(run.parallel.num_processes, arguments, run.train.threads_per_process, run.train.max_restarts)
