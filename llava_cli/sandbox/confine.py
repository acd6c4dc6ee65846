"""Takes a process's rights away, for good: what decodes strangers' bytes keeps its pipes, memory and a clock.

Three layers, each as far as the system has it:

- Landlock (`landlock(7)`, Linux 5.13): no path can be opened, no TCP port bound or connected to, no signal or abstract
  socket reaches a process outside;
- resource limits (`setrlimit(2)`), hard ones: address space and computing; no file grows, no new descriptor or process;
- seccomp (`seccomp(2)`, x86-64 and arm64): the system calls in `_ALLOWED` and no others, none that makes memory
  executable, threads but no processes. A refused call fails with EPERM, so that libraries take their other way.

Landlock and seccomp need `PR_SET_NO_NEW_PRIVS`, so no setuid program would give rights back. Constants are those of
Linux's headers; nothing here is taken back when it fails half way: less is granted, never more.
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

try:  # before no file can be opened any more
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

LAYERS = ("landlock", "limits", "seccomp")
"""What `confine` may report, in the order in which it is applied."""


def confine(memory: int, cpu_seconds: int) -> list[str]:
    """Confines this process: `memory` bytes of address space, seconds of computing in all. Returns what took hold.

    Everything that it will need must be imported and open by now. Descriptors other than 0, 1 and 2 are closed.
    """
    os.closerange(3, 1 << 16)
    steps = {"landlock": _restrict_paths, "limits": lambda: _limit(memory, cpu_seconds), "seccomp": _filter_calls}
    return [name for name, step in steps.items() if _took_hold(step)]


def _took_hold(step: Callable[[], None]) -> bool:
    try:
        step()
    except (OSError, AttributeError):  # AttributeError: a C library without the function
        return False
    return True


def _limit(memory: int, cpu_seconds: int) -> None:
    if resource is None:
        raise OSError(errno.ENOSYS, "no limits on this system")
    most = {"AS": memory, "CPU": cpu_seconds, "FSIZE": 0, "NOFILE": 3, "NPROC": 0, "CORE": 0, "MEMLOCK": 0}
    for name, value in most.items():
        with suppress(OSError, ValueError, AttributeError):  # a system that lacks one, or has a lower one already
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38  # linux/prctl.h


def _linux() -> ctypes.CDLL:
    """The C library, once this process ends with its parent and can gain no rights any more, as the kernel wants it."""
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


# Landlock: linux/landlock.h. A ruleset without rules forbids all that it handles.

_CREATE_RULESET, _RESTRICT_SELF = 444, 446  # the same numbers on all architectures
_VERSION = 1  # LANDLOCK_CREATE_RULESET_VERSION
_PATH_RIGHTS = ((1, 13), (2, 14), (3, 15), (5, 16))
"""From this version of the interface on there are so many rights over paths, one bit each."""
_NET_RIGHTS = 0b11  # version 4: bind and connect TCP
_SCOPES = 0b11  # version 6: abstract Unix sockets and signals to others


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
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_REFUSE, _UNKNOWN = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_JMP|JSET|K, BPF_RET|K
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16  # in struct seccomp_data; of an argument the lower half is first
_EXECUTABLE = 4  # PROT_EXEC
_CLONE_THREAD = 0x10000

_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""AUDIT_ARCH, and which column of `_ALLOWED`."""
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


def _filter_calls() -> None:
    libc = _linux()
    known = _ARCHITECTURES.get(platform.machine())
    if known is None or sys.maxsize < 2**32 or sys.byteorder != "little":
        raise OSError(errno.ENOSYS, "no list of system calls for this processor")
    architecture, column = known
    program = b"".join(_program(architecture, column))

    class Program(ctypes.Structure):  # struct sock_fprog
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))

    filled = Program(len(program) // 8, program)
    _checked(libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(filled), 0, 0))


def _program(architecture: int, column: int) -> Iterator[bytes]:
    """Classic BPF, instruction by instruction: code, jump if true, jump if false, operand."""

    def step(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, operand)

    yield step(_LOAD, _ARCHITECTURE_AT)
    yield step(_EQUAL, architecture, 1, 0)
    yield step(_RETURN, _KILL)  # 32-bit calls have other numbers
    yield step(_LOAD, _NUMBER_AT)
    for numbers in _ALLOWED.values():
        yield step(_EQUAL, numbers[column], 0, 1)
        yield step(_RETURN, _ALLOW)
    for numbers in (_MMAP, _MPROTECT):  # argument 2 is the protection
        yield step(_EQUAL, numbers[column], 0, 4)
        yield step(_LOAD, _ARGUMENTS_AT + 8 * 2)
        yield step(_ANY_BIT, _EXECUTABLE, 0, 1)
        yield step(_RETURN, _REFUSE)
        yield step(_RETURN, _ALLOW)
    yield step(_EQUAL, _CLONE[column], 0, 4)  # argument 0 is the flags
    yield step(_LOAD, _ARGUMENTS_AT)
    yield step(_ANY_BIT, _CLONE_THREAD, 1, 0)
    yield step(_RETURN, _REFUSE)
    yield step(_RETURN, _ALLOW)
    yield step(_EQUAL, _CLONE3[column], 0, 1)
    yield step(_RETURN, _UNKNOWN)  # its flags are in memory, which a filter cannot read; the C library takes clone
    yield step(_RETURN, _REFUSE)  # also x32's calls, whose numbers have a bit more
