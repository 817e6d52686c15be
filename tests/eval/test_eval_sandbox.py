"""Code answers in the sandbox: right ones pass, wrong ones fail, hostile ones hit a limit and fail."""

import ctypes
import errno
import json
import os
import platform
import socket
import struct
import sys
import time
from pathlib import Path

import psutil
import pytest

from eval import confine
from eval.answers import last_number, score_completion, score_number, score_program
from eval.data_sets import TASKS
from eval.sandbox import SandboxLimits, run_code

SHORT = SandboxLimits(cpu_seconds=1, wall_seconds=20, memory_bytes=1 << 29)
"""Limits for tests of CPU time; on a busy machine one CPU second can take many seconds."""
WAITING = SandboxLimits(cpu_seconds=1, wall_seconds=2, memory_bytes=1 << 29)
"""Limits for programs that use almost no CPU time."""

RIGHT = {
    "an assertion": "assert sum(range(5)) == 10",
    "the standard library": "import bisect, decimal, functools, hashlib, heapq, itertools, json, math, re, typing",
    "more of it": "import asyncio, datetime, inspect, multiprocessing, statistics, time, unittest, zoneinfo\n"
    "assert time.localtime()",
    "much output": "print('x' * 10**7)",
    "reading Python": "import os\nassert 'posix' in open(os.__file__).read()\nassert open('/dev/null').read() == ''",
    "clocks and chance": "import random, time\ntime.sleep(0.01)\nassert random.SystemRandom().random() < time.time()",
    "an alarm of its own": "import signal\nrang = []\nsignal.signal(signal.SIGALRM, lambda *_: rang.append(1))\n"
    "signal.setitimer(signal.ITIMER_REAL, 0.01)\nsignal.pause()\nassert rang",
    "a text as a file": "import io\nassert sum(1 for line in io.StringIO('a\\nb')) == 2",
}

WRONG = {
    "an assertion": ("assert sum(range(5)) == 11", "AssertionError"),
    "no Python": ("def f(:", "SyntaxError"),
    "leaves early": ("raise SystemExit(0)", "SystemExit"),
    "leaves at once": ("import os\nos._exit(0)", "ended early with exit code 0"),
    "recursion": ("def f():\n    return f()\nf()", "RecursionError"),
    "waits for input": ("input()", "EOFError"),
    "a package": ("import numpy", "ModuleNotFoundError"),
}

