"""What holds a process: limits of resources, no capabilities, Landlock, the filter of system calls."""

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
from pathlib import Path

from . import system_calls

_FILE_BYTES = 16 << 20
_OPEN_FILES = 64

# Landlock (include/uapi/linux/landlock.h), the same numbers on every machine.
_CREATE, _ADD, _RESTRICT = 444, 445, 446
_EXECUTE, _WRITE, _READ, _READ_DIR, _TRUNCATE = 1, 2, 4, 8, 1 << 14
_RIGHTS_BY_VERSION = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_TCP = 3  # bind and connect, from version 4 on
_SCOPED_SOCKETS, _SCOPED_SIGNALS = 1, 2  # abstract unix sockets; signals; from version 6 on


def supported() -> str | None:
    """Why "strict" cannot hold on this machine, or None when it can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"it needs Linux on x86-64, this is {platform.system()} on {platform.machine()}"
    if _landlock_version() < 1:
        return "the kernel has no Landlock (Linux 5.13, enabled at boot)"
    if _libc().prctl(21, 0, 0, 0, 0) < 0:  # PR_GET_SECCOMP
        return "the kernel has no seccomp"
    return None


def limit(cpu_seconds: int, memory_bytes: int) -> None:
    """Set the resource limits of this process. Without privileges it cannot raise them again."""
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))  # SIGXCPU first, which names the reason
    for which, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, _FILE_BYTES),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(which, (value, value))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def death_with_parent(parent: int) -> None:
    """Let the kernel kill this process when its parent ends."""
    if platform.system() == "Linux":
        _libc().prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def isolate(folder: str, *, parent: bool = False) -> None:
    """Give up privileges, other files, network and new processes, for good. Raises OSError when one of them fails.

    The end of a `parent` must reach its child, as a signal: Landlock lets it, and the filter alone holds signals.
    """
    libc = _libc()
    _drop_capabilities(libc)
    _check(libc.prctl(38, 1, 0, 0, 0))  # PR_SET_NO_NEW_PRIVS
    _landlock(libc, folder, _SCOPED_SOCKETS if parent else _SCOPED_SOCKETS | _SCOPED_SIGNALS)
    system_calls.restrict(libc)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    header = struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    _check(libc.capset(header, bytes(24)))


def _landlock_version() -> int:
    return _libc().syscall(_CREATE, None, 0, 1)


def _landlock(libc: ctypes.CDLL, folder: str, scoped: int) -> None:
    version = _check(_landlock_version())
    rights = _RIGHTS_BY_VERSION[max(v for v in _RIGHTS_BY_VERSION if v <= version)]
    attribute = struct.pack("QQQ", rights, _TCP if version >= 4 else 0, scoped if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _check(libc.syscall(_CREATE, attribute, size, 0))
    reading = _EXECUTE | _READ | _READ_DIR
    places = dict.fromkeys((sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64", "/bin"), reading)
    devices = dict.fromkeys(("/dev/null", "/dev/zero", "/dev/urandom"), _READ | _WRITE)
    for place, allowed in {**places, **devices, folder: rights}.items():
        if not Path(place).exists():
            continue
        descriptor = os.open(place, os.O_PATH | os.O_CLOEXEC)
        _check(libc.syscall(_ADD, ruleset, 1, struct.pack("=Qi", allowed & rights, descriptor), 0))
        os.close(descriptor)
    _check(libc.syscall(_RESTRICT, ruleset, 0))
    os.close(ruleset)
