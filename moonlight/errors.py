"""User-facing errors: the exception for invalid input, and how commands print it and exit."""

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
"""Environment variable of a launched process: file for its error report, which the launcher prints once."""
DEBUG = "MOONLIGHT_DEBUG"
"""Environment variable that --debug sets, for this process and its children."""

_SYSTEM_ERROR_HINTS = {
    errno.ENOSPC: "free some space, or choose a folder on another disk",
    errno.EDQUOT: "the disk quota is exhausted: free some space, or choose a folder on another disk",
    errno.EFBIG: "the disk, or the limit that `ulimit -f` shows, does not allow a file of this size",
    errno.EIO: "the disk reports a failure: check it, or choose a folder on another disk",
    errno.EACCES: "this user may not read or write it",
    errno.EPERM: "this user may not read or write it",
    errno.EROFS: "choose a folder that can be written",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a folder is needed where a file exists: choose another path",
    errno.EISDIR: "a file is needed where a folder exists: choose another path",
    errno.ELOOP: "its symbolic links form a loop: choose another path",
}

CODE_INTERRUPTED = 130
"""Exit code that shells report for a command ended by Ctrl-C: 128 + 2 (SIGINT)."""
CODE_STOPPED = 143
"""Exit code of a run that saved and stopped on SIGTERM: 128 + 15.

With 0, Kubernetes would treat an evicted run as finished. Kubeflow retries codes above 127.
"""
CODE_HUNG = 134
"""Exit code of a process that made no progress and exited: 128 + 6, as after abort()."""
CODE_KILLED = 137
"""Exit code of a process that could not save within its grace period: 128 + 9, as after SIGKILL."""


class UserError(ValueError):
    """Invalid user input.

    The message names the thing, its value and what is accepted. The command line prints it as one line and exits with
    code 2. Any other exception is a bug and keeps its traceback.
    """


def user_message(error: BaseException) -> str | None:
    """Return the message for the user in one line, or None if the user cannot fix the error."""
    if isinstance(error, UserError):
        # Text from files may contain line breaks and terminal control characters.
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(str(error).split()))
    if isinstance(error, OSError) and error.errno in _SYSTEM_ERROR_HINTS:
        prefix = f"{error.filename}: " if error.filename else ""
        return f"{prefix}{error.strerror}; {_SYSTEM_ERROR_HINTS[error.errno]}"
    return None


@contextlib.contextmanager
def attach_path(path: Path) -> Iterator[None]:
    """Add `path` to system errors that name no file, such as those of a full disk.

    An exception of a Rust library that reports a system error is replaced by an OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise
    except Exception as error:
        # Libraries written in Rust, such as safetensors, raise other exception types.
        if match := re.search(r"\(os error (\d+)\)", str(error)):
            code = int(match[1])
            raise OSError(code, os.strerror(code), str(path)) from error
        raise


@contextlib.contextmanager
def report_errors(*, debug: bool) -> Iterator[None]:
    """Print user errors as one line and exit with code 2; other exceptions pass through with their traceback.

    A launched process writes its report to the file in `ERROR_FILE` instead of printing: its launcher selects the
    report of the first cause.

    Args:
        debug: also print the traceback of user errors.
    """
    if debug:
        os.environ[DEBUG] = "1"
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(CODE_INTERRUPTED) from None
    except SystemExit:
        raise
    except BaseException as error:  # torch's CheckpointException is not an Exception
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
