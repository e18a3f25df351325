"""Activations at a boundary, to train from: stored, held, or computed at every use.

keys -> store: found / claimed -> missing, de-duplicated, as far as the budget goes
  -> from a stored shallower boundary, or decoded -> network -> store -> read back
parts of rows -> maps of stored rows | decoded ahead, network -> one batch a part
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sklearn_transfer._threads import Threads
from sklearn_transfer.backbones.stages import Tokens
from sklearn_transfer.backbones.tokenize import TokenIds
from sklearn_transfer.running.batches import AHEAD, TextBatches
from sklearn_transfer.running.encode import (
    LOOKUP,
    Progress,
    Work,
    at_every_place,
    places_by_key,
)
from sklearn_transfer.running.memory import is_out_of_memory
from sklearn_transfer.running.passes import Passes, images_a_pass
from sklearn_transfer.store.notices import bytes_from_environment
from sklearn_transfer.store.rows import EVICT_TO, RowStore

KIND = "prefix"
BYTES_VARIABLE = "SKLEARN_TRANSFER_PREFIX_BYTES"
# Where the size of the memory cannot be asked for.
ASSUMED_MEMORY = 8 * 2**30


def prefix_budget(prefix_bytes: int | str, store: RowStore | None) -> int:
    """Bytes that one fit's prefixes may take.

    Parameters
    ----------
    prefix_bytes : int or "auto"
        "auto" is SKLEARN_TRANSFER_PREFIX_BYTES where that is set, else half of the
        store's budget, or without a store an eighth of the physical memory.
    store : RowStore or None

    Raises
    ------
    ValueError
        If the environment variable is not a number of bytes.
    """
    if prefix_bytes != "auto":
        return int(prefix_bytes)
    set_by_user = bytes_from_environment(BYTES_VARIABLE)
    if set_by_user is not None:
        return set_by_user
    if store is None or store.broken:
        return _physical_memory() // 8
    return store.budget() // 2


def _physical_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return ASSUMED_MEMORY


def open_prefixes(
    rows_keys: Sequence[bytes | None],
    batches,
    runner,
    k: int,
    store: RowStore | None,
    max_bytes: int,
    *,
    verbose: int = 0,
    keys_at: Callable[[int], Sequence[bytes | None]] | None = None,
) -> tuple[Prefixes, dict[int, str]]:
    """Activations after the first ``k`` stages, computed once as far as they fit.

    Parameters
    ----------
    rows_keys : sequence of bytes or None
        One key a row at boundary ``k``; equal rows share theirs. None for a row
        that must not be stored, such as one that is augmented afresh.
    batches : ImageBatches or TextBatches
        Over the same rows. The ``size`` of ImageBatches becomes that of the passes.
    runner : Runner
    k : int
        From 0, where nothing is stored, to N - 1.
    store : RowStore or None
        None holds in memory what fits, as long as the result lives.
    max_bytes : int
        From `prefix_budget`. What all kept rows take together at most. Rows in the
        store count too and come first; the others are taken in the order of X. What
        does not fit is neither stored nor computed now.
    verbose : int
        Above 0, a progress bar.
    keys_at : callable, default=None
        Gives the keys at another boundary. Rows stored there, nearer to the input,
        are then where the computation starts, instead of decoding.

    Returns
    -------
    prefixes : Prefixes
    bad : dict of int to str
        Reason for each row that could not be decoded. Rows that are computed at
        every use were not tried.
    """
    places = places_by_key(rows_keys) if k > 0 else {}
    opening = _Opening(rows_keys, places, batches, runner, k, store, verbose)
    if places:
        opening.keep_within(max_bytes, keys_at)
    return opening.result()


class _Kept:
    """Rows that are there to be used again: views of the store's files, or arrays."""

    def __init__(self, store: RowStore | None):
        self.store = store
        self.rows: dict[bytes, np.ndarray] = {}
        self.written: dict[bytes, None] = {}
        # What is meant for a disk that fails later may be more than memory holds.
        self.room = math.inf if store is None else _physical_memory() // 8

    def look_up(self, keys: list[bytes]) -> list[bytes]:
        if self.store is None:
            return keys
        for start in range(0, len(keys), LOOKUP):
            self.rows |= self.store.get_many(keys[start : start + LOOKUP], KIND)
        return [key for key in keys if key not in self.rows]

    def __contains__(self, key: bytes) -> bool:
        return key in self.rows or key in self.written

    def keep(self, rows: Mapping[bytes, np.ndarray]) -> None:
        if self.store is not None and not self.store.broken:
            self.written |= dict.fromkeys(rows)
            return
        for key, row in rows.items():
            self.room -= row.nbytes
            if self.room < 0:
                break
            try:
                # A copy: a row must not keep its whole batch in memory.
                self.rows[key] = row.copy()
            except MemoryError:
                self.room = -1  # the rest is computed at every use

    def read_back(self) -> None:
        """Exchange what was written for views of it, so that it is there once.

        At the end, when the files have their length: a file that grew is mapped
        anew. What the store had to drop meanwhile is computed at every use.
        """
        self.look_up(list(self.written))
        self.written = {}


