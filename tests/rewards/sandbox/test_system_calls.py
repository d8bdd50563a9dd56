# ruff: noqa: E501  (programs, one statement a line)
"""The list of system calls: what Python needs is there, what changes other processes is not."""

import ctypes
import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from prefpipe.config.rewards import Code
from prefpipe.rewards import sandbox
from prefpipe.rewards.base import Answer, Scored
from prefpipe.rewards.code_tests import code
from prefpipe.rewards.sandbox import system_calls
from tests.conftest import ROOT

strict = pytest.mark.skipif(sandbox.supported() is not None, reason=str(sandbox.supported()))
HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")

# The calls, with what makes each of them work outside of the sandbox; PARENT and SEGMENT are those of the test.
CALLS = """import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    libc.syscall.restype = ctypes.c_long
    return 0 if libc.syscall(number, *map(ctypes.c_void_p, arguments)) >= 0 else ctypes.get_errno()
buffer = ctypes.addressof(ctypes.create_string_buffer(1 << 12))
mask = ctypes.create_string_buffer(b"\\1" + bytes(127))
read = os.open(os.devnull, os.O_RDONLY)
path = ctypes.create_string_buffer(SECRET.encode())
KEPT = (mask, path)
mask, path = ctypes.addressof(mask), ctypes.addressof(path)
CALLS = {
    "shmat": (30, SEGMENT, 0, 0), "shmctl": (31, SEGMENT, 2, buffer), "shmget": (29, 0, 4096, 0o1600),
    "semget": (64, 0, 1, 0o1600), "semctl": (66, 0, 0, 0), "semop": (65, 0, buffer, 1), "msgget": (68, 0, 0o1600),
    "msgsnd": (69, 0, buffer, 1, 2048), "msgrcv": (70, 0, buffer, 1, 0, 2048), "msgctl": (71, 0, 2, buffer),
    "mq_open": (240, path, 0), "sched_setaffinity": (203, PARENT, 128, mask), "sched_setattr": (314, PARENT, buffer, 0),
    "sched_setparam": (142, PARENT, buffer), "sched_setscheduler": (144, PARENT, 3, buffer),
    "setpriority": (141, 0, PARENT, 19), "ioprio_set": (251, 1, PARENT, 3 << 13), "setpgid": (109, PARENT, 0),
    "migrate_pages": (256, PARENT, 8, buffer, buffer), "move_pages": (279, PARENT, 0, 0, 0, 0, 0),
    "F_SETOWN": (72, 0, 8, PARENT), "F_SETSIG": (72, 0, 10, 9), "F_SETOWN_EX": (72, 0, 15, buffer),
    "F_SETLEASE": (72, read, 1024, 0), "F_NOTIFY": (72, read, 1026, 1), "F_SETPIPE_SZ": (72, read, 1031, 1 << 20),
    "FIOSETOWN": (16, 0, 0x8901, buffer), "TIOCSTI": (16, 0, 0x5412, buffer), "kill": (62, PARENT, 0),
    "kill a group": (62, 0, 0), "tkill": (200, PARENT, 0), "tgkill": (234, PARENT, PARENT, 0),
    "prlimit64": (302, PARENT, 0, buffer, 0), "ptrace": (101, 16, PARENT, 0, 0), "pidfd_open": (434, PARENT, 0),
    "process_vm_readv": (310, PARENT, buffer, 0, buffer, 0, 0), "process_madvise": (440, 0, 0, 0, 20, 0),
    "kcmp": (312, PARENT, PARENT, 0, 0, 0), "perf_event_open": (298, buffer, 0, -1, -1, 0), "bpf": (321, 0, buffer, 120),
    "memfd_create": (319, path, 0), "memfd_secret": (447, 0), "userfaultfd": (323, 1), "io_uring_setup": (425, 8, buffer),
    "socket": (41, 1, 1, 0), "socketpair": (53, 1, 1, 0, buffer), "fork": (57,), "vfork": (58,), "clone": (56, 17, 0),
    "clone a namespace": (56, 0x10010F00, 0), "clone3": (435, buffer, 64), "unshare": (272, 0x10000000),
    "execve": (59, path, 0, 0), "execveat": (322, -100, path, 0, 0, 0), "mount": (165, path, path, 0, 0, 0),
    "truncate": (76, path, 0), "chmod": (90, path, 0), "utimensat": (280, -100, path, 0, 0), "setxattr": (188, path, path, 0, 0, 0),
    "open to empty": (2, path, 0o1000), "openat to empty": (257, -100, path, 0o1003), "openat2": (437, -100, path, buffer, 24),
    "name_to_handle_at": (303, -100, path, buffer, buffer, 0), "inotify_init1": (294, 0), "fanotify_init": (300, 0, 0),
    "keyctl": (250, 0, -3, 1), "add_key": (248, path, path, 0, 0, -3), "PR_SET_PDEATHSIG": (157, 1, 0),
    "PR_SET_DUMPABLE": (157, 4, 1), "PR_SET_PTRACER": (157, 0x59616D61, -1), "timer_create": (222, 1, buffer, buffer),
    "setsid": (112,), "setuid": (105, 0), "capset": (126, buffer, buffer), "personality": (135, 0x40000),
    "seccomp": (317, 1, 0, buffer), "landlock_create_ruleset": (444, 0, 0, 1), "mlockall": (151, 1), "acct": (163, 0),
    "process_mrelease": (448, 0, 0), "lsm_set_self_attr": (460, 0, buffer, 0, 0), "one of the future": (4000,),
    "x32": (0x40000000 + 39,),
}
def passed():
    return sorted(k for k, v in CALLS.items() if call(*v) not in (errno.EPERM, errno.ENOSYS))
"""
# A broad use of the standard library; each group of modules is named when it fails.
USES = {
    "data": "import json, csv, io, struct, array, copy, string, textwrap, unicodedata\n"
    "json.loads(json.dumps([1])); list(csv.reader(io.StringIO('a,b'))); struct.pack('I', 1); array.array('i', [1]).tolist()\n"
    "copy.deepcopy([[1]]); string.capwords('a b'); textwrap.fill('a b', 2); unicodedata.name('a')",
    "numbers": "import math, cmath, decimal, fractions, random, statistics, numbers\n"
    "math.gcd(4, 6); cmath.sqrt(-1); decimal.Decimal(2).sqrt(); fractions.Fraction(1, 3); statistics.mean([1, 2])\n"
    "random.seed(1); random.random(); random.SystemRandom().random(); 3 ** 1000 % 7",
    "structures": "import itertools, collections, heapq, bisect, functools, operator, dataclasses, typing, enum, queue, graphlib\n"
    "list(itertools.permutations('abc')); collections.Counter('aa'); heapq.heapify([2, 1]); bisect.bisect([1], 1)\n"
    "functools.lru_cache(len)('a'); dataclasses.make_dataclass('D', ['x'])(1); queue.Queue().put(1); typing.List[int]",
    "time": "import datetime, time, calendar, zoneinfo\n"
    "datetime.datetime.now(datetime.timezone.utc); time.sleep(0.001); time.process_time(); time.localtime(); calendar.month(2026, 1)\n"
    "try: zoneinfo.ZoneInfo('Europe/Berlin')\nexcept zoneinfo.ZoneInfoNotFoundError: pass",
    "text": "import re, hashlib, hmac, base64, binascii, zlib, gzip, bz2, lzma, pickle, uuid, secrets, difflib, html, pprint\n"
    "re.sub('a', 'b', 'a'); hashlib.sha256(b'').hexdigest(); hashlib.blake2b(b''); gzip.decompress(gzip.compress(b'a'))\n"
    "lzma.compress(b'a'); bz2.compress(b'a'); pickle.loads(pickle.dumps([1])); uuid.uuid4(); secrets.token_hex(); pprint.pformat([1])",
    "files": "import os, pathlib, tempfile, shutil, glob, sqlite3, zipfile, mmap\n"
    "p = pathlib.Path('a'); p.write_text('x'); p.rename('b'); os.mkdir('d'); shutil.move('b', 'd'); glob.glob('**', recursive=True)\n"
    "with tempfile.TemporaryFile() as f: f.write(b'1'); f.truncate(4096); mmap.mmap(f.fileno(), 0).close()\n"
    "with tempfile.NamedTemporaryFile() as f: f.write(b'1')\n"
    "c = sqlite3.connect('db'); c.execute('create table t(x)'); c.commit(); c.close()\n"
    "with zipfile.ZipFile('z', 'w') as z: z.writestr('a', 'b')\n"
    "os.symlink('x', 'l'); os.readlink('l'); os.stat('.'); os.statvfs('.'); shutil.rmtree('d')",
    "threads": "import threading, concurrent.futures, queue\n"
    "with concurrent.futures.ThreadPoolExecutor(3) as pool: assert sum(pool.map(int, '123')) == 6\n"
    "q = queue.Queue(); t = threading.Timer(0.01, q.put, (1,)); t.start(); q.get(); t.join(); threading.Event().wait(0.01)",
    "signals": "import os, select, selectors, signal, time\n"
    "hits = []; signal.signal(signal.SIGALRM, lambda *a: hits.append(1)); signal.setitimer(signal.ITIMER_REAL, 0.01); time.sleep(0.1)\n"
    "signal.signal(signal.SIGUSR1, lambda *a: hits.append(2)); signal.raise_signal(signal.SIGUSR1); os.kill(os.getpid(), 10)\n"
    "assert hits == [1, 2, 2]; r, w = os.pipe(); os.write(w, b'1'); assert select.select([r], [], [], 0)[0] == [r]\n"
    "s = selectors.DefaultSelector(); s.register(r, selectors.EVENT_READ); assert len(s.select(0)) == 1",
    "the system": "import os, platform, resource, sys, time, ctypes, gc, weakref, inspect, ast, traceback, contextlib, warnings, logging\n"
    "os.getpid(); os.cpu_count(); os.uname(); os.times(); os.urandom(4); platform.platform(); resource.getrusage(0); os.getloadavg\n"
    "sys.setrecursionlimit(5000); ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 1)(); gc.collect(); logging.getLogger('a').warning('b')",
    "numpy": "try: import numpy as np\nexcept ImportError: np = None\n"
    "if np: np.linalg.svd(np.eye(60)); np.fft.fft(np.arange(8)); np.random.default_rng(0).normal(size=9).sort()",
}  # fmt: skip


