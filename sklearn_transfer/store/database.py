"""The SQLite index: connections, forks, locks, damage.

One connection a process, used under a lock by all its threads (SQLite lets one
write at a time anyway) and closed before a fork: SQLite's state must not be
carried into a child, not even to be closed there.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from sklearn_transfer.exceptions import CacheWarning
from sklearn_transfer.store.owners import lock

T = TypeVar("T")

# Seconds that SQLite waits for another process's transaction, and in all.
BUSY = 30.0
PATIENCE = 120.0
# Larger than the usual 4096: of 2 kB payloads only one fits into such a page.
PAGE = 16384
JOURNAL_LIMIT = 1 << 26

_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}
# A result without a code is text in the file that is not UTF-8.
_DAMAGED = {
    None,
    sqlite3.SQLITE_ERROR,  # a table or a column is not there
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_FORMAT,
    sqlite3.SQLITE_MISMATCH,
}
NETWORK_SYSTEMS = frozenset(
    "9p afs beegfs ceph cifs coda fuse.glusterfs fuse.sshfs gfs gfs2 glusterfs gpfs "
    "lustre ncpfs nfs nfs4 ocfs2 panfs prl_fs smb3 smbfs vboxsf virtiofs".split()
)


class Database:
    """One SQLite file that repairs itself and never shows a lock error.

    Parameters
    ----------
    path : Path
    schema : str
        Statements that make the tables.
    version : int
        Written into a new file; a file that holds another number is damaged.
    prepare : callable
        Called before every connection; makes the folder.
    on_rebuild : callable
        Called when a damaged file has been removed, before the new one is made.
    """

    def __init__(
        self,
        path: Path,
        schema: str,
        version: int,
        prepare: Callable[[], None],
        on_rebuild: Callable[[], None],
    ):
        self.path, self.schema, self.version = path, schema, version
        self.prepare, self.on_rebuild = prepare, on_rebuild
        self.lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._ready = False
        self._file: tuple[int, int] | None = None
        self._pid = os.getpid()
        _databases.add(self)

    def exists(self) -> bool:
        return self.path.exists()

    def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """What ``work`` gives; it may be run again after a repair."""
        return self._persist(lambda: work(self.connect()))

    def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """What ``work`` gives in one transaction that no other writer enters."""
        return self._persist(lambda: self._transact(work))

    def _transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with _transaction(self.connect()) as connection:
            return work(connection)

    def _persist(self, attempt: Callable[[], T]) -> T:
        """Repeat until it works; sqlite3.Error and OSError if it never will."""
        deadline = time.monotonic() + PATIENCE
        repairs = 3
        with self.lock:
            while True:
                try:
                    return attempt()
                except sqlite3.Error as error:
                    code = getattr(error, "sqlite_errorcode", None)
                    busy = code is not None and code & 0xFF in _BUSY
                    if busy and time.monotonic() < deadline:
                        time.sleep(0.02)
                        continue
                    repairs -= 1
                    if not repairs:
                        raise
                    if self._moved():
                        self.disconnect()
                    elif _is_damage(code):
                        self._rebuild(error)
                    else:
                        raise
                except (TypeError, ValueError, LookupError) as error:
                    # Words where numbers were, or records that are gone: damage
                    # that SQLite has no way to see.
                    repairs -= 1
                    if not repairs:
                        raise
                    self._rebuild(error)
                except FileNotFoundError:  # the folder was removed under us
                    repairs -= 1
                    if not repairs:
                        raise

    def connect(self) -> sqlite3.Connection:
        """The connection; made anew in a child, or where the file was replaced."""
        if self._pid != os.getpid() or self._moved():
            self.disconnect()
        connection = self._connection
        if connection is None or not self._ready:
            connection = self._open()
        if connection.in_transaction:
            # Left by an interrupt between two steps of Python. Beginning another
            # would fail in a way that looks like damage.
            connection.rollback()
        return connection

    def _open(self) -> sqlite3.Connection:
        self.disconnect()
        self.prepare()
        with suppress(FileExistsError):
            # SQLite would make it readable by others; its journals follow suit.
            # Never reopened here: closing would drop SQLite's own locks on it.
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
            os.close(os.open(self.path, flags, 0o600))
        self._file = _identity(self.path)
        self._connection = connection = sqlite3.connect(
            self.path.as_uri() + "?mode=rw",
            uri=True,
            timeout=BUSY,
            isolation_level=None,
            check_same_thread=False,
        )
        for pragma in (
            f"page_size = {PAGE}",
            f"journal_mode = {'DELETE' if on_network(self.path) else 'WAL'}",
            f"journal_size_limit = {JOURNAL_LIMIT}",
            "synchronous = NORMAL",
        ):
            connection.execute(f"PRAGMA {pragma}").fetchall()
        if _stored_version(connection) != self.version:
            self._make_tables(connection)
        self._ready = True
        return connection

    def _make_tables(self, connection: sqlite3.Connection) -> None:
        with _transaction(connection):
            found = _stored_version(connection)  # another process may be faster
            if found not in (0, self.version):
                raise sqlite3.DatabaseError(f"the file holds format {found}")
            if not found:
                for statement in self.schema.split(";"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {self.version}")

    def _moved(self) -> bool:
        """Whether another file, or none, is where the connection's file was."""
        return self._file is not None and _identity(self.path) != self._file

    def disconnect(self) -> None:
        connection, self._connection = self._connection, None
        pid, self._pid = self._pid, os.getpid()
        self._ready, self._file = False, None
        if pid != self._pid:
            # A child of a fork that ran none of Python's hooks: closing here
            # would touch the parent's journal.
            _abandoned.append(connection)
        elif connection is not None:
            with suppress(sqlite3.Error):
                connection.close()

    def shrink(self) -> None:
        """Give back the space of deleted rows, where no process stands in the way."""
        with self.lock, suppress(sqlite3.Error):
            self.connect().execute("VACUUM")
            self.connect().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _rebuild(self, error: Exception) -> None:
        """Remove the damaged file, unless another process has just done so."""
        with _rebuilding, _locked(self.path.with_suffix(".lock")):
            # The connection is still open, so that the file's number cannot have
            # been given to its successor.
            if self._moved():
                self.disconnect()
                return
            self.disconnect()
            for ending in ("", "-wal", "-shm", "-journal"):
                Path(f"{self.path}{ending}").unlink(missing_ok=True)
            self.on_rebuild()
        warnings.warn(
            f"The cache in {self.path.parent} was damaged ({error}); it has been "
            "emptied and is filled again. Results are not affected.",
            CacheWarning,
            stacklevel=2,
        )


