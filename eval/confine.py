"""Confine this process, then run a program in it. `eval.sandbox` runs this file in a Python without packages.

    python -I -S -B confine.py LIMITS RESULT_FD TOKEN_FD < PROGRAM

The kernel limits CPU time, address space, open files and file size, and the process has no capabilities, even as root.
A seccomp filter refuses sockets, new processes and threads, other programs, signals, shared memory, new limits and
priorities, and any change to files. A refused call fails with EPERM, an ordinary OSError. If the kernel has Landlock,
the program can read only Python and the system's libraries; otherwise it can read what the user can, but cannot send it
anywhere. Linux on x86-64 or aarch64.

After the program has run to its end, the content of TOKEN_FD is written to RESULT_FD, so a program that ends early does
not pass.
"""

import contextlib
import ctypes
import errno
import json
import os
import platform
import resource
import struct
import sys

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_CLONE_NEWUSER, _CLONE_NEWNET = 0x1000_0000, 0x4000_0000
_CAPABILITY_VERSION_3 = 0x2008_0522
_ALLOW, _KILL = 0x7FFF_0000, 0x8000_0000
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_OPEN_FILES = 64


def _parse_calls(table: str) -> dict[str, tuple[int, ...]]:
    """Return the numbers of each call in a table of entries `name number ...`, which commas separate."""
    rows = [entry.split() for line in table.splitlines() if "#" not in line for entry in line.split(",")]
    return {row[0]: tuple(map(int, row[1:])) for row in rows if row}


_REFUSED = _parse_calls("""
    # network
    socket 41 198, socketpair 53 199,
    # processes, threads and programs
    clone 56 220, execve 59 221, execveat 322 281, ptrace 101 117, process_vm_readv 310 270,
    process_vm_writev 311 271, setpgid 109 154, setsid 112 157, setns 308 268, unshare 272 97, chroot 161 51,
    pivot_root 155 41, mount 165 40, umount2 166 39, bpf 321 280, perf_event_open 298 241, userfaultfd 323 282,
    keyctl 250 219, add_key 248 217, request_key 249 218,
    # signals
    kill 62 129, tkill 200 130, tgkill 234 131, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240,
    # limits, and resources of the user's other processes
    setrlimit 160 164, prlimit64 302 261, setpriority 141 140, ioprio_set 251 30, sched_setparam 142 118,
    sched_setscheduler 144 119, sched_setaffinity 203 122, sched_setattr 314 274, migrate_pages 256 238,
    move_pages 279 239, sync 162 81, syncfs 306 267,
    # memory outside the address space limit, or shared with other processes
    memfd_create 319 279, shmget 29 194, shmat 30 196, shmctl 31 195, msgget 68 186, msgsnd 69 189, msgrcv 70 188,
    msgctl 71 187, semget 64 190, semop 65 193, semtimedop 220 192, semctl 66 191, mq_open 240 180,
    mq_unlink 241 181,
    # files and their metadata
    open_by_handle_at 304 265, flock 73 32, truncate 76 45, ftruncate 77 46, renameat 264 38, renameat2 316 276,
    unlinkat 263 35, mkdirat 258 34, mknodat 259 33, linkat 265 37, symlinkat 266 36, fchmod 91 52, fchmodat 268 53,
    fchown 93 55, fchownat 260 54, utimensat 280 88, setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7,
    removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16,
""")
"""System calls by name: number on x86-64, number on aarch64."""

_REFUSED_X86 = _parse_calls("""
    fork 57, vfork 58, creat 85, rename 82, mkdir 83, rmdir 84, link 86, unlink 87, symlink 88, chmod 90, chown 92,
    lchown 94, mknod 133, utime 132, utimes 235, futimesat 261,
""")
"""System calls that only x86-64 has."""

_MISSING_FROM = 424
"""First system call that is missing: calls since Linux 5.1, such as io_uring, clone3 and openat2. Their numbers are the
same on all architectures. A filter cannot read the arguments of many of them, and future calls are unknown. With
ENOSYS, callers use the older calls."""

_ONLY: dict[tuple[int, int], tuple[int, ...]] = {
    # fcntl: F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC. Other commands send signals or lock files.
    (72, 25): (0, 1, 2, 3, 4, 1030),
    # ioctl: TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX. Other requests change devices or attributes.
    (16, 29): (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451),
}
"""Calls that select an operation by their second argument: the allowed values."""

_READABLE = (
    sys.base_prefix,
    *sys.path,
    ".",
    "/usr",
    "/lib",
    "/lib64",
    "/nix/store",
    "/etc/ld.so.cache",
    "/etc/localtime",
)
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_READ_FILE, _READ_FOLDER, _ANYTHING = 1 << 2, 1 << 3, (1 << 13) - 1
"""Access rights of Landlock's first version; its system calls have the same numbers on all architectures."""

