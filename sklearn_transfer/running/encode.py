"""Rows of X to rows of features, each distinct row through the network once.

rows -> digests -> store: found / claimed -> missing, de-duplicated
  -> decode + preprocess in threads, overlapping the network -> batches
  -> store -> gather in row order
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np

from sklearn_transfer.running.request import Request
from sklearn_transfer.store.claims import Call
from sklearn_transfer.store.rows import RowStore

# Rows claimed at a time. Small enough that two processes share the work and
# that little is lost with a killed one, large enough that a claim costs nothing.
CLAIM = 128
# Results are written when this many wait, or so many bytes of them, or after this
# many seconds.
WRITE_ROWS = 256
WRITE_BYTES = 32 * 2**20
WRITE_SECONDS = 2.0
LOOKUP = 1024
# Rows kept in memory beside each store: a search asks for the same ones a hundred
# times, and reading and checking them cost more than a small network's own pass.
RECENT_BYTES = 64 * 2**20


class Batches(Protocol):
    """A modality's way from rows to network inputs.

    ``bad`` holds the rows that could not be decoded, and why.
    """

    bad: dict[int, str]

    def order(self, rows: Sequence[int]) -> Sequence[int]:
        """The order in which rows are best encoded."""

    def batches(self, rows: Iterable[int]) -> Iterator[tuple[list[int], object]]:
        """Row numbers and the network's input, batch after batch."""


# Takes (row numbers, input) pairs, gives (row numbers, results) in their order, of
# which there is one a row.
RunBatches = Callable[
    [Iterable[tuple[list[int], object]]],
    Iterator[tuple[list[int], Sequence[np.ndarray]]],
]


class Gather(Protocol):
    """Where results go, be they found in the store or computed."""

    def look_up(self, keys: list[bytes]) -> list[bytes]:
        """Take what the store has; give the rest."""

    def keep(self, rows: Mapping[bytes, np.ndarray]) -> None:
        """Take what was computed and, where there is a store, put there."""


