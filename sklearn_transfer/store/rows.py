"""The store: rows under keys, looked up, claimed, put and evicted.

folder/v1/rows.sqlite   index, small payloads, claims, counters
folder/v1/segments/     large payloads, one writing process a file
folder/v1/owners/       one locked file for each process that uses the store
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar, cast

import numpy as np

from sklearn_transfer.store import index
from sklearn_transfer.store.claims import Call, bars, claimant, is_alive
from sklearn_transfer.store.database import Database
from sklearn_transfer.store.index import CacheInfo, Record
from sklearn_transfer.store.notices import warn_too_small, warn_unusable
from sklearn_transfer.store.owners import Owners
from sklearn_transfer.store.segments import Segments

T = TypeVar("T")

# Payloads above this many bytes go to segments.
LARGE = 1 << 15
MAX_SEGMENT = 1 << 28
# Seconds between two notes of a row's last use.
USED_EVERY = 60.0
DEFAULT_SHARE = 0.1  # of the free space
EVICT_TO = 0.9  # of the budget
# Seconds. Rows used since then are still worked with, and evicting them means
# that the budget is too small for the work.
YOUNG = 600.0


class FolderGone(OSError):
    """The folder was taken away on purpose; the store stops without a word."""


class RowStore:
    """Rows under 32-byte keys in one folder, shared by processes and threads.

    A row is an array of numbers of any shape. Nothing is made on disk before the
    first use. No failure of the folder reaches the caller: the store then warns
    once, finds nothing from there on, grants every claim and forgets what is put.

    Parameters
    ----------
    folder : str or path-like
    max_bytes : int, default=None
        Budget for payloads; above it the least recently used rows leave. None:
        a tenth of what was free when the store was opened, its own bytes
        counted as free.
    prepare : callable, default=None
        Makes the folder, before every connection. None: the folder and its
        parents are made.

    Attributes
    ----------
    broken : bool
        Whether the store has turned itself off.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        max_bytes: int | None = None,
        *,
        prepare: Callable[[], None] | None = None,
    ):
        self.n_cleared = 0  # by this process; what it remembers of rows ends then
        self.folder = Path(folder).absolute()
        self.max_bytes = max_bytes
        self.broken = False
        self._make_folder = prepare or self._make_plain_folder
        inside = self.folder / f"v{index.FORMAT_VERSION}"
        self._segments = Segments(inside / "segments")
        self._owners = Owners(inside / "owners")
        self._database = Database(
            inside / "rows.sqlite",
            index.SCHEMA,
            index.FORMAT_VERSION,
            prepare=self._prepare,
            on_rebuild=self._drop_all_segments,
        )
        self._default_budget: int | None = None  # None until the first use

    def get_many(
        self, keys: Iterable[bytes], kind: str = "row"
    ) -> dict[bytes, np.ndarray]:
        """Rows that are stored and whole, read-only; a damaged one is forgotten."""
        keys = list(dict.fromkeys(keys))

        def read():
            found, wrong, stale = self._database.read(
                lambda connection: self._look_up(connection, keys, kind)
            )

            def note(connection):
                index.delete(connection, wrong)
                index.note_used(connection, stale, time.time())

            if wrong or stale:
                self._database.write(note)
            return found

        return self._guarded({}, read)

    def _look_up(self, connection, keys: Sequence[bytes], kind: str):
        """Rows by key; ids of the damaged; ids not noted as used for a minute."""
        found, wrong, stale = {}, [], []
        noted_before = time.time() - USED_EVERY
        for record in index.find(connection, keys):
            key, dtype, shape, checksum, nbytes, segment, start, payload, *rest = record
            row_id, used, its_kind = rest
            if its_kind != kind and its_kind in index.KINDS:
                continue
            if segment is not None:
                payload = self._segments.view(segment, start, nbytes)
            row = index.array_of(key, dtype, shape, checksum, payload)
            # Of no kind: left there, it would be stored for ever and never found.
            if row is None or its_kind != kind:
                wrong.append(row_id)
                continue
            found[key] = row
            if used < noted_before:
                stale.append(row_id)
        return found, wrong, stale

    def sizes(self, keys: Iterable[bytes], kind: str = "row") -> dict[bytes, int]:
        """Bytes of each row that is stored, by the index: nothing is read."""
        keys = list(dict.fromkeys(keys))
        return self._guarded(
            {}, lambda: self._database.read(lambda c: index.sizes(c, keys, kind))
        )

    def put(self, rows: Mapping[bytes, np.ndarray], kind: str = "row") -> None:
        """Store rows, drop their claims and count them as misses, all at once.

        Parameters
        ----------
        rows : mapping of bytes to ndarray
        kind : {"row", "prefix"}
            Features, or activations to train from.

        Raises
        ------
        ValueError
            If a row is not an array of numbers.
        """
        rows = {key: _side_by_side(row) for key, row in rows.items()}

        def write():
            # Payloads are written and digested before the transaction begins, for
            # which other processes wait.
            # Of prefixes all: they are read again at every pass over the data, and a
            # map of a file costs no memory.
            least = 1 if kind == "prefix" else LARGE + 1
            places = self._database.read(lambda _: self._place_large(rows, least))
            records = [
                Record.of(key, kind, row, places.get(key)) for key, row in rows.items()
            ]
            return self._database.write(lambda c: self._index(c, records))

        if bool(rows) and self._guarded(False, write):
            warn_too_small(self.folder, self._budget(), YOUNG, stacklevel=2)

    def _place_large(self, rows: Mapping[bytes, np.ndarray], least: int):
        """Append payloads from ``least`` bytes on: file name and offset by key."""
        large = {key: row for key, row in rows.items() if row.nbytes >= least}
        if not large:
            return {}
        # A twentieth of the budget, so that eviction does not take much at once.
        limit = min(MAX_SEGMENT, self._budget() // 20)
        me = self._owners.me()
        return {
            key: self._segments.append(index.as_bytes(row), me, limit)
            for key, row in large.items()
        }

    def _index(self, connection, records: Sequence[Record]) -> bool:
        """Enter rows whose payloads are still there, within the budget.

        Gives whether rows left for it that were used a short time ago.
        """
        written = {record.segment for record in records if record.segment}
        evicted = {name for name in written if not self._segments.exists(name)}
        kept = [record for record in records if record.segment not in evicted]
        index.insert(connection, kept, time.time())
        index.drop_all_claims(connection, [record.key for record in records])
        index.count(connection, misses=len(records))
        held, budget = index.held_bytes(connection), self._budget()
        if held <= budget:
            return False
        excess = held - EVICT_TO * budget
        last_used = index.evict(connection, excess, self._segments.drop)
        return time.time() - last_used < YOUNG

    @contextmanager
    def claiming(self) -> Iterator[Call]:
        """A call that computes rows; however it ends, its claims end with it.

        Examples
        --------
        >>> with store.claiming() as call:  # doctest: +SKIP
        ...     mine, stored, taken = store.claim(keys, call)
        ...     store.put(compute(mine))
        """
        call = Call()
        try:
            yield call
        finally:
            # In memory first: from here on no thread of this process waits for
            # the call, even if an interrupt keeps the rest from being done. The
            # next call then tells the other processes.
            call.end()
            if not self.broken and self._database.exists():
                self._guarded(None, lambda: self._database.write(self._drop_dead))

    def _drop_dead(self, connection) -> None:
        index.drop_dead_claims(connection, lambda name: is_alive(name, self._owners))

    def claim(
        self, keys: Iterable[bytes], call: Call | None = None
    ) -> tuple[list[bytes], list[bytes], list[bytes]]:
        """Ask to compute rows, at one moment for all processes.

        Parameters
        ----------
        keys : iterable of bytes
        call : Call, default=None
            From `claiming`, at whose end the claims end. None: they end with
            ``put``, ``release`` or the process, and outlive an interrupt.

        Returns
        -------
        mine : list of bytes
            The caller's to compute and ``put``, or to ``release``.
        stored : list of bytes
            Already there.
        taken : list of bytes
            Being computed by another live process or thread, or claimed without
            a ``call``; see ``wait``.
        """
        keys = list(dict.fromkeys(keys))

        def work(connection):
            stored = index.stored(connection, keys)
            owners = index.claims(connection, keys)
            barring = {name for name in set(owners.values()) if self._bars(name)}
            taken = {key for key, name in owners.items() if name in barring} - stored
            mine = [key for key in keys if key not in stored and key not in taken]
            index.set_claims(connection, mine, claimant(self._owners, call))
            return (
                mine,
                [key for key in keys if key in stored],
                [key for key in keys if key in taken],
            )

        return self._guarded((keys, [], []), lambda: self._database.write(work))

    def release(self, keys: Iterable[bytes], call: Call | None = None) -> None:
        """Give up claims, made with the same ``call``, on rows not to be computed."""
        keys = list(keys)

        def work(connection):
            index.drop_claims(connection, keys, claimant(self._owners, call))

        if keys:
            self._guarded(None, lambda: self._database.write(work))

    def wait(
        self, keys: Iterable[bytes], poll: float = 0.02, timeout: float | None = None
    ) -> bool:
        """Return when a key is stored or nobody else computes it any more.

        Parameters
        ----------
        keys : iterable of bytes
        poll : float
            Seconds between two looks at first; up to ten times that later.
        timeout : float, default=None
            Seconds after which to give up.

        Returns
        -------
        bool
            False if the time ran out.
        """
        keys = list(dict.fromkeys(keys))
        deadline = None if timeout is None else time.monotonic() + timeout
        pause = poll
        while not self._any_free(keys):
            if deadline is not None and time.monotonic() >= deadline:
                return False
            time.sleep(pause)
            pause = min(pause * 1.2, poll * 10)
        return True

    def _any_free(self, keys: Sequence[bytes]) -> bool:
        """Whether a key is without a live claim; what is stored has none."""

        def work(connection):
            owners = index.claims(connection, keys)
            claimed = len(owners) == len(keys) > 0
            return not (claimed and all(map(self._bars, set(owners.values()))))

        return self._guarded(True, lambda: self._database.read(work))

    def _bars(self, name: object) -> bool:
        return bars(name, self._owners)

    def count(self, hits: int = 0, misses: int = 0) -> None:
        """Add to the counters that all processes share.

        One small transaction without a wait for the disk, under a tenth of a
        millisecond: cheap for every hundred rows, too dear for every row.
        """

        def work(connection):
            index.count(connection, hits=hits, misses=misses)

        if hits or misses:
            self._guarded(None, lambda: self._database.write(work))

    def info(self) -> CacheInfo:
        """What the store holds; an unused one is not made for being asked."""
        nothing = CacheInfo(0, 0, 0, 0, 0, 0)
        if not self._database.exists():
            return nothing
        return self._guarded(nothing, lambda: self._database.read(index.info))

    def clear(self) -> None:
        """Drop all rows and counts; claims stay, and others go on using the store."""

        self.n_cleared += 1

        def work(connection):
            index.clear(connection)
            self._drop_all_segments()

        def empty():
            self._database.write(work)
            self._database.shrink()

        if self._database.exists():
            self._guarded(None, empty)

    def close(self) -> None:
        """Close files and give up claims; the next use opens them again."""
        with self._database.lock:
            self._database.disconnect()
            self._segments.close()
            with suppress(OSError):
                self._owners.retire()

    def __del__(self):
        # Files left to the garbage collector warn (ResourceWarning); an object
        # that was never finished has none.
        with suppress(AttributeError):
            self.close()

    def _guarded(self, when_broken: T, action: Callable[[], T]) -> T:
        """What ``action`` gives; where the folder fails, ``when_broken``, for good."""
        with self._database.lock:
            if self.broken:
                return when_broken
            try:
                if self._default_budget is None:
                    self._tidy()
                return action()
            except FolderGone:
                self._turn_off()
            except (OSError, sqlite3.Error) as error:
                self._turn_off()
                warn_unusable(self.folder, error, stacklevel=3)
            return when_broken

    def _turn_off(self) -> None:
        """Stop for good; giving up the claims keeps others from waiting for them."""
        self.broken = True
        self.close()

    def _tidy(self) -> None:
        """Once a process: sweep up after dead ones, count bytes, fix the budget."""

        def work(connection):
            self._owners.sweep()
            self._drop_dead(connection)
            indexed = index.segments(connection)
            for name, owner in self._segments.names():
                if name not in indexed and not self._owners.alive(owner):
                    self._segments.drop(name)
            return index.held_bytes(connection, recount=True)

        held = self._database.write(work)
        free = shutil.disk_usage(self.folder).free
        self._default_budget = int(DEFAULT_SHARE * (free + held))

    def budget(self) -> int:
        """Bytes that payloads may take; 0 where the folder fails."""
        return self._guarded(0, self._budget)

    def _budget(self) -> int:
        known = self._default_budget if self.max_bytes is None else self.max_bytes
        return cast(int, known)  # the default is found out before anything is done

    def _prepare(self) -> None:
        self._make_folder()
        for folder in (self._segments.folder, self._owners.folder):
            # Private even where the user's own folder is not.
            folder.parent.mkdir(mode=0o700, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)

    def _make_plain_folder(self) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(mode=0o700, exist_ok=True)

    def _drop_all_segments(self) -> None:
        for name, _ in self._segments.names():
            self._segments.drop(name)


def _side_by_side(row: np.ndarray) -> np.ndarray:
    """The row with its values side by side in memory, in C order."""
    row = np.asarray(row)
    if row.dtype.kind not in "biufc":
        raise ValueError(
            f"A row of dtype {row.dtype} cannot be stored; rows are arrays of "
            "numbers, such as np.asarray(row, dtype=np.float32)."
        )
    return row if row.flags.c_contiguous else row.copy(order="C")
