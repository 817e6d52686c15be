"""Confines this process, then runs a program in it. `eval.sandbox` runs it in a Python of its own, without packages.

    python -I -S -B confine.py LIMITS RESULT_FD TOKEN_FD < PROGRAM

What holds, whatever the program does: limits of the kernel on CPU time, address space and size of files; no
capabilities even for root; and a seccomp filter that refuses sockets, new processes, other programs, signals, new
limits, and any change to files. A refused call fails with EPERM as an ordinary OSError. Linux on x86-64 or aarch64.

TOKEN_FD is read after the program has run to its end and its content goes to RESULT_FD, so a program that ends itself
early has not passed.
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
_CLONE_NEWUSER, _CLONE_NEWNET, _CLONE_THREAD = 0x1000_0000, 0x4000_0000, 0x0001_0000
_CAPABILITY_VERSION_3 = 0x2008_0522
_ALLOW, _KILL = 0x7FFF_0000, 0x8000_0000
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

# Numbers of system calls: {name: (x86-64, aarch64)}, None where the architecture has none.
_REFUSED: dict[str, tuple[int | None, int]] = {
    # network
    "socket": (41, 198),
    "socketpair": (53, 199),
    "io_uring_setup": (425, 425),
    # processes and programs
    "execve": (59, 221),
    "execveat": (322, 281),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "setns": (308, 268),
    "unshare": (272, 97),
    "chroot": (161, 51),
    "pivot_root": (155, 41),
    "mount": (165, 40),
    "umount2": (166, 39),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    # signals
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    # limits
    "setrlimit": (160, 164),
    "prlimit64": (302, 261),
    # memory that no limit of address space counts
    "memfd_create": (319, 279),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    # files and what is known of them
    "truncate": (76, 45),
    "ftruncate": (77, 46),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "unlinkat": (263, 35),
    "mkdirat": (258, 34),
    "mknodat": (259, 33),
    "linkat": (265, 37),
    "symlinkat": (266, 36),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
}
_REFUSED_X86 = {
    "fork": 57,
    "vfork": 58,
    "creat": 85,
    "rename": 82,
    "mkdir": 83,
    "rmdir": 84,
    "link": 86,
    "unlink": 87,
    "symlink": 88,
    "chmod": 90,
    "chown": 92,
    "lchown": 94,
    "mknod": 133,
    "utime": 132,
    "utimes": 235,
    "futimesat": 261,
}
_MISSING = {"clone3": 435, "openat2": 437}
"""Their arguments lie in memory that a filter cannot read. ENOSYS lets callers use the older call."""

_ARCHITECTURES = {"x86_64": (0, 0xC000_003E), "aarch64": (1, 0xC000_00B7)}
"""Column in the table above, and the kernel's name of the architecture."""


def _filter(machine: str) -> bytes:
    """The seccomp filter as a program of classic BPF."""
    column, architecture = _ARCHITECTURES[machine]
    code: list[tuple[int, int, int, int]] = []

    def load(offset: int) -> None:
        code.append((0x20, 0, 0, offset))

    def end(value: int) -> None:
        code.append((0x06, 0, 0, value))

    def if_equal(value: int) -> None:
        code.append((0x15, 0, 1, value))

    def argument(number: int) -> int:
        return 16 + 8 * number  # the lower half, on these little-endian machines

    refuse, missing = 0x0005_0000 | errno.EPERM, 0x0005_0000 | errno.ENOSYS
    load(4)
    code.append((0x15, 1, 0, architecture))
    end(_KILL)
    load(0)
    if machine == "x86_64":
        code.append((0x35, 0, 1, 0x4000_0000))  # calls of the x32 interface have other numbers
        end(refuse)
    numbers = [row[column] for row in _REFUSED.values()] + (list(_REFUSED_X86.values()) if column == 0 else [])
    for number in numbers:
        assert number is not None
        if_equal(number)
        end(refuse)
    for number in _MISSING.values():
        if_equal(number)
        end(missing)
    # Threads may begin, processes may not.
    code.append((0x15, 0, 4, (56, 220)[column]))
    load(argument(0))
    code.append((0x45, 1, 0, _CLONE_THREAD))
    end(refuse)
    end(_ALLOW)
    # Files may be opened for reading.
    opens = [((257, 56)[column], 2)] + ([(2, 1)] if column == 0 else [])
    for number, flags in opens:
        code.append((0x15, 0, 4, number))
        load(argument(flags))
        code.append((0x45, 0, 1, _WRITING))
        end(refuse)
        end(_ALLOW)
    end(_ALLOW)
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def confine(limits: dict[str, int]) -> None:
    """Give up, for good, all that a code answer has no need of.

    Args:
        limits: `cpu_seconds`, `memory_bytes`.

    Raises:
        OSError: the kernel does not allow it, and the program must not run.
        KeyError: another kind of machine.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def call(*arguments: object) -> None:
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    program = _filter(platform.machine())
    seconds = limits["cpu_seconds"]
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (limits["memory_bytes"],) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A second wall where the kernel allows it: a network of its own without any device.
    with contextlib.suppress(OSError):
        if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare")
    header, empty = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), bytes(24)
    if libc.capset(header, empty):
        raise OSError(ctypes.get_errno(), "capset")
    call(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    buffer = ctypes.create_string_buffer(program, len(program))
    described = struct.pack("@HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    call(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, described, 0, 0)


def main() -> None:
    """Run the program that stands on standard input.

    The result is `confined`, so nothing that the program writes comes before it, and `ended` with the token or `failed`
    with the reason; or `unconfined` with the reason, and the program was not run.
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
    except BaseException as error:  # SystemExit and KeyboardInterrupt of the program are failures too
        os.write(result, f"failed {type(error).__name__}: {error}"[:500].encode("utf-8", "replace"))
        os._exit(1)
    os.write(result, b"ended " + os.read(token, 64))
    os._exit(0)


if __name__ == "__main__":
    main()
