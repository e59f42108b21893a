"""Takes from a process what it could harm or find out: files, other processes, the network, root's powers.

Linux 5.13 or newer can do this for any user: Landlock leaves a process one folder to work in and, of the rest of the
disk, Python and the system's programs to read. (Signals to others are kept in from Linux 6.12 on.) Where the grader is
root, and others can read Python, the process also becomes another user. What else there is, `reachable` of child.py
finds out by trying.
"""

import ctypes
import os
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

SYSTEM = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/usr", "/opt", "/nix", "/etc/ld.so.cache", "/etc/passwd",
          "/etc/localtime", "/sys/devices/system", "/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat",
          "/dev/zero", "/dev/random", "/dev/urandom")  # fmt: skip
RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # system calls, the same numbers on all machines
RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}  # how many rights to files there are from this version of Landlock on
EXECUTE, WRITE, READ, LIST = 1, 2, 4, 8
DEVICES = 1 << 6 | 1 << 11  # to make device files
TRUNCATE = 1 << 14
NET, SCOPES = 0b11, 0b11  # to bind and to connect TCP; abstract sockets and signals
NO_NEW_PRIVS, SUBREAPER = 38, 36  # of prctl


def confine(folder: Path, user: int | None) -> None:
    """From now on this process, and what it starts, has `folder` to work in and no way out of it, as far as we can."""
    if user is not None:
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, user, user, follow_symlinks=False)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0)
        _landlock(libc, folder)
        if user is None and os.geteuid() == 0:
            libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))  # root is a user like others
    if user is not None:
        become(user)


def become(user: int) -> None:
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)


def other_user(files: Iterable[str]) -> int | None:
    """A user id for submissions, if we are root and others can read these files of Python; else None."""
    if os.geteuid():
        return None
    user, process = 60_000 + os.getpid() % 5000, os.fork()
    if not process:
        try:
            become(user)
            for file in files:
                open(file).close()
            os._exit(0)
        finally:
            os._exit(1)
    return user if os.waitpid(process, 0)[1] == 0 else None


def adopt() -> None:
    """Processes that lose their parent, below this one, become its children (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)


def _landlock(libc: ctypes.CDLL, folder: Path) -> None:
    version = libc.syscall(RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return
    rights = (1 << max(n for v, n in RIGHTS.items() if v <= version)) - 1
    attributes = struct.pack("QQQ", rights, NET if version >= 4 else 0, SCOPES if version >= 6 else 0)
    ruleset = libc.syscall(RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    _allow(libc, ruleset, folder, rights & ~DEVICES)
    _allow(libc, ruleset, Path("/dev/null"), WRITE | READ | TRUNCATE & rights)
    for path in {*map(Path, SYSTEM), *_of_python()}:
        _allow(libc, ruleset, path, EXECUTE | READ | LIST)
    if ruleset < 0 or libc.syscall(RESTRICT_SELF, ruleset, 0):
        raise OSError(ctypes.get_errno(), "Landlock cannot be set up")
    os.close(ruleset)


def _allow(libc: ctypes.CDLL, ruleset: int, path: Path, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # not on this machine
    rights &= ~0 if path.is_dir() else EXECUTE | WRITE | READ | TRUNCATE
    libc.syscall(ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, place), 0)
    os.close(place)


def _of_python() -> set[Path]:
    """Folders of Python and its packages. Others on its path may hold anything, the grader's project among them."""
    named = [sys.prefix, sys.base_prefix, *os.environ.get("LD_LIBRARY_PATH", "").split(":")]
    named += [path for path in sys.path if path.endswith("-packages")]
    named += [
        path for name, module in sys.modules.items() if "." not in name for path in getattr(module, "__path__", ())
    ]
    return {Path(path).resolve() for path in named if path}
