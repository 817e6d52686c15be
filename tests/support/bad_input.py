"""Helpers for the tests of bad input: run the command, check its error line, corrupt files."""

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

from moonlight.dist_checkpoint.state import CHECKSUM, write_state
from moonlight.files import xxh3_checksum

ROOT = Path(__file__).parents[2]
NEWEST = "step-00000004"


def check_line(code, err, words):
    """Check for exit code 2 and a single error line that contains every word."""
    assert code == 2, err
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    missing = [word for word in words if word not in err]
    assert not missing, (missing, err)


_PR_CAPBSET_DROP = 24
_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 1, 2


def command(*arguments, largest_file=None, max_memory=None, **options):
    """Start the command in a separate process.

    It cannot write a file beyond `largest_file` bytes, or map more than `max_memory` bytes of address space.
    File permissions apply to it even if it runs as root.
    """

    def limit():
        # A shell that runs these tests in the background passes on an ignored SIGINT; a terminal does not.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        for capability in (_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH):
            ctypes.CDLL(None).prctl(_PR_CAPBSET_DROP, capability)
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        if max_memory is not None:
            resource.setrlimit(resource.RLIMIT_AS, (max_memory, max_memory))

    return subprocess.Popen(
        [sys.executable, "-m", "moonlight.cli", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,
        **options,
    )


def run_command(*arguments, **options):
    """Run the command to its end, and return its exit code, stdout and stderr."""
    process = command(*arguments, **options)
    try:
        out, err = process.communicate(timeout=150)
    except BaseException:
        process.kill()
        raise
    return process.returncode, out, err


class MaliciousPickle:
    """An object whose pickle creates the folder `path` when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def cut(name):
    """Return an edit that truncates a file by ten bytes."""

    def edit(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:-10])

    return edit


def in_state(change):
    """Return an edit that changes `state.json` and recomputes its checksum, as a forger would."""

    def edit(folder):
        path = folder / "state.json"
        content = json.loads(path.read_text())
        changed = change(content)
        if isinstance(changed, list):
            path.write_text(json.dumps(changed))
        else:
            write_state(folder, {key: value for key, value in content.items() if key not in ("format", CHECKSUM)})

    return edit


def flip(folder):
    """Flip one bit in the middle of a data file."""
    path = folder / "__0_0.distcp"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def sign(folder):
    """Give `state.json` the sizes and checksums of the current files, as a forger would."""
    files = [path for path in sorted(folder.iterdir()) if path.name != "state.json"]
    entries = {path.name: {"bytes": path.stat().st_size, "xxh3": xxh3_checksum(path)} for path in files}
    in_state(lambda content: content.update(files=entries))(folder)