@contextmanager
def _transaction(connection: sqlite3.Connection):
    # Immediate: a lock taken at the first write could fail for good, because
    # what was read before may have changed.
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield connection
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            connection.rollback()
        raise


def _stored_version(connection: sqlite3.Connection) -> int:
    return connection.execute("PRAGMA user_version").fetchone()[0]


@contextmanager
def _locked(path: Path):
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        lock(descriptor, exclusive=True, wait=True)
        yield
    finally:
        os.close(descriptor)


def _is_damage(code: int | None) -> bool:
    if code is None or code == sqlite3.SQLITE_IOERR_SHORT_READ:
        return True
    return code & 0xFF in _DAMAGED


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def on_network(path: Path, mounts: str = "/proc/self/mounts") -> bool:
    """Whether a path lies on a network file system.

    Such systems do not share memory between machines, and SQLite's write-ahead
    log needs that. Only Linux tells the kind of a mount in a file; elsewhere the
    answer is False, and SQLite itself refuses the log where it cannot have it.
    """
    try:
        lines = Path(mounts).read_text("utf-8", "replace").splitlines()
    except OSError:
        return False
    kind_of = {}
    for line in lines:
        _, where, kind, *_ = line.split(" ")
        kind_of[where.replace("\\040", " ")] = kind
    holders = [folder for folder in map(str, path.parents) if folder in kind_of]
    return bool(holders) and kind_of[holders[0]] in NETWORK_SYSTEMS


# Connections are closed before a fork, under every lock, and opened again by
# whoever needs them; so a child starts from nothing, and no lock is held in it
# by a thread that it does not have.
_databases: weakref.WeakSet[Database] = weakref.WeakSet()
_closed_for_fork: list[Database] = []
_abandoned: list[sqlite3.Connection | None] = []
_rebuilding = threading.Lock()


def _before_fork() -> None:
    for database in sorted(_databases, key=id):
        database.lock.acquire()
        _closed_for_fork.append(database)
        if database._connection is not None and not database._connection.in_transaction:
            database.disconnect()


def _after_fork_in_parent() -> None:
    while _closed_for_fork:
        _closed_for_fork.pop().lock.release()


def _after_fork_in_child() -> None:
    global _rebuilding
    _rebuilding = threading.Lock()
    while _closed_for_fork:
        _closed_for_fork.pop().lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
