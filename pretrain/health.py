"""Check the hosts of a run before it starts; torchrun starts as many processes as for the run.

Prints one table and every problem with the names of its hosts, and exits with 1 if it finds a problem. The recipe and
its overrides are those of the run: its data, tokenizer, layout and folder are also checked.
"""

import argparse
import sys
from datetime import timedelta

from moonlight.config.load import load_recipe
from moonlight.errors import UserError, report_errors
from pretrain.__main__ import Parser


def main() -> int:
    """Run the command and return 0, or 1 if it found a problem.

    The process exits with 2 if the recipe is invalid or the network broke.
    """
    parser = Parser(
        prog="python -m pretrain.health",
        description=__doc__,
        epilog="Example: torchrun --nproc-per-node 2 -m pretrain.health configs/quickstart.yaml --min-free-disk-gb 50",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("recipe", help="YAML recipe of the run")
    parser.add_argument("overrides", nargs="*", help="section.key=value, as for the run")
    parser.add_argument("--force", action="store_true", help="as for the run: resume a run whose settings differ")
    parser.add_argument(
        "--megabytes",
        type=int,
        default=64,
        help="size of every exchange, in MiB; a few MiB only measure the copy to the kernel",
    )
    parser.add_argument(
        "--disk-megabytes", type=int, default=256, help="size of the file that every host writes, in MiB"
    )
    parser.add_argument("--slow-below", type=float, default=0.5, help="slow: below this fraction of the median speed")
    parser.add_argument("--max-clock-seconds", type=float, default=1.0, help="maximum offset of a clock, in seconds")
    parser.add_argument("--max-latency-ms", type=float, default=50.0, help="maximum time for 8 bytes, in milliseconds")
    parser.add_argument("--min-network-gb-per-second", type=float, default=0.0, help="minimum speed of every process")
    parser.add_argument("--min-disk-gb-per-second", type=float, default=0.0, help="minimum write speed of every host")
    parser.add_argument("--min-free-disk-gb", type=float, default=1.0, help="minimum on the disk of the run folder")
    parser.add_argument("--min-free-memory-gb", type=float, default=1.0, help="minimum on every host")
    parser.add_argument("--min-free-gpu-memory-gb", type=float, default=1.0, help="minimum on every GPU")
    help_text = "exact number of GPUs a node (default: the most common count)"
    parser.add_argument("--gpus-per-node", type=int, default=argparse.SUPPRESS, help=help_text)
    parser.add_argument("--timeout-seconds", type=float, default=120.0, help="timeout of one exchange, in seconds")
    parser.add_argument("--debug", action="store_true", help="print the full traceback of an error")
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
