"""seccomp: the system calls that a program may make. Numbers and constants are those of Linux on x86-64.

A list of what is allowed holds on kernels with calls that nobody has thought of. It has what CPython, its standard
library and numpy ask for, and what other versions of glibc and musl ask for in its place. Every other call fails with
EPERM, and one that is newer than this list with ENOSYS, which makes a C library use an older one.
"""

import ctypes
import errno
import os
import struct
from collections.abc import Mapping

# arch/x86/entry/syscalls/syscall_64.tbl
_ALLOWED = {
    # files: Landlock decides which. Not here: what it lets through for any path (chmod, chown, utime, truncate, xattr)
    "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "pread64": 17,
    "pwrite64": 18, "readv": 19, "writev": 20, "access": 21, "pipe": 22, "select": 23, "dup": 32, "dup2": 33,
    "sendfile": 40, "flock": 73, "fsync": 74, "fdatasync": 75, "ftruncate": 77, "getdents": 78, "getcwd": 79,
    "chdir": 80, "fchdir": 81, "rename": 82, "mkdir": 83, "rmdir": 84, "creat": 85, "link": 86, "unlink": 87,
    "symlink": 88, "readlink": 89, "umask": 95, "statfs": 137, "fstatfs": 138, "getdents64": 217, "fadvise64": 221,
    "mkdirat": 258, "newfstatat": 262, "unlinkat": 263, "renameat": 264, "linkat": 265, "symlinkat": 266,
    "readlinkat": 267, "faccessat": 269, "pselect6": 270, "ppoll": 271, "dup3": 292, "pipe2": 293, "preadv": 295,
    "pwritev": 296, "renameat2": 316, "copy_file_range": 326, "preadv2": 327, "pwritev2": 328, "statx": 332,
    "close_range": 436, "faccessat2": 439,
    "epoll_create": 213, "epoll_wait": 232, "epoll_ctl": 233, "epoll_pwait": 281, "eventfd": 284, "eventfd2": 290,
    "epoll_create1": 291, "epoll_pwait2": 441,
    # memory
    "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "mremap": 25, "msync": 26, "mincore": 27, "madvise": 28,
    # signals to itself, timers, clocks
    "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "pause": 34, "nanosleep": 35, "getitimer": 36,
    "alarm": 37, "setitimer": 38, "gettimeofday": 96, "times": 100, "rt_sigpending": 127, "rt_sigtimedwait": 128,
    "rt_sigsuspend": 130, "sigaltstack": 131, "time": 201, "restart_syscall": 219, "clock_gettime": 228,
    "clock_getres": 229, "clock_nanosleep": 230, "signalfd": 282, "signalfd4": 289,
    # threads, and what a process may know of itself
    "sched_yield": 24, "getpid": 39, "exit": 60, "wait4": 61, "uname": 63, "getrlimit": 97, "getrusage": 98,
    "sysinfo": 99, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110, "getpgrp": 111,
    "getgroups": 115, "getresuid": 118, "getresgid": 120, "getpgid": 121, "getsid": 124, "capget": 125,
    "getpriority": 140, "sched_getparam": 143, "sched_getscheduler": 145, "sched_get_priority_max": 146,
    "sched_get_priority_min": 147, "sched_rr_get_interval": 148, "arch_prctl": 158, "setrlimit": 160, "gettid": 186,
    "futex": 202, "sched_getaffinity": 204, "set_tid_address": 218, "exit_group": 231, "waitid": 247,
    "set_robust_list": 273, "getcpu": 309, "sched_getattr": 315, "getrandom": 318, "membarrier": 324, "rseq": 334,
    "futex_waitv": 449, "futex_wake": 454, "futex_wait": 455, "futex_requeue": 456,
}  # fmt: skip
_OPEN, _OPENAT, _IOCTL, _CLONE, _FCNTL, _PRCTL, _PRLIMIT = 2, 257, 16, 56, 72, 157, 302
_SIGNALS = {"kill": 62, "tkill": 200, "tgkill": 234}
# For these a C library has another way: threads by clone, whose flags can be seen, files by openat, for the same reason
_ABSENT = {"openat2": 437, "clone3": 435, "memfd_create": 319, "memfd_secret": 447, "process_mrelease": 448}
_NEWEST = 463

