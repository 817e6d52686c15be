"""What the tests of bad input share: running the command, checking its line, damaging files."""

import ctypes
import json
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
    """One line, the exit code of a user's error, and every word of it."""
    assert code == 2, err
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    missing = [word for word in words if word not in err]
    assert not missing, (missing, err)


_PR_CAPBSET_DROP = 24
_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 1, 2


def command(*arguments, largest_file=None, most_memory=None, **options):
    """The command in a process of its own, which can write no file beyond `largest_file` bytes, nor have more than
    `most_memory` bytes of address space.

    Permissions of files bind it even when it is root's.
    """

    def limit():
        # A shell that runs these tests in the background hands on an ignored SIGINT; a terminal does not.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        for capability in (_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH):
            ctypes.CDLL(None).prctl(_PR_CAPBSET_DROP, capability)
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        if most_memory is not None:
            resource.setrlimit(resource.RLIMIT_AS, (most_memory, most_memory))

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
    process = command(*arguments, **options)
    try:
        out, err = process.communicate(timeout=150)
    except BaseException:
        process.kill()
        raise
    return process.returncode, out, err


def cut(name):
    def edit(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:-10])

    return edit


def in_state(change):
    """Change what `state.json` says and give it the checksum of that, as who forges one would."""

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
    path = folder / "__0_0.distcp"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def sign(folder):
    """Give `state.json` the sizes and checksums of the files that are there, as who forges a checkpoint would."""
    files = [path for path in sorted(folder.iterdir()) if path.name != "state.json"]
    known = {path.name: {"bytes": path.stat().st_size, "xxh3": xxh3_checksum(path)} for path in files}
    in_state(lambda content: content.update(files=known))(folder)
