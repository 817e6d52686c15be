"""The `moonlight` command. Every command imports what it needs when it runs, so that --help is instant."""

import os
import sys
from typing import Annotated, cast

import typer

import moonlight
from moonlight.cli import checkpoints, evaluate, studies, train
from moonlight.cli.bench import bench_app
from moonlight.cli.data import data_app, tokenizer_app
from moonlight.cli.options import command_group
from moonlight.errors import CODE_INTERRUPTED, UserError, report_errors

app = command_group("Train models with Muon, from text to a Hugging Face folder. Start with: moonlight quickstart")
for group in (train.app, checkpoints.app, evaluate.app, studies.app):
    app.add_typer(group)
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")

_UsageError = cast(type[typer.BadParameter], typer.BadParameter.__mro__[1])
"""Raised by the command line for arguments that it cannot use; Typer exports no name for it."""

PART_OF_QUICKSTART = "MOONLIGHT_PART_OF_QUICKSTART"
"""Set for the commands that quickstart runs, which prints the message of an interrupt itself."""

_RESUMES_CHECKPOINT = "rerun the command to resume from the newest checkpoint, or to start again if there is none"
_RESUMES_STUDY = "rerun the command to resume: finished runs are kept, the others resume from their checkpoints"
_AFTER_INTERRUPT = {
    "ablate": _RESUMES_STUDY,
    "eval": "rerun the command to continue with the unfinished benchmarks",
    "pretrain": _RESUMES_CHECKPOINT,
    "sft": _RESUMES_CHECKPOINT,
    "quickstart": "rerun the command to resume, training from its newest checkpoint if there is one",
    "quickstart-chat": "rerun the command to resume, tuning from its newest checkpoint if there is one",
    "scaling": _RESUMES_STUDY,
    "release": "rerun the command to upload what is missing",
}
_NO_PARTIAL_OUTPUT = "partial output was removed; rerun the command to start again"
"""Printed when Ctrl-C ends a command."""


def _print_version(value: bool) -> None:
    if value:
        print(f"moonlight {moonlight.__version__}")
        raise typer.Exit


@app.callback(epilog="Any command takes --debug, which prints the traceback of an error.")
def moonlight_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Parse the options that stand before a command."""


def main() -> None:
    """Entry point of the `moonlight` command."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    code = None
    with report_errors(debug=debug):
        try:
            code = app(arguments, prog_name="moonlight", standalone_mode=False)
        except _UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()
                raise SystemExit(2) from None
            place = error.ctx.command_path if error.ctx else "moonlight"
            raise UserError(f"{error.format_message().rstrip('.')}; see {place} --help") from None
    if code == CODE_INTERRUPTED and PART_OF_QUICKSTART not in os.environ:
        print(f"\ninterrupted: {_AFTER_INTERRUPT.get(arguments[0], _NO_PARTIAL_OUTPUT)}", file=sys.stderr)
    raise SystemExit(code)