NO = "PermissionError: [Errno 1]"
LIBC = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
RAISE = "raise OSError(ctypes.get_errno(), 'refused')"
CLONE = {"x86_64": 56, "aarch64": 220}[platform.machine()]
HOSTILE = {
    "loops": ("while True:\n    pass", "CPU limit of 1 s"),
    "sleeps": ("import time\ntime.sleep(60)", "wall limit of 2 s"),
    "allocates at once": ("x = bytearray(1 << 34)", "MemoryError"),
    "allocates": ("x = []\nwhile True:\n    x.append(bytearray(1 << 26))", "MemoryError"),
    "forks": ("import os\nos.fork()", NO),
    "forks for ever": (
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
        "CPU limit",
    ),
    "forks below Python": (
        f"{LIBC}found = [libc.fork(), libc.vfork(), libc.clone(0, 0, 17, 0)]\nraise OSError(found)",
        "OSError: [-1, -1, -1]",
    ),
    "starts a program": ("import subprocess\nsubprocess.run(['true'])", NO),
    "becomes a program": ("import os\nos.execv('/bin/true', ['true'])", NO),
    "starts a thread": (
        "import threading\nthreading.Thread(target=print).start()",
        "RuntimeError: can't start new thread",
    ),
    "starts a small thread below Python": (
        f"{LIBC}flags = 0x10f00\nlibc.syscall({CLONE}, flags, 0, 0, 0, 0)\n{RAISE}",
        NO,
    ),
    "opens many files": ("import os\nkept = []\nwhile True:\n    kept += os.pipe()", "[Errno 24]"),
    "prints for ever": ("while True:\n    print('x' * 65536, flush=True)", "CPU limit"),
    "ignores what would end it": (
        "import signal, time\nfor number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):\n"
        "    signal.signal(number, signal.SIG_IGN)\ntime.sleep(60)",
        "wall limit",
    ),
    "ignores the CPU limit": (
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True:\n    pass",
        "CPU limit",
    ),
    "fails for ever": (
        "class Endless(Exception):\n    def __str__(self):\n        while True:\n            pass\nraise Endless",
        "CPU limit",
    ),
    "fails at length": ("raise ValueError('x' * 10**7)", "ValueError: xxx"),
    "opens a socket": ("import socket\nsocket.socket()", NO),
    "opens a pair": ("import socket\nsocket.socketpair()", NO),
    "kills its parent": ("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)", NO),
    "kills all": ("import os, signal\nos.kill(-1, signal.SIGKILL)", NO),
    "signals by a pipe": ("import fcntl, os\nfcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())", NO),
    "types at a terminal": ("import fcntl\nfcntl.ioctl(0, 0x5412, b'x')", NO),
    "locks a file": ("import fcntl, os\nfcntl.flock(os.open('.', os.O_RDONLY), fcntl.LOCK_EX)", NO),
    "slows others": ("import os\nos.setpriority(os.PRIO_USER, 0, 19)", NO),
    "moves its parent": ("import os\nos.sched_setaffinity(os.getppid(), {0})", NO),
    "shares memory": (f"{LIBC}libc.shmat(0, 0, 0)\n{RAISE}", NO),
    "removes shared memory": (f"{LIBC}libc.shmctl(0, 0, 0)\n{RAISE}", NO),
    "uses a newer call": (f"{LIBC}libc.syscall(425, 1, ctypes.create_string_buffer(120))\n{RAISE}", "[Errno 38]"),
    "raises its limits": (
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY,) * 2)",
        "not allowed to raise",
    ),
    "writes here": ("open('x', 'w')", NO),
    "writes a pipe full": (
        "import os\nfor descriptor in range(3, 64):\n    try:\n        while True:\n"
        "            os.write(descriptor, b'x' * 65536)\n    except OSError:\n        pass",
        "wall limit",
    ),
    "forges a pass": (
        "import os\nfor descriptor in range(3, 64):\n    try:\n        os.write(descriptor, b'ended ')\n"
        "    except OSError:\n        pass\nos._exit(0)",
        "ended early with exit code",
    ),
    "says that nothing is confined": (
        "import os\nfor descriptor in range(3, 64):\n    try:\n        os.write(descriptor, b'unconfined x')\n"
        "    except OSError:\n        pass\nos._exit(0)",
        "ended early with exit code",
    ),
}


@pytest.mark.parametrize("program", RIGHT.values(), ids=RIGHT.keys())
def test_right_programs_pass(program):
    result = run_code(program)
    assert result.passed, result


@pytest.mark.parametrize("program, reason", WRONG.values(), ids=WRONG.keys())
def test_wrong_programs_fail(program, reason):
    result = run_code(program, SHORT)
    assert not result.passed and reason in result.reason, result