class _Opening:
    """One call of `open_prefixes`."""

    def __init__(self, keys, places, batches, runner, k: int, store, verbose: int):
        self.keys, self.places, self.k = keys, places, k
        self.batches, self.runner, self.store = batches, runner, store
        self.verbose = verbose
        self.kept = _Kept(store)
        self.is_text = isinstance(batches, TextBatches)
        if not self.is_text:
            batches.size = images_a_pass(runner)
        self.first = {key: int(rows[0]) for key, rows in places.items()}

    def keep_within(self, max_bytes: int, keys_at) -> None:
        chosen, n_stored = self._chosen(max_bytes)
        missing = self.kept.look_up(chosen[:n_stored]) + chosen[n_stored:]
        if self.store is not None:
            self.store.count(hits=len(chosen) - len(missing))
        rows = [self.first[key] for key in missing]
        if keys_at is not None and self.store is not None:
            rows = self._from_shallower(rows, keys_at)
        self._compute(self.batches, 0, rows)
        self.kept.read_back()

    def _chosen(self, max_bytes: int) -> tuple[list[bytes], int]:
        """Keys to keep, stored ones first, and how many of them are stored."""
        keys = list(self.places)
        sizes = {} if self.store is None else self.store.sizes(keys, KIND)
        if self.store is not None and not self.store.broken:
            # What goes beyond would be evicted as soon as it is written.
            max_bytes = min(max_bytes, int(EVICT_TO * self.store.budget()))
        stored = [key for key in keys if key in sizes]
        others = [key for key in keys if key not in sizes]
        expected = self._sizes([self.first[key] for key in others])
        sizes |= dict(zip(others, expected, strict=True))
        ordered = stored + others
        ends = np.cumsum([sizes[key] for key in ordered])
        n_chosen = int(np.searchsorted(ends, max_bytes, side="right"))
        return ordered[:n_chosen], min(len(stored), n_chosen)

    def _sizes(self, rows: list[int]) -> list[int]:
        """Bytes that rows will take."""
        if not rows:
            return []
        shape, itemsize = self.runner.row_shape(self.k), self.runner.dtype.itemsize
        if not self.is_text:
            return [int(np.prod(shape)) * itemsize] * len(rows)
        self.batches.tokenize(rows)
        return [len(self.batches.ids[row]) * shape[-1] * itemsize for row in rows]

    def _from_shallower(self, rows: list[int], keys_at) -> list[int]:
        """Compute what stored boundaries nearer to the input allow; give the rest."""
        for start in range(self.k - 1, 0, -1):
            if not rows:
                break
            keys = keys_at(start)
            there = self.store.sizes([keys[row] for row in rows], KIND)
            begun = [row for row in rows if keys[row] in there]
            self._compute(_StoredBatches(self.batches, self.store, keys), start, begun)
            rows = [row for row in rows if self.keys[row] not in self.kept]
        return rows

    def _compute(self, batches, start: int, rows: list[int]) -> None:
        """Rows from the input, or from stored ones after stage ``start``."""
        if not rows:
            return
        rows_of = self.runner.boundary(self.k).rows_of
        size = None if self.is_text else self.batches.size
        passes = Passes(self.runner, start, self.k, rows_of, size)
        progress = Progress(self.verbose > 0)
        feed = passes.one_after_the_other
        work = Work(batches, feed, self.kept, self.store, progress, KIND)
        work.encode(batches.order(rows), self.keys)

    def result(self) -> tuple[Prefixes, dict[int, str]]:
        bad = at_every_place(self.batches.bad, self.keys, self.places)
        rows = [self.kept.rows.get(key) for key in self.keys]
        return Prefixes(rows, self.batches, self.runner, self.k, len(bad)), bad


class _StoredBatches:
    """Batches of rows stored at a boundary; those that got lost are left out."""

    def __init__(self, batches, store: RowStore, keys: Sequence[bytes]):
        self.inner, self.store, self.keys = batches, store, keys
        self.bad: dict[int, str] = {}

    def order(self, rows: Sequence[int]) -> Sequence[int]:
        return self.inner.order(rows)

    def batches(self, rows: Iterable[int]) -> Iterator[tuple[list[int], list]]:
        """Row numbers and their stored arrays."""
        for group in self.inner.groups(rows):
            found = self.store.get_many([self.keys[row] for row in group], KIND)
            there = [row for row in group if self.keys[row] in found]
            if there:
                yield there, [found[self.keys[row]] for row in there]


