"""Whether the hosts of a run are fit for it, before it starts; torchrun starts one process of this for each of the run.

Prints one table, names every host that is slow or odd, and exits with 1 if there is one. The recipe and its overrides
are those of the run: its data, tokenizer, layout and folder are checked too.
"""

import argparse
import sys
from datetime import timedelta

from moonlight.config.load import load_recipe
from moonlight.errors import UserError, report_errors
from pretrain.__main__ import Parser


def main() -> int:
    """The command; the exit code is 1 if something is wrong, 2 if the recipe cannot be read or the network broke."""
    parser = Parser(
        prog="python -m pretrain.health",
        description=__doc__,
        epilog="Example: torchrun --nproc-per-node 2 -m pretrain.health configs/quickstart.yaml --min-free-disk-gb 50",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("recipe", help="YAML recipe of the run")
    parser.add_argument("overrides", nargs="*", help="section.key=value, as for the run")
    parser.add_argument("--force", action="store_true", help="the run goes on with other settings")
    parser.add_argument(
        "--megabytes",
        type=int,
        default=64,
        help="MiB of every exchange; those of a few are done as soon as the kernel holds them",
    )
    parser.add_argument("--disk-megabytes", type=int, default=256, help="MiB written and flushed by every host")
    parser.add_argument("--slow-below", type=float, default=0.5, help="share of the median speed that is too slow")
    parser.add_argument("--max-clock-seconds", type=float, default=1.0, help="most between two clocks")
    parser.add_argument("--max-latency-ms", type=float, default=50.0, help="most for 8 bytes to another process")
    parser.add_argument("--min-network-gb-per-second", type=float, default=0.0, help="least of every process")
    parser.add_argument("--min-disk-gb-per-second", type=float, default=0.0, help="least of every host")
    parser.add_argument("--min-free-disk-gb", type=float, default=1.0, help="least where the runs lie")
    parser.add_argument("--min-free-memory-gb", type=float, default=1.0, help="least on every host")
    parser.add_argument("--min-free-gpu-memory-gb", type=float, default=1.0, help="least on every GPU")
    parser.add_argument("--gpus-per-node", type=int, help="exactly so many; otherwise as many as most hosts have")
    parser.add_argument("--timeout-seconds", type=float, default=120.0, help="most that one exchange may take")
    parser.add_argument("--debug", action="store_true", help="print the whole traceback of an error")
    with report_errors(debug="--debug" in sys.argv):
        arguments = parser.parse_intermixed_args()
        for name in ("megabytes", "disk_megabytes", "timeout_seconds"):
            if (value := getattr(arguments, name)) <= 0:
                raise UserError(f"--{name.replace('_', '-')} is {value}: it must be greater than 0")
        config = load_recipe(arguments.recipe, arguments.overrides)

        from moonlight import parallel
        from pretrain.diagnose import run_health_check

        parallel.init_distributed(timeout=timedelta(seconds=arguments.timeout_seconds))
        try:
            return 1 if run_health_check(config, arguments) else 0
        finally:
            parallel.destroy_distributed()
    return 2


if __name__ == "__main__":
    sys.exit(main())
