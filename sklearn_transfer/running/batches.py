"""From rows to network inputs: decoding ahead in threads, sorting by length."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from sklearn_transfer._threads import Threads
from sklearn_transfer.exceptions import UnreadableRowsError
from sklearn_transfer.inputs.images import ImageRecipe, ImageRows, UnreadableRow

# Rows decoded by one task of the pool. Handing over a task costs some 20
# microseconds; of more rows a task the last ones of large photographs would keep
# one thread busy while the others have nothing left to do.
DECODE_TOGETHER = 4
# Batches decoded ahead of the network.
AHEAD = 2


class ImageBatches:
    """Decode and resize in threads while the network works on the last batch.

    Parameters
    ----------
    rows : ImageRows
    digests : sequence of bytes
        What each row held when its key was made; a file that has changed since
        is a bad row, not a wrong feature.
    recipe : ImageRecipe
    size : int
        Images a batch.
    """

    def __init__(self, rows: ImageRows, digests, recipe: ImageRecipe, size: int):
        self.rows, self.digests = rows, digests
        self.recipe, self.size = recipe, size
        self.bad: dict[int, str] = {}

    def order(self, rows: Sequence[int]) -> Sequence[int]:
        """As they come: equal sizes leave nothing to gain from another order."""
        return rows

    def groups(self, rows: Iterable[int]) -> Iterator[Sequence[int]]:
        """Rows that go through the network together."""
        return _batched(rows, self.size)

    def batches(self, rows: Iterable[int]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Row numbers and pixels, (n, h, w, 3) uint8."""
        decoded = self._decoded(rows)
        while part := list(itertools.islice(decoded, self.size)):
            pixels = np.stack([image for _, image in part])
            yield [row for row, _ in part], torch.from_numpy(pixels)

    def inputs(self, parts: Iterable[Sequence[int]]) -> Iterator[torch.Tensor | None]:
        """Pixels of each part, (n, h, w, 3) uint8; the next parts are decoded ahead.

        Rows may come in any order and again; an empty part gives None.

        Raises
        ------
        UnreadableRowsError
            If rows of a part cannot be read.
        """
        pending: deque = deque()
        parts = iter(parts)
        with Threads(torch.get_num_threads()) as pool:
            while True:
                for part in itertools.islice(parts, AHEAD + 1 - len(pending)):
                    groups = _batched(part, DECODE_TOGETHER)
                    pending.append([pool.submit(self._decode_group, g) for g in groups])
                if not pending:
                    return
                found = [group.result() for group in pending.popleft()]
                yield self._stacked(list(itertools.chain(*found)))

    def _stacked(self, decoded: list) -> torch.Tensor | None:
        bad = {row: str(e) for row, e in decoded if isinstance(e, UnreadableRow)}
        if bad:
            lines = [f"\n  {self.rows.name(row)}: {bad[row]}" for row in sorted(bad)]
            raise UnreadableRowsError(
                f"{len(bad)} images cannot be read:{''.join(lines)}\n"
                "Drop or mend these rows.",
                bad,
            )
        if not decoded:
            return None
        return torch.from_numpy(np.stack([image for _, image in decoded]))

    def _decoded(self, rows: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
        todo = _batched(rows, DECODE_TOGETHER)
        ahead = max(2, AHEAD * self.size // DECODE_TOGETHER)
        with Threads(torch.get_num_threads()) as pool:
            for decoded in pool.ahead(self._decode_group, todo, ahead):
                yield from self._sorted_out(decoded)

    def _decode_group(self, rows: Sequence[int]) -> list[tuple[int, object]]:
        return [(row, self._decode(row)) for row in rows]

    def _decode(self, row: int) -> np.ndarray | UnreadableRow:
        try:
            return self.rows.load(row, self.recipe, self.digests[row])
        except UnreadableRow as error:
            return error

    def _sorted_out(self, group) -> Iterator[tuple[int, np.ndarray]]:
        for row, image in group:
            if isinstance(image, UnreadableRow):
                self.bad[row] = str(image)
            else:
                yield row, image


def _batched(values: Iterable[int], n: int) -> Iterator[tuple[int, ...]]:
    """itertools.batched, which Python 3.11 lacks."""
    iterator = iter(values)
    while group := tuple(itertools.islice(iterator, n)):
        yield group


class TextBatches:
    """Texts of like length together, so that little is padded.

    Parameters
    ----------
    texts : list of str
    backbone : TextBackbone
        Tokenises and pads.
    size : int or None
        Texts a batch; None lets the number of tokens decide.
    tokens : int
        Padded tokens a batch holds at most where ``size`` is None.
    """

    def __init__(self, texts: list[str], backbone, size: int | None, tokens: int):
        self.texts, self.backbone = texts, backbone
        self.size, self.tokens = size, tokens
        self.bad: dict[int, str] = {}
        self.ids: dict[int, np.ndarray] = {}
        self.n_truncated = 0

    def order(self, rows: Sequence[int]) -> Sequence[int]:
        """Longest first: what is going to run out of memory does so at once."""
        self.tokenize(rows)
        return sorted(rows, key=lambda row: -len(self.ids[row]))

    def tokenize(self, rows: Iterable[int]) -> None:
        """Fill in ``ids`` of the rows, and count those that were cut."""
        new = [row for row in dict.fromkeys(rows) if row not in self.ids]
        if new:
            ids, n_cut = self.backbone.tokenize([self.texts[row] for row in new])
            self.ids.update(zip(new, ids, strict=True))
            self.n_truncated += n_cut

    def groups(self, rows: Iterable[int]) -> Iterator[list[int]]:
        """Rows that go through the network together, from rows in `order`."""
        group: list[int] = []
        for row in rows:
            if group and self._is_full(group):
                yield group
                group = []
            group.append(row)
        if group:
            yield group

    def batches(self, rows: Iterable[int]) -> Iterator[tuple[list[int], object]]:
        """Row numbers and padded token ids."""
        for group in self.groups(rows):
            yield group, self._collate(group)

    def inputs(self, parts: Iterable[Sequence[int]]) -> Iterator[object]:
        """Padded token ids of each part, whose rows may come in any order and again.

        An empty part gives None.
        """
        for part in parts:
            self.tokenize(part)
            yield self._collate(part) if len(part) else None

    def _is_full(self, batch: list[int]) -> bool:
        if self.size is not None:
            return len(batch) >= self.size
        longest = len(self.ids[batch[0]])
        return (len(batch) + 1) * longest > self.tokens

    def _collate(self, batch: Sequence[int]):
        return self.backbone.collate([self.ids[row] for row in batch])