class Prefixes:
    """Activations after the first ``k`` stages of every row of X, from `open_prefixes`.

    Attributes
    ----------
    k : int
    n_rows : int
        Rows of X; equal ones share what is kept.
    lengths : ndarray of int, shape (n_rows,), or None
        Tokens of each row, for texts.
    is_kept : ndarray of bool, shape (n_rows,)
        Whether each row is read from the store's files or from memory.
    n_kept : int
        How many of them are.
    n_recomputed : int
        Rows of X that are computed at every use.
    """

    def __init__(self, rows: list[np.ndarray | None], batches, runner, k, n_bad: int):
        self.k, self.n_rows = k, len(rows)
        self._rows, self._batches, self._runner = rows, batches, runner
        self._boundary: Any = runner.boundary(k) if k > 0 else None
        is_text = isinstance(batches, TextBatches)
        self.is_kept = np.array([row is not None for row in rows], bool)
        self.n_kept = int(self.is_kept.sum())
        self.n_recomputed = self.n_rows - self.n_kept - n_bad
        self.lengths = self._lengths() if is_text else None
        size = None if is_text else images_a_pass(runner)
        self._passes = Passes(runner, 0, k, self._finished, size)

    def _lengths(self) -> np.ndarray:
        self._batches.tokenize(i for i, row in enumerate(self._rows) if row is None)
        ids = self._batches.ids
        lengths = [
            len(ids[i] if row is None else row) for i, row in enumerate(self._rows)
        ]
        return np.array(lengths, np.int64)

    def batches(
        self, parts: Iterable[Sequence[int]]
    ) -> Iterator[Tensor | Tokens | TokenIds]:
        """What stage ``k`` + 1 takes, a batch a part.

        Parameters
        ----------
        parts : iterable of sequences of int
            Row numbers of X, at least one a part, in any order and repeated at
            will. Some parts are taken from it ahead of their use.

        Yields
        ------
        batch : Tensor, Tokens or TokenIds
            On the runner's device in its dtype: activations after stage ``k``; for
            k = 0 normalised pixels (n, 3, h, w) or token ids. Nobody else holds it,
            and it may be trained from.

        Raises
        ------
        UnreadableRowsError
            If a row that is computed at every use cannot be read.
        MemoryError
            If one sample alone does not fit in memory.
        """
        numbers = ([int(row) for row in part] for part in parts)
        ours, theirs, all_parts = itertools.tee(numbers, 3)
        with (
            Threads(1) as reader,
            closing(self._batches.inputs(map(self._not_kept, theirs))) as inputs,
            self._passes.side_by_side() as run,
        ):
            stored = reader.ahead(self._stacked, ours, AHEAD + 1)
            for part, kept, fed in zip(all_parts, stored, inputs, strict=True):
                yield self._batch(part, kept, fed, run)

    def _stacked(self, part: list[int]) -> Tensor | None:
        """Stored rows of a part side by side on the host; None if there are none."""
        rows = [self._rows[i] for i in part if self._rows[i] is not None]
        if not rows:
            return None
        with _naming_sizes(len(rows), self.k):
            return self._boundary.stacked(rows)

    def _not_kept(self, part: list[int]) -> list[int]:
        return [i for i in part if self._rows[i] is None]

    def _batch(self, part: list[int], kept: Tensor | None, inputs, run):
        if inputs is not None and self._runner.device.type == "cuda":
            inputs = _pinned(inputs)
        if self.k == 0:
            with _naming_sizes(len(part), 0):
                return self._runner.until(inputs, 0)
        rows = None
        if kept is not None:
            rows = kept.to(self._runner.device, non_blocking=True)
        if inputs is not None:
            computed = run(inputs)
            rows = computed if rows is None else self._mixed(part, rows, computed)
        lengths = () if self.lengths is None else self.lengths[part]
        return self._boundary.network_form(rows, lengths)

    def _finished(self, h: Tensor | Tokens) -> Tensor:
        """Rows in their stored form, still on the device: (n, ...)."""
        rows = self._boundary.stored_form(h)
        if isinstance(h, Tokens):
            # Nothing behind a text's end, as where it is stored.
            rows = rows.masked_fill(~h.mask.bool().unsqueeze(2), 0)  # (n, t, d)
        return rows

    def _mixed(self, part: list[int], kept: Tensor, computed: Tensor) -> Tensor:
        """Stored and computed rows, each at its place in the part."""
        # Of texts the longest is in one of the two, which is as wide as all are.
        width = max(kept.shape[1], computed.shape[1])
        out = kept.new_zeros((len(part), width, *kept.shape[2:]))
        is_kept = [self._rows[i] is not None for i in part]
        places = torch.tensor(is_kept, device=out.device)
        out[places, : kept.shape[1]] = kept
        out[~places, : computed.shape[1]] = computed
        return out


@contextmanager
def _naming_sizes(n: int, k: int) -> Iterator[None]:
    """Say what did not fit where a batch cannot even be put together."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(
            f"A batch of {n} rows, after {k} frozen stages, does not fit in memory. "
            f"Write batch_size={max(1, n // 2)} or less for fit, a smaller image_size "
            "or max_length, or a larger freeze_depth."
        ) from error


def _pinned(inputs):
    """From where a GPU copies without anybody waiting."""
    if isinstance(inputs, Tensor):
        return inputs.pin_memory()
    return type(inputs)(*(tensor.pin_memory() for tensor in inputs))
