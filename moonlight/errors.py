"""Errors for people: the one exception that is a message to the user, and how commands end with it."""

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

ERROR_FILE = "MOONLIGHT_ERROR_FILE"
"""Set for a process that another one launched: its message goes there, for the launcher to print once."""

_OF_THE_MACHINE = {
    errno.ENOSPC: "free some space, or choose a folder on another disk",
    errno.EDQUOT: "the disk quota is used up: free some space, or choose a folder on another disk",
    errno.EACCES: "it may not be read or written by this user",
    errno.EPERM: "it may not be read or written by this user",
    errno.EROFS: "choose a folder that can be written",
}


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message names the thing, its value and what would be accepted. The command line prints it as one line
    and exits with code 2; everything else is a defect of ours and keeps its traceback.
    """


def message_of(error: BaseException) -> str | None:
    """The one line that tells a user about `error`, or None if it is not the user's to mend."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}; {_OF_THE_MACHINE[error.errno]}"
    return None


@contextlib.contextmanager
def report_errors(*, debug: bool) -> Iterator[None]:
    """End the process with code 2 and one line for errors that are the user's to mend.

    With `debug`, their traceback is printed too. Others pass through, with their traceback.
    """
    try:
        yield
    except (UserError, OSError) as error:
        message = message_of(error)
        if message is None:
            raise
        if debug:
            traceback.print_exc()
        if ERROR_FILE in os.environ:
            Path(os.environ[ERROR_FILE]).write_text(message, encoding="utf-8")
        else:
            print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2) from None