@pytest.mark.parametrize("program, reason", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_programs_hit_a_limit(program, reason):
    limits, before = WAITING if "wall" in reason else SHORT, time.monotonic()
    result = run_code(program, limits)
    assert not result.passed and reason in result.reason, result
    assert time.monotonic() - before < limits.wall_seconds + 5


@pytest.mark.parametrize(
    "change",
    [
        "open({path!r}, 'w').write('changed')",
        "open({path!r}, 'a').write('changed')",
        "import os; os.truncate({path!r}, 0)",
        "import os; os.remove({path!r})",
        "import os; os.rename({path!r}, {path!r} + '2')",
        "import os; os.chmod({path!r}, 0)",
        "import os; os.utime({path!r}, (0, 0))",
        "import os; os.symlink({path!r}, {path!r} + '2')",
        "import os; os.link({path!r}, {path!r} + '2')",
        "import os; os.mkdir({path!r} + '2')",
        "import os; os.mkfifo({path!r} + '2')",
        "import ctypes; raise OSError(1, str(ctypes.CDLL(None).creat({path!r}.encode(), 0o644)))",
    ],
)
def test_programs_cannot_write_files(tmp_path, change):
    path = tmp_path / "precious"
    path.write_text("as it was")
    before = path.stat()
    result = run_code(change.format(path=str(path)), SHORT)
    assert not result.passed and "[Errno 1]" in result.reason, result
    after = path.stat()
    assert [*tmp_path.iterdir()] == [path] and path.read_text() == "as it was"
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


@pytest.mark.parametrize(
    "read", ["open({path!r})", "__import__('os').listdir({folder!r})", "open('/proc/self/environ')"]
)
def test_programs_cannot_read_user_files(tmp_path, read):
    (tmp_path / "secret").write_text("of mine")
    result = run_code(read.format(path=str(tmp_path / "secret"), folder=str(tmp_path)), SHORT)
    if ctypes.CDLL(None).syscall(444, None, 0, 1) < 1:  # no Landlock: a program reads what the user can read
        assert result.passed, result
    else:
        assert not result.passed and "PermissionError: [Errno 13]" in result.reason, result


def test_programs_cannot_connect_to_this_machine():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(1)
        port = server.getsockname()[1]
        result = run_code(f"import socket\nsocket.create_connection(('127.0.0.1', {port}))", SHORT)
        assert not result.passed and NO in result.reason, result
        with pytest.raises(TimeoutError):
            server.accept()


def test_programs_get_no_environment_and_an_empty_folder(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    program = "import os\nassert set(os.environ) <= {'LC_CTYPE'}, os.environ\nassert os.listdir() == []"
    result = run_code(program)
    assert result.passed, result


def test_no_process_is_left():
    """The process of a hanging program has ended when `run_code` returns."""
    run_code("import time\ntime.sleep(60)\n", WAITING)
    assert not [child.cmdline() for child in psutil.Process().children() if "confine.py" in str(child.cmdline())]


def test_the_solutions_of_the_offline_suite_pass():
    rows = [json.loads(line) for line in (TASKS / "offline_code.jsonl").read_text().splitlines()]
    assert len(rows) >= 8
    for row in rows:
        assert score_completion(row, [row["solution"]]) == {"pass@1": 1}, row
        assert score_completion(row, ["    return None\n"]) == {"pass@1": 0}, row


@pytest.mark.parametrize(
    "body",
    [
        "while True: pass",
        "return [bytearray(1 << 26) for _ in range(1 << 20)]",
        "import os; os.fork(); return a + b",
        "import socket; socket.socket(); return a + b",
    ],
)
def test_hostile_answers_are_scored_as_failures(body):
    """A hostile body scores 0, even if its sum is right."""
    row = json.loads((TASKS / "offline_code.jsonl").read_text().splitlines()[0])
    assert score_completion(row, [f"    {body}\n"]) == {"pass@1": 0}


def test_programs_are_scored_by_the_tests_of_mbpp():
    document = {
        "test_setup_code": "import math",
        "test_list": ["assert half(4) == 2", "assert math.floor(half(5)) == 2"],
    }
    assert score_program(document, ["def half(x):\n    return x / 2"]) == {"pass@1": 1}
    assert score_program(document, ["def half(x):\n    return x"]) == {"pass@1": 0}
    assert score_program(document, [""]) == {"pass@1": 0}


@pytest.mark.parametrize(
    "answer, golden, right",
    [
        ("25", "25", 1),
        ("所以一共有 1,234 个", "1234", 1),
        ("3 + 4 = 7。", "7.0", 1),
        ("3/4", "0.75", 1),
        ("-2", "-2", 1),
        ("26", "25", 0),
        ("", "25", 0),
        ("1/0", "25", 0),
    ],
)
def test_numbers_are_compared_as_numbers(answer, golden, right):
    assert score_number({"golden": golden}, [answer]) == {"exact_match": right}


def test_the_last_number_counts():
    assert last_number("12 apples, then 3.50") == 3.5
    assert last_number("none") is None


def test_a_machine_that_cannot_confine_runs_nothing(tmp_path, monkeypatch):
    """Code is refused, not run, if the filter cannot be set: on another processor or another system."""
    from eval import sandbox

    source = Path(sandbox.__file__).with_name("confine.py").read_text()
    changed = tmp_path / "confine.py"
    changed.write_text(source.replace("platform.machine()", "'riscv64'"))
    monkeypatch.setattr(sandbox, "_CONFINE", changed)
    with pytest.raises(ValueError, match="cannot confine code"):
        run_code("pass", SHORT)
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ValueError, match="Linux only"):
        run_code("pass", SHORT)


ALLOWED, REFUSED, MISSING, KILLED = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS, 0x80000000
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def filter_result(program, audit, number, *arguments):
    """Return the filter's result for a system call by interpreting its classic BPF instructions."""
    data = struct.pack("=IIQ6Q", number, audit, 0, *(*arguments, *(0,) * (6 - len(arguments))))
    code, position = list(struct.iter_unpack("=HBBI", program)), 0
    while True:
        kind, if_true, if_false, value = code[position]
        position += 1
        if kind == 0x20:
            (loaded,) = struct.unpack_from("=I", data, value)
        elif kind == 0x06:
            return value
        else:
            holds = {0x15: loaded == value, 0x35: loaded >= value, 0x45: bool(loaded & value)}[kind]
            position += if_true if holds else if_false


CALLS = {
    "read": ((0, 63), (), ALLOWED),
    "mmap": ((9, 222), (), ALLOWED),
    "openat to read": ((257, 56), (0, 0, os.O_RDONLY | os.O_CLOEXEC), ALLOWED),
    "openat to write": ((257, 56), (0, 0, os.O_WRONLY), REFUSED),
    "openat to read and write": ((257, 56), (0, 0, os.O_RDWR), REFUSED),
    "openat to make": ((257, 56), (0, 0, os.O_CREAT), REFUSED),
    "socket": ((41, 198), (2, 1), REFUSED),
    "clone of a process": ((56, 220), (17,), REFUSED),
    "clone of a thread": ((56, 220), (0x10F00,), REFUSED),
    "clone3": ((435, 435), (), MISSING),
    "io_uring_setup": ((425, 425), (), MISSING),
    "a call of the future": ((999, 999), (), MISSING),
    "fcntl F_DUPFD_CLOEXEC": ((72, 25), (3, 1030), ALLOWED),
    "fcntl F_SETOWN": ((72, 25), (3, 8), REFUSED),
    "fcntl F_SETSIG": ((72, 25), (3, 10), REFUSED),
    "ioctl TCGETS": ((16, 29), (0, 0x5401), ALLOWED),
    "ioctl TIOCSTI": ((16, 29), (0, 0x5412), REFUSED),
    "unlinkat": ((263, 35), (), REFUSED),
    "kill": ((62, 129), (), REFUSED),
}


@pytest.mark.parametrize("machine", AUDIT)
def test_the_filter_of_each_architecture(machine):
    """The filter gives the expected result for each system call on x86_64 and aarch64."""
    program = confine._filter(machine)
    for name, (numbers, arguments, expected) in CALLS.items():
        number = numbers[list(AUDIT).index(machine)]
        assert filter_result(program, AUDIT[machine], number, *arguments) == expected, name
        assert filter_result(program, 0x40000003, number, *arguments) == KILLED, name  # as i386
    for name, row in confine._REFUSED.items():
        assert filter_result(program, AUDIT[machine], row[list(AUDIT).index(machine)]) == REFUSED, name
    if machine == "x86_64":
        assert filter_result(program, AUDIT[machine], 2, 0, os.O_WRONLY) == REFUSED
        assert filter_result(program, AUDIT[machine], 0x40000000 | 1) == REFUSED  # the x32 interface