_ARCHITECTURES = {"x86_64": (0, 0xC000_003E), "aarch64": (1, 0xC000_00B7)}
"""Column in the tables above, and the architecture constant of the kernel."""


def _filter(machine: str) -> bytes:
    """Return the seccomp filter as a classic BPF program, for an architecture in _ARCHITECTURES."""
    column, architecture = _ARCHITECTURES[machine]
    code: list[tuple[int, int, int, int]] = []

    def load(offset: int) -> None:
        code.append((0x20, 0, 0, offset))

    def return_(value: int) -> None:
        code.append((0x06, 0, 0, value))

    def if_equal(value: int) -> None:
        code.append((0x15, 0, 1, value))

    def argument(number: int) -> int:
        return 16 + 8 * number  # the lower half, on these little-endian machines

    refuse, missing = 0x0005_0000 | errno.EPERM, 0x0005_0000 | errno.ENOSYS
    load(4)
    code.append((0x15, 1, 0, architecture))
    return_(_KILL)
    load(0)
    if machine == "x86_64":
        code.append((0x35, 0, 1, 0x4000_0000))  # calls of the x32 interface
        return_(refuse)
    code.append((0x35, 0, 1, _MISSING_FROM))
    return_(missing)
    for number in [row[column] for row in (_REFUSED | (_REFUSED_X86 if column == 0 else {})).values()]:
        if_equal(number)
        return_(refuse)
    for numbers, allowed in _ONLY.items():
        code.append((0x15, 0, 1 + 2 * len(allowed) + 1, numbers[column]))
        load(argument(1))
        for value in allowed:
            if_equal(value)
            return_(_ALLOW)
        return_(refuse)
    # Files may be opened for reading.
    opens = [((257, 56)[column], 2)] + ([(2, 1)] if column == 0 else [])
    for number, flags in opens:
        code.append((0x15, 0, 4, number))
        load(argument(flags))
        code.append((0x45, 0, 1, _WRITING))
        return_(refuse)
        return_(_ALLOW)
    return_(_ALLOW)
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _restrict_reads(libc: ctypes.CDLL) -> None:
    """Allow reads of `_READABLE` and `_DEVICES` only, if the kernel has Landlock (Linux 5.13 and later)."""
    handled = struct.pack("=Q", _ANYTHING)
    rules = libc.syscall(444, handled, len(handled), 0)
    if rules < 0:
        return
    for path in _READABLE + _DEVICES:
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_PATH)
            access = _READ_FILE | (_READ_FOLDER if os.path.isdir(path) else 0)
            if libc.syscall(445, rules, 1, struct.pack("=Qi", access, descriptor), 0):
                raise OSError(ctypes.get_errno(), "landlock_add_rule")
            os.close(descriptor)
    if libc.syscall(446, rules, 0):
        raise OSError(ctypes.get_errno(), "landlock_restrict_self")
    os.close(rules)


def confine(limits: dict[str, int]) -> None:
    """Restrict this process permanently to what an answer needs.

    Args:
        limits: `cpu_seconds`, `memory_bytes`.

    Raises:
        OSError: the kernel refuses; the program must not run.
        KeyError: the architecture is not supported.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def call(*arguments: object) -> None:
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    program = _filter(platform.machine())
    seconds = limits["cpu_seconds"]
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (limits["memory_bytes"],) * 2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (_OPEN_FILES, _OPEN_FILES))
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE, resource.RLIMIT_MEMLOCK, resource.RLIMIT_SIGPENDING):
        resource.setrlimit(limit, (0, 0))
    # Defense in depth, if the kernel allows it: a separate network namespace without devices.
    with contextlib.suppress(OSError):
        if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare")
    header, empty = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), bytes(24)
    if libc.capset(header, empty):
        raise OSError(ctypes.get_errno(), "capset")
    call(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _restrict_reads(libc)
    buffer = ctypes.create_string_buffer(program, len(program))
    filter_struct = struct.pack("@HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    call(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, filter_struct, 0, 0)


def main() -> None:
    """Run the program from standard input.

    The result is `confined`, written before the program starts, then `ended` with the token or `failed` with the
    reason. If confinement fails, it is `unconfined` with the reason, and the program does not run.
    """
    limits, result, token = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    source = sys.stdin.buffer.read()
    try:
        confine(limits)
    except (OSError, KeyError) as error:
        os.write(result, f"unconfined {error!r}".encode())
        return
    os.write(result, b"confined ")
    try:
        exec(compile(source, "answer.py", "exec"), {"__name__": "__main__"})
    except BaseException as error:  # SystemExit and KeyboardInterrupt are failures, too
        os.write(result, f"failed {type(error).__name__}: {error}"[:500].encode("utf-8", "replace"))
        os._exit(1)
    os.write(result, b"ended " + os.read(token, 64))
    os._exit(0)


if __name__ == "__main__":
    main()
