"""Who runs a process: what a test does in it before it begins."""

from __future__ import annotations

import ctypes
import os

_CAPABILITIES_VERSION = 0x20080522  # capset(2): _LINUX_CAPABILITY_VERSION_3
_DROP_CAPABILITY, _OVERRIDES = 24, (1, 2, 3)  # prctl(2): PR_CAPBSET_DROP; CAP_DAC_OVERRIDE, _READ_SEARCH, CAP_FOWNER


def as_any_user() -> None:
    """In a new process: root, too, is kept out of where modes keep it out, also in programs that it becomes."""
    if os.geteuid() == 0:
        libc, header = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION, 0)
        sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then their upper halves
        libc.capget(header, sets)
        for capability in _OVERRIDES:
            libc.prctl(_DROP_CAPABILITY, capability, 0, 0, 0)
            sets[0] &= ~(1 << capability)
            sets[1] &= ~(1 << capability)
        libc.capset(header, sets)
