"""Which folder is the cache, and what users ask about it.

"session" is one private folder for a whole tree of processes, in the temporary
folder. Its name tells the process that owns it, so that workers find it even if
they were started before anything was stored:

    sklearn_transfer-<user>-<process number>-<start time>

The owner removes it at its end. After a kill the next session sweeps it: every
user of a folder holds a lock on the file ``lock`` in it.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import re
import shutil
import stat
import tempfile
import threading
import warnings
from contextlib import suppress
from pathlib import Path

from sklearn_transfer.exceptions import CacheWarning
from sklearn_transfer.store.index import CacheInfo
from sklearn_transfer.store.notices import BYTES_VARIABLE, bytes_from_environment
from sklearn_transfer.store.owners import lock, process_alive, start_time
from sklearn_transfer.store.rows import FolderGone, RowStore

# The session's folder, handed down to every process started from here.
SESSION_VARIABLE = "SKLEARN_TRANSFER_SESSION"

_USER = os.getuid() if hasattr(os, "getuid") else 0
_NAME = re.compile(rf"sklearn_transfer-{_USER}-(?P<pid>[0-9]+)-(?P<started>[0-9]+)")


def cache_info(cache: str | os.PathLike | None = "session") -> CacheInfo:
    """What a cache holds, and how often it was of use.

    Parameters
    ----------
    cache : "session", path or None, default="session"
        As given to the estimators: the cache of this process and its workers, or
        the folder of a lasting one.

    Returns
    -------
    info : CacheInfo
        Named tuple of ``rows`` and ``bytes`` (stored feature rows and their
        size), ``hits`` and ``misses`` (rows found and rows computed since the
        cache was emptied, over all processes), ``prefix_rows`` and
        ``prefix_bytes`` (activations kept for training). All zero where nothing
        was stored yet; asking makes no folder.

    Raises
    ------
    TypeError
        If ``cache`` is neither a string, a path nor None.
    ValueError
        If it is an empty string.

    See Also
    --------
    clear_cache : Empty it.

    Notes
    -----
    A cache holds at most a tenth of the disk space that was free when it was
    opened; the rows not used for longest make room. The environment variable
    ``SKLEARN_TRANSFER_CACHE_BYTES`` sets another number of bytes.

    Examples
    --------
    >>> import tempfile
    >>> from sklearn_transfer import cache_info
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     cache_info(folder)
    CacheInfo(rows=0, bytes=0, hits=0, misses=0, prefix_rows=0, prefix_bytes=0)
    """
    store = open_store(cache)
    return CacheInfo(0, 0, 0, 0, 0, 0) if store is None else store.info()


def clear_cache(cache: str | os.PathLike | None = "session") -> None:
    """Empty a cache; what is asked for again is computed again.

    Processes that use the cache at this moment go on using it.

    Parameters
    ----------
    cache : "session", path or None, default="session"
        As given to the estimators: the cache of this process and its workers, or
        the folder of a lasting one.

    Raises
    ------
    TypeError
        If ``cache`` is neither a string, a path nor None.
    ValueError
        If it is an empty string.

    See Also
    --------
    cache_info : What it holds.

    Examples
    --------
    >>> from sklearn_transfer import cache_info, clear_cache
    >>> clear_cache()
    >>> cache_info().rows
    0
    """
    store = open_store(cache)
    if store is not None:
        store.clear()


_stores: dict[Path, RowStore] = {}
_opening = threading.Lock()


def open_store(cache: str | os.PathLike | None) -> RowStore | None:
    """The store that ``cache`` names: one object a folder in each process.

    Parameters
    ----------
    cache : "session", path or None
        None gives None. Nothing is made on disk yet.

    Raises
    ------
    TypeError
        If ``cache`` is something else.
    ValueError
        If ``cache`` is an empty string, or SKLEARN_TRANSFER_CACHE_BYTES is not a
        number of bytes.
    """
    if cache is None:
        return None
    if not isinstance(cache, (str, os.PathLike)):
        raise TypeError(
            f"cache={cache!r} is a {type(cache).__name__}; it must be 'session', a "
            "folder or None. Write cache='session'."
        )
    if not os.fspath(cache).strip():
        # As a path it would be the working directory.
        raise ValueError(
            f"cache={cache!r} names no folder. Write cache=None to store nothing, "
            "cache='session', or a folder such as cache='features'."
        )
    budget = bytes_from_environment(BYTES_VARIABLE)
    with _opening:
        try:
            session = cache == "session"
            if session:
                folder = _session_folder()
            else:
                folder = Path(cache).expanduser().resolve()
        except (OSError, RuntimeError) as error:  # no temporary folder, no home
            warnings.warn(
                f"cache={cache!r} cannot be used ({error}). Nothing is stored; "
                "results are the same, computed each time. Write cache=None, or name "
                "a folder that you may write to, such as cache='features'.",
                CacheWarning,
                stacklevel=2,
            )
            return None
        if folder not in _stores:
            prepare = (lambda: _prepare(folder)) if session else None
            _stores[folder] = RowStore(folder, prepare=prepare)
        store = _stores[folder]
        store.max_bytes = budget
        return store


def _session_folder() -> Path:
    """This tree's folder, which may not exist yet; handed down by environment."""
    named = os.environ.get(SESSION_VARIABLE)
    if named and _is_session(Path(named)):
        return Path(named)
    folder = _folder_of(_parent_of_worker()) or _own_folder()
    os.environ[SESSION_VARIABLE] = str(folder)
    return folder


