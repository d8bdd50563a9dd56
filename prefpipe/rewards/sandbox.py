"""A script that runs one Python program under limits: `python -I sandbox.py 3 4`. Standard library only.

Its arguments are two file descriptors. It reads the job from the first, as JSON, and writes the verdict to the second.
Before the program starts it sets

- limits (RLIMIT): CPU seconds, address space, size of written files, open files, no core dump;
- with isolation "strict" also: no capabilities; Landlock, so that the program reads Python and the system libraries,
  writes to its folder and sees no other file; seccomp, so that it opens no sockets, starts no processes, executes
  nothing, signals no others and changes nothing of other files, processes or the system.

It is no virtual machine: a bug in the kernel is a way out. stat tells names and sizes of files outside. A program that
knows this script can search the memory that it shares with it for the token of the verdict.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
from pathlib import Path
from types import CodeType

UNABLE = "cannot isolate"
_FILE_BYTES = 16 << 20
_OPEN_FILES = 64

# seccomp: numbers of x86-64 (arch/x86/entry/syscalls/syscall_64.tbl).
_DENIED = {
    "socket": 41,
    "socketpair": 53,
    "io_uring_setup": 425,
    "fork": 57,
    "vfork": 58,
    "execve": 59,
    "execveat": 322,
    "kill": 62,
    "tkill": 200,
    "tgkill": 234,
    "rt_sigqueueinfo": 129,
    "rt_tgsigqueueinfo": 297,
    "pidfd_open": 434,
    "pidfd_send_signal": 424,
    "pidfd_getfd": 438,
    "ptrace": 101,
    "process_vm_readv": 310,
    "process_vm_writev": 311,
    "kcmp": 312,
    "perf_event_open": 298,
    "unshare": 272,
    "setns": 308,
    "mount": 165,
    "umount2": 166,
    "chroot": 161,
    "pivot_root": 155,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "mount_setattr": 442,
    "bpf": 321,
    "userfaultfd": 323,
    "keyctl": 250,
    "add_key": 248,
    "request_key": 249,
    "personality": 135,
    "chmod": 90,
    "fchmod": 91,
    "fchmodat": 268,
    "fchmodat2": 452,
    "chown": 92,
    "fchown": 93,
    "lchown": 94,
    "fchownat": 260,
    "utime": 132,
    "utimes": 235,
    "futimesat": 261,
    "utimensat": 280,
    "setxattr": 188,
    "lsetxattr": 189,
    "fsetxattr": 190,
    "removexattr": 197,
    "lremovexattr": 198,
    "fremovexattr": 199,
    "shmget": 29,
    "semget": 64,
    "msgget": 68,
    "mq_open": 240,
    "setpriority": 141,
    "sched_setscheduler": 144,
    "ioprio_set": 251,
    "setsid": 112,
    "setpgid": 109,
}
_CLONE, _CLONE3, _PRLIMIT = 56, 435, 302
_CLONE_THREAD = 0x10000
_X86_64, _X32 = 0xC000003E, 0x40000000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data

# Landlock (include/uapi/linux/landlock.h), the same numbers on every machine.
_CREATE, _ADD, _RESTRICT = 444, 445, 446
_EXECUTE, _WRITE, _READ, _READ_DIR, _TRUNCATE = 1, 2, 4, 8, 1 << 14
_RIGHTS_BY_VERSION = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_TCP = 3  # bind and connect, from version 4 on
_SCOPED = 3  # abstract unix sockets and signals, from version 6 on


def supported() -> str | None:
    """Why "strict" cannot hold on this machine, or None when it can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"it needs Linux on x86-64, this is {platform.system()} on {platform.machine()}"
    if _landlock_version() < 1:
        return "the kernel has no Landlock (Linux 5.13, enabled at boot)"
    if _libc().prctl(21, 0, 0, 0, 0) < 0:  # PR_GET_SECCOMP
        return "the kernel has no seccomp"
    return None


def main() -> None:
    """Read the job, set the limits, run the program and its tests, write the verdict."""
    job_descriptor, verdict_descriptor = map(int, sys.argv[1:])
    with os.fdopen(job_descriptor, encoding="utf-8") as job_file:
        job = json.load(job_file)
    try:
        limit(job["cpu_seconds"], job["memory_bytes"])
        if job["isolation"] == "strict":
            isolate(job["folder"])
    except (OSError, ValueError, OverflowError) as error:
        verdict = f"{UNABLE}: {error}"
    else:
        verdict = run(job["program"], job["tests"]) or f"ok {job['token']}"
    os.write(verdict_descriptor, verdict.encode(errors="replace")[:4000])


def run(program: str, tests: str | None) -> str | None:
    """Run a program and, in its namespace, its tests. Returns None, or the exception or exit code that ended it.

    Without tests it runs as a script (`__name__` is "__main__"), with tests as an import runs a module.
    """
    namespace: dict[str, object] = {"__name__": "__main__" if tests is None else "program"}
    for name, text in (("program", program), ("tests", tests)):
        if text is None:
            continue
        try:
            code: CodeType = compile(text, name, "exec")
            exec(code, namespace)  # noqa: S102  (this is the sandbox)
        except SystemExit as ended:
            if tests is not None or ended.code not in (None, 0):
                return f"{name}: ended with exit code {ended.code}"
        except BaseException as error:
            return f"{name}: {type(error).__name__}: {error}"
    sys.stdout.flush()
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


def isolate(folder: str) -> None:
    """Give up privileges, other files, network and new processes, for good. Raises OSError when one of them fails."""
    libc = _libc()
    _drop_capabilities(libc)
    _check(libc.prctl(38, 1, 0, 0, 0))  # PR_SET_NO_NEW_PRIVS
    _landlock(libc, folder)
    _seccomp(libc)


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


def _landlock(libc: ctypes.CDLL, folder: str) -> None:
    version = _check(_landlock_version())
    rights = _RIGHTS_BY_VERSION[max(v for v in _RIGHTS_BY_VERSION if v <= version)]
    attribute = struct.pack("QQQ", rights, _TCP if version >= 4 else 0, _SCOPED if version >= 6 else 0)
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


def _seccomp(libc: ctypes.CDLL) -> None:
    deny, allow = (_RETURN, 0, 0, _ERROR | _EPERM), (_RETURN, 0, 0, _ALLOW)
    steps: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, _X86_64),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        deny,
        (_EQUAL, 0, 1, _CLONE3),
        (_RETURN, 0, 0, _ERROR | _ENOSYS),  # glibc then asks for clone, with flags to see
    ]
    for number in _DENIED.values():
        steps += [(_EQUAL, 0, 1, number), deny]
    steps += [(_EQUAL, 0, 4, _CLONE), (_LOAD, 0, 0, _FIRST_ARGUMENT), (_ANY_BIT, 0, 1, _CLONE_THREAD), allow, deny]
    steps += [(_EQUAL, 0, 4, _PRLIMIT), (_LOAD, 0, 0, _FIRST_ARGUMENT), (_EQUAL, 0, 1, 0), allow, deny]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in [*steps, allow]))
    filter_ = struct.pack("HxxxxxxP", len(steps) + 1, ctypes.addressof(program))
    _check(libc.prctl(22, 2, filter_, 0, 0))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


if __name__ == "__main__":
    main()
