"""Takes away a process's rights for good, except its pipes, its memory, a clock, and perhaps one file that is open.

Three layers, as far as the system has them:

- Landlock (`landlock(7)`, Linux 5.13): no path can be opened, no TCP port bound or connected to, no signal or abstract
  socket reaches a process outside;
- hard resource limits (`setrlimit(2)`) on address space and CPU time; no file grows, no new descriptor;
- seccomp (`seccomp(2)`, x86-64 and arm64): only the system calls in `_ALLOWED`, no executable memory, no
  processes, and threads only where they are asked for. A refused call fails with EPERM, so that libraries fall back to
  others. Without it a resource limit forbids processes and threads, unless the user is root.

Landlock and seccomp need `PR_SET_NO_NEW_PRIVS`, so that no setuid program gives rights back. Constants are those of
Linux's headers. If a step fails halfway, the rights that it has taken away stay so.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress

try:  # here, because later no file can be opened
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

LAYERS = ("landlock", "limits", "seccomp")
"""The layers that `confine` may report, in the order in which it applies them."""
FILE = 3
"""The descriptor of the file that a process may keep."""


def confine(memory: int, cpu_seconds: int, file: int | None = None, has_threads: bool = False) -> list[str]:
    """Confines this process to `memory` bytes of address space and `cpu_seconds`; returns the layers in force.

    With `has_threads` seccomp lets it start threads, any number: no limit counts those of one process.

    Everything that it needs must be imported and open before. Descriptors other than 0, 1, 2 and `file` are closed;
    that one becomes `FILE`. It should be open for reading only, but no file can be written to in any case.
    """
    if file is not None:
        os.dup2(file, FILE)
    os.closerange(FILE + (file is not None), 1 << 16)
    steps = {
        "landlock": _restrict_paths,
        "limits": lambda: _limit(memory, cpu_seconds),
        "seccomp": lambda: _filter_calls(has_threads),
    }
    in_force = [name for name, step in steps.items() if _succeeds(step)]
    if "seccomp" not in in_force:
        _succeeds(lambda: _set_limits({"NPROC": 0}))
    return in_force


def _succeeds(step: Callable[[], None]) -> bool:
    try:
        step()
    except (OSError, AttributeError):  # AttributeError: a C library without the function
        return False
    return True


def _limit(memory: int, cpu_seconds: int) -> None:
    _set_limits({"AS": memory, "CPU": cpu_seconds, "FSIZE": 0, "NOFILE": 3, "CORE": 0, "MEMLOCK": 0})


def _set_limits(most: dict[str, int]) -> None:
    if resource is None:
        raise OSError(errno.ENOSYS, "no limits on this system")
    for name, value in most.items():
        with suppress(OSError, ValueError, AttributeError):  # a system that lacks one, or has a lower one already
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38  # linux/prctl.h


def _linux() -> ctypes.CDLL:
    """The C library, after making sure that this process ends with its parent and can gain no rights."""
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, "not Linux")
    libc = ctypes.CDLL(None, use_errno=True)
    _checked(libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    _checked(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    return libc


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


# Landlock: linux/landlock.h. A ruleset without rules forbids everything that it handles.

_CREATE_RULESET, _RESTRICT_SELF = 444, 446  # the same numbers on all architectures
_VERSION = 1  # LANDLOCK_CREATE_RULESET_VERSION
_PATH_RIGHTS = ((1, 13), (2, 14), (3, 15), (5, 16))
"""Versions of the interface, and the number of rights over paths from there on, one bit each."""
_NET_RIGHTS = 0b11  # version 4: bind and connect TCP
_SCOPES = 0b11  # version 6: abstract Unix sockets, and signals to processes outside


def _restrict_paths() -> None:
    libc = _linux()
    version = _checked(libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION))
    rights = max(count for since, count in _PATH_RIGHTS if version >= since)
    attributes = struct.pack("=Q", (1 << rights) - 1)
    attributes += struct.pack("=Q", _NET_RIGHTS) if version >= 4 else b""
    attributes += struct.pack("=Q", _SCOPES) if version >= 6 else b""
    ruleset = _checked(libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0))
    try:
        _checked(libc.syscall(_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)


# seccomp: linux/seccomp.h, linux/filter.h, linux/audit.h.

_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_RETURN_ALLOW, _RETURN_KILL = 0x7FFF0000, 0x80000000
_RETURN_EPERM, _RETURN_ENOSYS = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
# BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_JMP|JSET|K, BPF_RET|K.
_BPF_LOAD, _BPF_JUMP_EQUAL, _BPF_JUMP_SET, _BPF_RETURN = 0x20, 0x15, 0x45, 0x06
# Offsets in struct seccomp_data; the lower half of an argument comes first.
_NUMBER_OFFSET, _ARCHITECTURE_OFFSET, _ARGUMENTS_OFFSET = 0, 4, 16
_PROT_EXEC = 4
_CLONE_THREAD_FLAG = 0x10000

_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""AUDIT_ARCH, and the column in `_ALLOWED`."""
_ALLOWED = {
    "read": (0, 63),
    "write": (1, 64),
    "readv": (19, 65),
    "writev": (20, 66),
    "close": (3, 57),
    "fstat": (5, 80),
    "lseek": (8, 62),
    "brk": (12, 214),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "futex": (202, 98),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "nanosleep": (35, 101),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "gettimeofday": (96, 169),
    "getpid": (39, 172),
    "gettid": (186, 178),
    "getrusage": (98, 165),
    "getrandom": (318, 278),
    "set_robust_list": (273, 99),
    "rseq": (334, 293),
    "membarrier": (324, 283),
    "exit": (60, 93),
    "exit_group": (231, 94),
}
_MMAP, _MPROTECT, _CLONE, _CLONE3 = (9, 222), (10, 226), (56, 220), (435, 435)


