"""One process of a training run: `torchrun --nproc-per-node 8 -m pretrain recipe.yaml train.seed=7`.

To restart processes, use `python -m pretrain.agent 690` instead of `torchrun`. Without torchrun, `moonlight pretrain`
starts `parallel.num_processes` of these processes.
"""

import argparse
import signal
import sys
from typing import NoReturn

from moonlight.config.run import RunConfig
from moonlight.errors import UserError, report_errors


def work(config: RunConfig, *, force: bool = False) -> None:
    """Initialize torch.distributed, train, and destroy the process groups.

    Args:
        force: resume a run whose settings differ.

    Raises:
        UserError: the recipe does not fit its data, checkpoint or run folder, training failed, or memory ran out.
    """
    from moonlight.train import run_folder

    config = run_folder.resolve_train_steps(config)
    run_folder.check_resumable(run_folder.run_path(config), config, force=force)

    from moonlight import parallel
    from moonlight.train.loop import train
    from moonlight.train.oom import explain_oom
    from moonlight.train.setup import group_timeout

    with explain_oom(config):
        parallel.init_distributed(config.train.threads_per_process, group_timeout(config))
        try:
            train(config, force=force)
        finally:
            parallel.destroy_distributed()


class Parser(argparse.ArgumentParser):
    """Argument parser that raises UserError for invalid arguments."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main() -> int:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # by default it ends the process, which has nothing to save yet
    parser = Parser(prog="python -m pretrain", description=__doc__)
    parser.epilog = (
        "Example: python -m pretrain.agent 690 --nproc-per-node 8 --max-restarts 3 -m pretrain recipe.yaml train.seed=7"
    )
    parser.add_argument("recipe", help="YAML recipe, for example configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", help="section.key=value, for example train.seed=7")
    parser.add_argument("--force", action="store_true", help="resume a run whose settings differ")
    parser.add_argument("--debug", action="store_true", help="print the full traceback of an error")
    with report_errors(debug="--debug" in sys.argv):
        arguments = parser.parse_intermixed_args()
        from moonlight.config.load import load_recipe

        work(load_recipe(arguments.recipe, arguments.overrides), force=arguments.force)
        return 0
    return 2


if __name__ == "__main__":
    sys.exit(main())
