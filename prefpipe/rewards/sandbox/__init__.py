"""A script that runs one Python program under limits: `python -I sandbox 3 4`. Standard library only.

It has two processes. One runs the program. The other (judge.py) has the tests and gives the verdict; what it knows of
the program are answers that cross a pipe as data (peer.py). Both are held by limits.py and system_calls.py:

- limits (RLIMIT): CPU seconds, address space, size of written files, open files, no core dump;
- with isolation "strict" also: no capabilities; Landlock, so that the program reads Python and the system libraries,
  writes to its folder and sees no other file; seccomp, so that it has no system calls but those of a list.

It is no virtual machine: a bug in the kernel is a way out. stat tells names and sizes of files outside.
"""

from .limits import supported

__all__ = ["supported"]