def rate(program: str, tests: str) -> Scored:
    settings = Code(timeout_seconds=60, memory_mib=1024)  # a busy machine imports for long
    (scored,) = code(settings)([Answer([], program, tests)])
    return scored


@strict
@pytest.mark.parametrize("what", USES)
def test_the_standard_library_works(what: str) -> None:
    assert rate(f"{USES[what]}\ndone = True", "assert done") == Scored(1.0)
    assert rate("done = True", f"{USES[what]}\nassert done") == Scored(1.0), "in the process of the tests"


@strict
def test_every_module_of_the_standard_library_that_imports_outside_imports_inside() -> None:
    program = (
        "import sys, warnings\nwarnings.simplefilter('ignore')\nfailed = []\n"
        "skipped = {'antigravity', 'this', 'idlelib', 'turtle', 'turtledemo', 'tkinter', 'lib2to3', 'test'}\n"
        "for name in sorted(sys.stdlib_module_names - skipped):\n    try: __import__(name)\n"
        "    except ImportError: pass\n    except BaseException as e: failed.append((name, str(e)))\n"
    )
    assert rate(program, "assert failed == [], failed") == Scored(1.0)


@strict
def test_no_call_reaches_another_process(tmp_path: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.shmat.restype = ctypes.c_void_p
    segment = libc.shmget(0, 4096, 0o1600)
    address = libc.shmat(segment, None, 0)
    ctypes.memmove(address, b"untouched", 9)
    secret = tmp_path / "secret"
    secret.write_text("untouched")
    affinity, priority = os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, 0)
    try:
        given = f"PARENT, SEGMENT, SECRET = {os.getpid()}, {segment}, {str(secret)!r}\n"
        assert rate(f"{given}{CALLS}", "assert passed() == [], passed()") == Scored(1.0)
        assert ctypes.string_at(address, 9) == b"untouched"
    finally:
        libc.shmctl(segment, 0, None)
        libc.shmdt(ctypes.c_void_p(address))
    assert (os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, 0)) == (affinity, priority)
    assert secret.read_text() == "untouched"


