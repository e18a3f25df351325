"""Rows with targets and weights, and how they come in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

# Batches among which texts of like length are gathered. More pad less, and leave
# less to chance which texts meet in a batch.
GATHERED = 16


class Examples(Dataset):
    """Activations at a boundary, targets and weights of some rows.

    Parameters
    ----------
    prefixes : Prefixes
    rows : sequence of int
        Rows of ``prefixes``.
    targets : Tensor
        One a row, in the form the loss takes.
    weights : Tensor of shape (n,)
    n_views : int
        Fixed augmented views a row has in ``prefixes``: view v of row i is its row
        ``v * n_rows + i``. Each epoch takes the next.
    n_rows : int
        Rows there are before views multiply them.
    on_epoch : callable or None
        Called with the number of each epoch, from 0, before it begins.
    guard : callable
        Gives what every forward and backward pass on these rows runs inside.
    """

    def __init__(
        self,
        prefixes,
        rows,
        targets: Tensor,
        weights: Tensor,
        *,
        n_views: int = 0,
        n_rows: int = 0,
        on_epoch: Callable[[int], None] | None = None,
        guard: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.prefixes, self.rows = prefixes, np.asarray(rows)
        self.targets, self.weights = targets, weights
        self.n_views, self.n_rows = n_views, n_rows
        self.epoch, self.on_epoch, self.guard = 0, on_epoch, guard
        lengths = prefixes.lengths
        self.lengths = None if lengths is None else lengths[self.rows]

    @property
    def n_recomputed(self) -> int:
        """Rows whose frozen part is computed at every use, having not been kept."""
        kept = self.prefixes.is_kept
        if kept is None or self.prefixes.k == 0:
            return 0
        if self.n_views:
            kept = kept.reshape(self.n_views, self.n_rows).all(0)
        return int((~kept[self.rows]).sum())

    def set_epoch(self, epoch: int) -> None:
        """Turn to the views of an epoch, from 0."""
        self.epoch = epoch
        if self.on_epoch is not None:
            self.on_epoch(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int):
        """One example, as a batch of one."""
        return next(self.batches([[i]]))

    def batches(self, parts: Sequence) -> Iterator[tuple]:
        """Pairs of activations and (targets, weights), part after part."""
        rows = self.rows
        if self.n_views:
            # Rows start at different views, so that an epoch sees all kinds.
            view = (np.arange(len(rows)) + self.epoch) % self.n_views
            rows = rows + view * self.n_rows
        activations = self.prefixes.batches([rows[part].tolist() for part in parts])
        for part, h in zip(parts, activations, strict=True):
            at = torch.as_tensor(np.asarray(part))
            yield h, (self.targets[at], self.weights[at])


class Vectors:
    """Features in memory, served as a boundary's activations are.

    Parameters
    ----------
    features : ndarray of shape (n, d), float32
    device : torch.device
    """

    lengths = None
    is_kept = None

    def __init__(self, features: np.ndarray, device: torch.device):
        self.features, self.device = torch.from_numpy(features), device

    def batches(self, parts) -> Iterator[Tensor]:
        for part in parts:
            yield self.features[part].to(self.device, non_blocking=True)


class Minibatches:
    """Batches of examples, in an order drawn anew each time; skorch's iterator.

    Parameters
    ----------
    dataset : Examples
    batch_size : int
    generator : torch.Generator or None
        Draws the order. None: as they come, but texts by length.
    """

    def __init__(self, dataset: Examples, batch_size: int, generator=None):
        self.dataset, self.batch_size = dataset, batch_size
        self.generator = generator

    def __len__(self) -> int:
        return len(self._split(np.arange(len(self.dataset))))

    def __iter__(self) -> Iterator[tuple]:
        yield from self.dataset.batches(self.parts())

    def parts(self) -> list[np.ndarray]:
        """Row numbers of each batch."""
        lengths = self.dataset.lengths
        if self.generator is None:
            order = np.arange(len(self.dataset))
            if lengths is not None:
                order = np.argsort(-lengths, kind="stable")
            return self._split(order)
        order = torch.randperm(len(self.dataset), generator=self.generator).numpy()
        if lengths is None:
            return self._split(order)
        # Sorted within a window of some batches: little is padded, and the batches
        # still differ from one epoch to the next.
        window = self.batch_size * GATHERED
        for start in range(0, len(order), window):
            some = order[start : start + window]
            by_length = np.argsort(-lengths[some], kind="stable")
            order[start : start + window] = some[by_length]
        parts = self._split(order)
        shuffled = torch.randperm(len(parts), generator=self.generator).tolist()
        return [parts[i] for i in shuffled]

    def _split(self, order: np.ndarray) -> list[np.ndarray]:
        """Batches in this order; to train on, a last one of one joins the one before.

        BatchNorm has no variance of a single value to divide by.
        """
        starts = range(0, len(order), self.batch_size)
        parts = [order[start : start + self.batch_size] for start in starts]
        is_alone = len(parts) > 1 and len(parts[-1]) == 1
        if is_alone and self.batch_size > 1 and self.generator is not None:
            parts[-2:] = [np.concatenate(parts[-2:])]
        return parts


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """sum(w * l) / sum(w)"""
    return (losses * weights).sum() / weights.sum()