@dataclass
class Progress:
    """Counts encoded rows; a tqdm bar on stderr where ``verbose``."""

    verbose: bool
    bar: Any = field(default=None, init=False)

    def start(self, total: int) -> None:
        if self.verbose and total:
            from tqdm.auto import tqdm

            self.bar = tqdm(total=total, desc="encoding", unit="row")

    def add(self, n: int) -> None:
        if self.bar is not None:
            self.bar.update(n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def encode(
    keys: Sequence[bytes | None],
    request: Request,
    wanted: Sequence[int],
    store: RowStore | None,
    open_network: Callable[[], tuple[Batches, RunBatches]],
    *,
    verbose: int = 0,
) -> tuple[np.ndarray, dict[int, str]]:
    """Features of every row, found or computed.

    Parameters
    ----------
    keys : sequence of bytes or None
        One key a row; None for a row that has no features (it becomes NaN).
    request : Request
    wanted : sequence of int
        Stages whose features are returned, side by side.
    store : RowStore or None
        None keeps nothing; equal rows of one call are still encoded once.
    open_network : callable
        Gives the batches of the missing rows and the function that runs them.
        Called only if something is missing: a fully stored call needs no torch.
    verbose : int
        Above 0, a progress bar.

    Returns
    -------
    features : ndarray of shape (n, d), float32
        NaN for rows without a key and for bad rows.
    bad : dict of int to str
        Reason for each row that could not be decoded.
    """
    columns = request.columns(wanted)
    out = np.full((len(keys), len(columns)), np.nan, np.float32)
    places = places_by_key(keys)
    gather = _Features(out, columns, places, store)
    missing = gather.look_up(list(places))
    if store is not None:
        store.count(hits=len(places) - len(missing))
    if not missing:
        return out, {}
    batches, run = open_network()
    first = {key: places[key][0] for key in missing}
    work = Work(batches, run, gather, store, Progress(verbose > 0))
    known = cast(Sequence[bytes], keys)  # those of missing rows
    work.encode(batches.order([first[key] for key in missing]), known)
    return out, at_every_place(batches.bad, known, places)


def at_every_place(
    bad: Mapping[int, str], keys: Sequence[bytes], places: Mapping[bytes, np.ndarray]
) -> dict[int, str]:
    """Reasons of bad rows, for all rows that are equal to them too."""
    return {
        row: reason
        for found, reason in bad.items()
        for row in places[keys[found]].tolist()
    }


def places_by_key(keys: Sequence[bytes | None]) -> dict[bytes, np.ndarray]:
    """Row numbers that hold each distinct key."""
    places: dict[bytes, list[int]] = {}
    for row, key in enumerate(keys):
        if key is not None:
            places.setdefault(key, []).append(row)
    return {key: np.asarray(rows) for key, rows in places.items()}


class _Recent:
    """Rows of one store that this process has read or written lately.

    Content makes the key, so a row never goes stale; a store that was cleared has
    none. When full it starts anew: keeping an order would cost more than it saves.
    """

    def __init__(self):
        self.rows: dict[bytes, np.ndarray] = {}
        self.n_bytes, self.n_cleared = 0, 0

    def keep(self, rows: Mapping[bytes, np.ndarray]) -> None:
        self.n_bytes += sum(row.nbytes for row in rows.values())
        if self.n_bytes > RECENT_BYTES:
            self.rows, self.n_bytes = {}, 0
        else:
            self.rows.update(rows)


_recent: weakref.WeakKeyDictionary[RowStore, _Recent] = weakref.WeakKeyDictionary()


def _recent_of(store: RowStore) -> _Recent:
    found = _recent.get(store)
    if found is None or found.n_cleared != store.n_cleared:
        found = _recent[store] = _Recent()
        found.n_cleared = store.n_cleared
    return found


class _Features:
    """Writes rows of features to their places in the output."""

    def __init__(self, out: np.ndarray, columns: np.ndarray, places: Mapping, store):
        self.out, self.places, self.store = out, places, store
        first, last = columns[0], columns[-1]
        is_run = last - first + 1 == len(columns) and (np.diff(columns) == 1).all()
        # Most take one stage: a slice, which is several times faster.
        self.columns = slice(first, last + 1) if is_run else columns

    def _take(self, key: bytes, features: np.ndarray) -> None:
        self.out[self.places[key]] = features[self.columns]

    def keep(self, rows: Mapping[bytes, np.ndarray]) -> None:
        for key, features in rows.items():
            self._take(key, features)
        if self.store is not None:
            _recent_of(self.store).keep(rows)

    def look_up(self, keys: list[bytes]) -> list[bytes]:
        """Take what the store has, a thousand rows at a time; give the rest."""
        if self.store is None:
            return keys
        recent, missing, unknown = _recent_of(self.store), [], []
        for key in keys:
            features = recent.rows.get(key)
            if features is None:
                unknown.append(key)
            else:
                self._take(key, features)
        for start in range(0, len(unknown), LOOKUP):
            part = unknown[start : start + LOOKUP]
            found = self.store.get_many(part)
            for key, features in found.items():
                self._take(key, features)
            recent.keep(found)
            missing += [key for key in part if key not in found]
        return missing


class Work:
    """One call's missing rows: claimed, computed, stored, gathered.

    Parameters
    ----------
    batches : Batches
    run : RunBatches
    gather : Gather
    store : RowStore or None
    progress : Progress
    kind : {"row", "prefix"}
        Of what is stored.
    """

    def __init__(
        self,
        batches: Batches,
        run: RunBatches,
        gather: Gather,
        store: RowStore | None,
        progress: Progress,
        kind: str = "row",
    ):
        self.batches, self.run, self.gather = batches, run, gather
        self.store, self.progress, self.kind = store, progress, kind
        self.taken: list[int] = []
        self.lost: set[bytes] = set()
        self.waiting: dict[bytes, np.ndarray] = {}
        self.n_bytes = 0  # of those waiting
        self.call: Call | None = None  # of the store, while rows are claimed
        self.written = time.monotonic()

    def encode(self, rows: Sequence[int], keys: Sequence[bytes]) -> None:
        self.keys = keys
        self.progress.start(len(rows))
        try:
            todo = list(rows)
            while todo:
                self.taken = []
                with self._released_in_the_end():
                    self._encode_claimed(todo)
                todo = self.taken
                if todo:
                    # Others encode these; come back when the first is done,
                    # or when its owner has died and the row is free again.
                    assert self.store is not None  # without one, all is ours
                    self.store.wait([keys[row] for row in todo])
        finally:
            self.progress.close()

    @contextmanager
    def _released_in_the_end(self):
        claiming = nullcontext() if self.store is None else self.store.claiming()
        with claiming as self.call:
            try:
                yield
            finally:
                self._write()

    def _encode_claimed(self, rows: Sequence[int]) -> None:
        batches = self.batches.batches(self._claim(rows))
        for batch_rows, results in self.run(batches):
            for row, result in zip(batch_rows, results, strict=True):
                self.waiting[self.keys[row]] = result
                self.n_bytes += result.nbytes
            self.progress.add(len(batch_rows))
            if self._is_time_to_write():
                self._write()

    def _is_time_to_write(self) -> bool:
        late = time.monotonic() - self.written > WRITE_SECONDS
        many = len(self.waiting) >= WRITE_ROWS or self.n_bytes >= WRITE_BYTES
        return late or many

    def _claim(self, rows: Sequence[int]) -> Iterator[int]:
        """The rows that are ours to encode; what is stored by now is gathered."""
        if self.store is None:
            yield from rows
            return
        for start in range(0, len(rows), CLAIM):
            row_of = {self.keys[row]: row for row in rows[start : start + CLAIM]}
            mine, stored, taken = self.store.claim(list(row_of), self.call)
            lost = self.gather.look_up(stored)
            # Stored for who claims and twice not for who reads: not waited for again.
            ours = {*mine, *self.lost.intersection(lost)}
            self.lost |= set(lost)
            self.taken += [row_of[key] for key in (*taken, *lost) if key not in ours]
            found = len(stored) - len(lost)
            if found:
                self.store.count(hits=found)
            self.progress.add(found)
            # In the order given: texts come sorted by length.
            yield from (row for key, row in row_of.items() if key in ours)

    def _write(self) -> None:
        self.written = time.monotonic()
        if not self.waiting:
            return
        done, self.waiting, self.n_bytes = self.waiting, {}, 0
        if self.store is not None:
            self.store.put(done, self.kind)
        self.gather.keep(done)