@strict
def test_the_oldest_landlock_holds_the_same(tmp_path: Path) -> None:
    """Version 1 knows neither truncation nor signals nor ioctl: the filter holds them."""
    secret = tmp_path / "secret"
    secret.write_text("untouched")
    (tmp_path / "job").mkdir()
    lines = (
        "from prefpipe.rewards.sandbox import limits\nlimits._landlock_version = lambda: 1\n"
        f"limits.isolate({str(tmp_path / 'job')!r})\n"
        f"PARENT, SEGMENT, SECRET = {os.getpid()}, 0, {str(secret)!r}\n{CALLS}\nprint(passed())\n"
        "for act in (lambda: open(SECRET), lambda: open(SECRET, 'w'), lambda: os.unlink(SECRET), lambda: os.link(SECRET, 'x'),\n"
        "            lambda: os.rename(SECRET, 'x')):\n"
        "    try: act()\n    except PermissionError: continue\n    except OSError as e: print(e); continue\n    print('done')"
    )
    ran = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ran.stdout, ran.stderr) == ("[]\n", "")
    assert secret.read_text() == "untouched"


@strict
def test_signals_to_itself_end_a_program_and_nothing_else() -> None:
    scored = rate("import os\nos.abort()", "assert True")
    assert (scored.reward, scored.detail) == (0.0, f"ended with signal {signal.SIGABRT.value} before it was over")