def _is_session(folder: Path) -> bool:
    """Whether a live process of this user owns the folder, or may yet make it."""
    if not (folder.is_absolute() and _owner_alive(folder)):
        return False
    return _private(folder) if os.path.lexists(folder) else folder.parent.is_dir()


def _owner_alive(folder: Path) -> bool:
    match = _NAME.fullmatch(folder.name)
    return match is not None and process_alive(int(match["pid"]), match["started"])


def _private(folder: Path) -> bool:
    """Whether it is a folder of this user, no link, closed to everybody else."""
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode):
        return False
    if not hasattr(os, "getuid"):  # Windows: temporary folders are per user
        return True
    return status.st_uid == _USER and not stat.S_IMODE(status.st_mode) & 0o077


def _parent_of_worker() -> int | None:
    """The process that started this one as its worker; None if this is no worker.

    ``os.getppid()`` alone would name the server of the "forkserver" method.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        return parent.pid
    name = multiprocessing.current_process().name
    return os.getppid() if name.startswith("Loky") else None


def _folder_of(pid: int | None) -> Path | None:
    """The folder that a process owns; None if there is no such process."""
    started = None if pid is None else start_time(pid)
    if started is None:
        return None
    temporary = Path(tempfile.gettempdir()).resolve()
    return temporary / f"sklearn_transfer-{_USER}-{pid}-{started}"


def _own_folder() -> Path:
    folder = _folder_of(os.getpid())
    assert folder is not None  # this process runs
    return folder


# Session folders in use here: descriptor of the locked file, process number.
_locks: dict[Path, tuple[int, int]] = {}
# Those at whose first use dead sessions were swept up.
_swept_for: set[Path] = set()


def _prepare(folder: Path) -> None:
    """Make the session's folder, say that it is in use, sweep up dead sessions."""
    if not _owner_alive(folder):
        # Made again now, nobody would be there to remove it.
        raise FolderGone(f"the session of {folder} has ended")
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if not _private(folder):
        raise PermissionError(f"{folder} is not a private folder of this user")
    _hold(folder)
    if folder not in _swept_for:
        _swept_for.add(folder)
        _sweep(folder)


def _hold(folder: Path) -> None:
    """Hold a shared lock on the folder's lock file as long as the process lives."""
    path = folder / "lock"
    descriptor, pid = _locks.get(folder, (None, None))
    if descriptor is not None:
        with suppress(FileNotFoundError):
            same = os.path.samestat(os.fstat(descriptor), os.stat(path))
            if same and pid == os.getpid():
                return
        # The file of a parent before a fork, or of a folder that was removed.
        os.close(descriptor)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    _locks[folder] = descriptor, os.getpid()
    lock(descriptor, exclusive=False, wait=True)


def _sweep(own: Path) -> None:
    """Remove this user's session folders that no live process owns or uses."""
    for folder in own.parent.glob(f"sklearn_transfer-{_USER}-*"):
        # Never one in use here: closing its lock file would give up the lock.
        if folder in _locks or not _NAME.fullmatch(folder.name):
            continue
        with suppress(OSError):
            if not _owner_alive(folder) and _private(folder):
                _remove_unused(folder)


def _remove_unused(folder: Path) -> None:
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(folder / "lock", flags, 0o600)
    try:
        if lock(descriptor, exclusive=True):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


@atexit.register
def _close_and_remove_own() -> None:
    """At its end a process removes its folder, even if only workers used it.

    The name is made from the process number of this moment: in a forked child it
    is not the parent's.
    """
    for store in _stores.values():
        store.close()
    folder = _own_folder()
    with suppress(OSError):
        if os.path.lexists(folder) and _private(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _after_fork_in_child() -> None:
    global _opening
    _opening = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
