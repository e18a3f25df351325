"""Which processes are alive.

A process that uses a store holds a lock on a small file of its own; the kernel
frees it however the process ends. POSIX record locks (``lockf``), not ``flock``:
a child made by fork inherits the latter and would keep its dead parent alive.
Their trap: closing *any* descriptor of a file drops the process's locks on it,
so a process never opens a file that it holds a second time.
"""

from __future__ import annotations

import atexit
import os
import re
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = re.compile(r"(?P<pid>[0-9]+)-[0-9a-f]{16}")


class Owners:
    """The processes that use one store, as files in one folder.

    Parameters
    ----------
    folder : Path
        Exists before the first method is called.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._name = ""

    def me(self) -> str:
        """This process's name; made when first asked for, and after a fork."""
        held = _held()
        if not (self._name in held and (self.folder / self._name).exists()):
            self.retire()
            while not self._enter():
                pass  # swept between creation and locking; take another name
        return self._name

    def _enter(self) -> bool:
        """Make a file and lock it; whether it is still there then."""
        self._name = f"{os.getpid()}-{os.urandom(8).hex()}"
        path = self.folder / self._name
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        lock(descriptor, exclusive=True, wait=True)
        _held()[self._name] = (descriptor, path)
        return path.exists()

    def alive(self, name: str) -> bool:
        """Whether the process of that name still runs and uses this store."""
        if name in _held():
            return True
        match = NAME.fullmatch(name)
        if not match:
            return False
        if fcntl is None:
            return (self.folder / name).exists() and process_alive(int(match["pid"]))
        try:
            descriptor = os.open(self.folder / name, os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            # Shared, so that two who ask at once do not see each other.
            return not lock(descriptor, exclusive=False)
        finally:
            os.close(descriptor)

    def is_here(self, name: str) -> bool:
        """Whether it is a name of this process, under this object or another."""
        return name in _held()

    def retire(self) -> None:
        """Give up this process's name, and with it every claim in that name."""
        _leave(self._name)
        self._name = ""

    def sweep(self) -> None:
        """Remove the files of dead processes."""
        for path in self.folder.iterdir():
            if path.name in _held() or not NAME.fullmatch(path.name):
                continue
            if fcntl is None:
                if not self.alive(path.name):
                    path.unlink(missing_ok=True)
                continue
            with suppress(FileNotFoundError), _opened(path) as descriptor:
                # Removed while locked, so that a process that has just made the
                # file gets the lock only once it can see that the file is gone.
                if lock(descriptor, exclusive=True):
                    path.unlink(missing_ok=True)


@contextmanager
def _opened(path: Path):
    descriptor = os.open(path, os.O_RDWR)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


# Lock files of this process, over all stores: name -> (descriptor, path).
_files: dict[str, tuple[int, Path]] = {}
_files_pid = os.getpid()


def _held() -> dict[str, tuple[int, Path]]:
    """This process's lock files; a forked child starts with none."""
    global _files_pid
    if _files_pid != os.getpid():
        _files_pid = os.getpid()
        inherited = [descriptor for descriptor, _ in _files.values()]
        _files.clear()
        for descriptor in inherited:  # closing here leaves the parent's locks alone
            with suppress(OSError):
                os.close(descriptor)
    return _files


def _leave(name: str) -> None:
    """Remove one of this process's lock files; nothing if it is not ours."""
    held = _held().pop(name, None)
    if held is not None:
        descriptor, path = held
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


@atexit.register
def _leave_all() -> None:
    for name in list(_held()):
        _leave(name)


def lock(descriptor: int, *, exclusive: bool, wait: bool = False) -> bool:
    """Whether the record lock was taken; without ``wait``, False if it is held.

    Windows has no such locks: there it always succeeds, and process numbers
    alone tell who is alive.
    """
    if fcntl is None:
        return True
    kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    try:
        fcntl.lockf(descriptor, kind if wait else kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def start_time(pid: int) -> str | None:
    """When a process started, as a word; None if there is no such process.

    With it a process number that the system gave to another process is told
    apart. Only Linux says it for free; elsewhere the word is "0" and a reused
    number passes for the old process.
    """
    if not sys.platform.startswith("linux"):
        return "0" if _number_in_use(pid) else None
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return None
    # The second field is the command in brackets and may hold blanks; the
    # state is the third field, the start time the twenty-second.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def process_alive(pid: int, started: str | None = None) -> bool:
    """Whether a process runs, and is the one that started then if that is given."""
    now = start_time(pid)
    return now is not None and started in (None, now)


def _number_in_use(pid: int) -> bool:
    if sys.platform == "win32":
        import ctypes

        # Never os.kill(pid, 0) here: on Windows signal 0 is Ctrl-C.
        kernel, query, running = ctypes.windll.kernel32, 0x1000, 259
        handle = kernel.OpenProcess(query, False, pid)
        code = ctypes.c_ulong()
        known = kernel.GetExitCodeProcess(handle, ctypes.byref(code))
        kernel.CloseHandle(handle)
        return bool(known) and code.value == running
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
