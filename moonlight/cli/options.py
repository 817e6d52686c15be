"""Options that several commands share."""

from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.key=value; `moonlight settings` lists all keys.", show_default=False)
]


def command_group(help: str = "") -> typer.Typer:
    """Return a group of commands. One without help is merged into the `moonlight` command."""
    return typer.Typer(
        help=help or None,
        no_args_is_help=bool(help),
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