@pytest.mark.skipif(not HEADER.exists(), reason="the header of the kernel's numbers is not installed")
def test_the_numbers_are_those_of_the_kernel() -> None:
    numbers = {n: int(v) for n, v in re.findall(r"#define __NR_(\w+) (\d+)", HEADER.read_text())}
    listed = {**system_calls._ALLOWED, **system_calls._ABSENT, **system_calls._SIGNALS}
    assert {k: v for k, v in listed.items() if numbers.get(k, v) != v} == {}


def evaluate(steps: list[system_calls.Step], number: int, *arguments: int, arch: int = 0xC000003E) -> int:
    """What the filter answers, by an interpreter of the five instructions that it has."""
    words = {0: number, 4: arch, **{16 + 8 * i: a & 0xFFFFFFFF for i, a in enumerate(arguments)}}
    position = accumulator = 0
    while True:
        operation, then, otherwise, value = steps[position]
        position += 1
        match operation:
            case 0x20:
                accumulator = words[value]
            case 0x54:
                accumulator &= value
            case 0x15:
                position += then if accumulator == value else otherwise
            case 0x35:
                position += then if accumulator >= value else otherwise
            case _:
                return value


ALLOW, KILL = 0x7FFF0000, 0x80000000
EPERM, ENOSYS = 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        ((0, 3), ALLOW), ((456, 0), ALLOW), ((334, 0), ALLOW), ((332, 0), ALLOW), ((439, 0), ALLOW), ((436, 0), ALLOW),
        ((41, 1), EPERM), ((30, 1), EPERM), ((203, 7), EPERM), ((435, 0), ENOSYS), ((437, 0), ENOSYS), ((319, 0), ENOSYS),
        ((463, 0), ENOSYS), ((10**6, 0), ENOSYS), ((0x40000000, 0), ENOSYS), ((62, 7), ALLOW), ((62, 8), EPERM),
        ((62, 0), EPERM), ((62, -1), EPERM), ((234, 7), ALLOW), ((234, 8), EPERM), ((302, 0), ALLOW), ((302, 8), EPERM),
        ((56, 0x3D0F00), ALLOW), ((56, 0x7D0F00), ALLOW), ((56, 17), EPERM), ((56, 0x10010F00), EPERM),
        ((56, 0x10100), EPERM), ((72, 0, 8), EPERM), ((72, 0, 1030), ALLOW), ((16, 0, 0x5401), ALLOW),
        ((16, 0, 0x8901), EPERM), ((157, 15), ALLOW), ((157, 22), EPERM), ((2, 0, 0o1101), ALLOW), ((2, 0, 0o1000), EPERM),
        ((257, 0, 0, 0o2000000), ALLOW), ((257, 0, 0, 0o1003), EPERM),
    ],
)  # fmt: skip
def test_the_filter_answers(call: tuple[int, ...], answer: int) -> None:
    assert evaluate(system_calls.program(7), *call) == answer


def test_other_instruction_sets_are_killed() -> None:
    assert evaluate(system_calls.program(7), 0, arch=0x40000003) == KILL
    assert len(system_calls.program(7)) <= 4096, "more than the kernel takes"