_THREAD = 0x100 | 0x200 | 0x400 | 0x800 | 0x10000  # memory, folder, open files, handlers of signals, thread group
_NAMESPACES = 0x7E020000
# DUPFD, GETFD, SETFD, GETFL, SETFL, locks, DUPFD_CLOEXEC, GETPIPE_SZ, GET_SEALS. Not SETOWN and SETSIG, which make
# the kernel signal another process, SETLEASE, NOTIFY, SETPIPE_SZ.
_FCNTL_COMMANDS = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032, 1034)
_IOCTL_COMMANDS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIO(N)CLEX
_PRCTL_OPTIONS = (3, 15, 16, 0x53564D41)  # GET_DUMPABLE, SET_NAME, GET_NAME, SET_VMA (names of memory)
_ACCESS_MODE, _O_TRUNC = 3, 0o1000

_X86_64, _X32 = 0xC000003E, 0x40000000
_LOAD, _EQUAL, _AT_LEAST, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data; the low half of an argument comes first

Step = tuple[int, int, int, int]
_PASS: Step = (_RETURN, 0, 0, _ALLOW)
_DENY: Step = (_RETURN, 0, 0, _ERROR | errno.EPERM)
_UNKNOWN: Step = (_RETURN, 0, 0, _ERROR | errno.ENOSYS)


def restrict(libc: ctypes.CDLL) -> None:
    """Allow this process, for good, no system calls but those of the list. Raises OSError when the kernel refuses."""
    steps = program(os.getpid())
    content = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    filter_ = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(content))
    if libc.prctl(22, 2, filter_, 0, 0) < 0:  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def program(process: int) -> list[Step]:
    """The filter, as instructions of classic BPF, for the process with this id."""
    steps: list[Step] = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, _X86_64),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        _UNKNOWN,
        (_AT_LEAST, 0, 1, _NEWEST),
        _UNKNOWN,
    ]
    for number in _ALLOWED.values():
        steps += [(_EQUAL, 0, 1, number), _PASS]
    for number in _ABSENT.values():
        steps += [(_EQUAL, 0, 1, number), _UNKNOWN]
    for number, argument in ((_OPEN, 1), (_OPENAT, 2)):
        # below Landlock 3, only open to write is held: this would empty a file that may be read
        emptied = dict.fromkeys((os.O_RDONLY | _O_TRUNC, _ACCESS_MODE | _O_TRUNC), _DENY)
        steps += _when(number, argument, emptied, mask=_ACCESS_MODE | _O_TRUNC, other=_PASS)
    steps += _when(_CLONE, 0, {_THREAD: _PASS}, mask=_THREAD | _NAMESPACES)
    for number in _SIGNALS.values():
        steps += _when(number, 0, {process: _PASS})
    steps += _when(_PRLIMIT, 0, {0: _PASS, process: _PASS})
    steps += _when(_IOCTL, 1, dict.fromkeys(_IOCTL_COMMANDS, _PASS))
    steps += _when(_FCNTL, 1, dict.fromkeys(_FCNTL_COMMANDS, _PASS))
    steps += _when(_PRCTL, 0, dict.fromkeys(_PRCTL_OPTIONS, _PASS))
    return [*steps, _DENY]


def _when(
    number: int, argument: int, answers: Mapping[int, Step], *, mask: int = 0xFFFFFFFF, other: Step = _DENY
) -> list[Step]:
    """What answers a call, by the low half of one of its arguments under a mask."""
    body: list[Step] = [(_LOAD, 0, 0, _ARGUMENTS + 8 * argument), (_AND, 0, 0, mask)]
    for value, answer in answers.items():
        body += [(_EQUAL, 0, 1, value), answer]
    return [(_EQUAL, 0, len(body) + 1, number), *body, other]