def _filter_calls(has_threads: bool) -> None:
    libc = _linux()
    architecture = _ARCHITECTURES.get(platform.machine())
    if architecture is None or sys.maxsize < 2**32 or sys.byteorder != "little":
        raise OSError(errno.ENOSYS, "no list of system calls for this processor")
    code = b"".join(_program(*architecture, has_threads))

    class SockFprog(ctypes.Structure):  # struct sock_fprog
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))

    program = SockFprog(len(code) // 8, code)
    _checked(libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0))


def _program(audit_arch: int, column: int, has_threads: bool) -> Iterator[bytes]:
    """The filter in classic BPF, instruction by instruction; jumps count the instructions to skip."""

    def instruction(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, operand)

    yield instruction(_BPF_LOAD, _ARCHITECTURE_OFFSET)
    yield instruction(_BPF_JUMP_EQUAL, audit_arch, 1, 0)
    yield instruction(_BPF_RETURN, _RETURN_KILL)  # 32-bit calls have other numbers
    yield instruction(_BPF_LOAD, _NUMBER_OFFSET)
    for numbers in _ALLOWED.values():
        yield instruction(_BPF_JUMP_EQUAL, numbers[column], 0, 1)
        yield instruction(_BPF_RETURN, _RETURN_ALLOW)
    for numbers in (_MMAP, _MPROTECT):  # argument 2 is the protection
        yield instruction(_BPF_JUMP_EQUAL, numbers[column], 0, 4)
        yield instruction(_BPF_LOAD, _ARGUMENTS_OFFSET + 8 * 2)
        yield instruction(_BPF_JUMP_SET, _PROT_EXEC, 0, 1)
        yield instruction(_BPF_RETURN, _RETURN_EPERM)
        yield instruction(_BPF_RETURN, _RETURN_ALLOW)
    if has_threads:
        yield instruction(_BPF_JUMP_EQUAL, _CLONE[column], 0, 4)  # argument 0 is the flags
        yield instruction(_BPF_LOAD, _ARGUMENTS_OFFSET)
        yield instruction(_BPF_JUMP_SET, _CLONE_THREAD_FLAG, 1, 0)
        yield instruction(_BPF_RETURN, _RETURN_EPERM)
        yield instruction(_BPF_RETURN, _RETURN_ALLOW)
    yield instruction(_BPF_JUMP_EQUAL, _CLONE3[column], 0, 1)
    # The flags of clone3 are in memory, which a filter cannot read; the C library falls back to clone.
    yield instruction(_BPF_RETURN, _RETURN_ENOSYS)
    yield instruction(_BPF_RETURN, _RETURN_EPERM)  # also the x32 ABI's calls, whose numbers have bit 30 set
