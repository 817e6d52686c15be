"""Errors for people: the one exception that is a message to the user, and how commands end with it."""

import contextlib
import errno
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

ERROR_FILE = "MOONLIGHT_ERROR_FILE"
"""Set for a process that another one launched: its report goes there, for the launcher to print once."""
DEBUG = "MOONLIGHT_DEBUG"
"""Set by --debug, for this process and all that it starts."""

_OF_THE_MACHINE = {
    errno.ENOSPC: "free some space, or choose a folder on another disk",
    errno.EDQUOT: "the disk quota is used up: free some space, or choose a folder on another disk",
    errno.EFBIG: "the disk, or the limit that `ulimit -f` shows, does not allow a file of this size",
    errno.EIO: "the disk reports a failure: check it, or choose a folder on another disk",
    errno.EACCES: "it may not be read or written by this user",
    errno.EPERM: "it may not be read or written by this user",
    errno.EROFS: "choose a folder that can be written",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a file stands where a folder is needed: choose another path",
    errno.EISDIR: "a folder stands where a file is needed: choose another path",
    errno.ELOOP: "its links lead in a circle: choose another path",
}

CODE_INTERRUPTED = 130
"""What shells report of a command ended by Ctrl-C."""
CODE_STOPPED = 143
"""A run saved and stopped because of SIGTERM: 128 + 15, as shells report of a process that SIGTERM ended.

Not 0, or Kubernetes would take an evicted run for a finished one; above 127, which Kubeflow retries.
"""
CODE_HUNG = 134
"""A process of a run made no progress and ended itself: 128 + 6, as of abort()."""
CODE_KILLED = 137
"""A process of a run could not save within its grace time: 128 + 9, as of the SIGKILL that would have come."""


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message names the thing, its value and what would be accepted. The command line prints it as one line
    and exits with code 2; everything else is a defect of ours and keeps its traceback.
    """


def user_message(error: BaseException) -> str | None:
    """The one line that tells a user about `error`, or None if it is not the user's to mend."""
    if isinstance(error, UserError):
        # What files say may hold line breaks and control characters of a terminal.
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(str(error).split()))
    if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}; {_OF_THE_MACHINE[error.errno]}"
    return None


@contextlib.contextmanager
def attach_path(path: Path) -> Iterator[None]:
    """Let errors of the system that name no file, as those of a full disk do, name `path`."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise
    except Exception as error:
        # Libraries written in Rust, such as safetensors, have exceptions of their own.
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            number = int(found[1])
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


@contextlib.contextmanager
def report_errors(*, debug: bool) -> Iterator[None]:
    """End the process with code 2 and one line for errors that are the user's to mend.

    With `debug`, their traceback is printed too. Others pass through, with their traceback. A launched process
    prints neither: its launcher knows which of several reports is the cause.
    """
    if debug:
        os.environ[DEBUG] = "1"
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(CODE_INTERRUPTED) from None
    except SystemExit:
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        message = user_message(error)
        if ERROR_FILE in os.environ:
            report = {"message": message, "traceback": traceback.format_exc()}
            path = Path(os.environ[ERROR_FILE])
            part = path.with_name(f".{path.name}.part")
            part.write_text(json.dumps(report), encoding="utf-8")
            part.replace(path)
            raise SystemExit(2 if message else 1) from None
        if message is None:
            raise
        if DEBUG in os.environ:
            traceback.print_exc()
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2) from None
