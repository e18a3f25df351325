"""Forward passes whose rows do not depend on what else is in the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sklearn_transfer.running.memory import ShrinkingBatches
from sklearn_transfer.running.parallel import one_thread_each, run_batches, workers_for

# Images in every pass on a CPU. Its matrix products sum in an order that depends on
# the size of the batch and the number of threads: resnet50's rows differed in their
# last bits between 8 images and 24, resnet18's between one and two. Small, because
# a pass that is not full is filled up; none of nine networks gained from more.
ALIKE = 16


def images_a_pass(runner) -> int:
    """How many images go through together; on a CPU always exactly so many."""
    size = runner.batch_size()
    return min(size, ALIKE) if runner.device.type == "cpu" else size


class Passes:
    """Passes through stages ``start`` + 1 .. ``k``; ``finish`` says what is kept.

    On a CPU each pass over images has the same size and one thread, so that a row
    is the same to the last bit whenever and beside whichever others it is computed.

    Parameters
    ----------
    runner : Runner
    start, k : int
        Inputs are those of the network if ``start`` is 0, else lists of stored rows.
    finish : callable
        Takes activations after stage ``k``, gives a list or tensor of rows.
    size : int or None
        Rows a pass; None is a whole batch, as texts are.
    """

    def __init__(self, runner, start: int, k: int, finish: Callable, size: int | None):
        self.runner, self.start, self.k, self.finish = runner, start, k, finish
        self.size, self.workers = size, workers_for(runner.device)
        self.alike = runner.device.type == "cpu" and size is not None
        self.run = ShrinkingBatches(self._pass, size)

    def _pass(self, inputs):
        size = self.run.size
        if not self.alike or size is None:
            return self.finish(self._activations(inputs))
        filled = _filled(inputs, size)
        return self.finish(self._activations(filled))[: len(inputs)]

    def _activations(self, inputs):
        if self.start == 0:
            return self.runner.until(inputs, self.k)
        h = self.runner.batch_of(inputs, self.start)
        return self.runner.between(h, self.start, self.k)

    def one_after_the_other(self, feed: Iterable) -> Iterator[tuple[list[int], Any]]:
        """Row numbers and rows, of each (numbers, inputs)."""
        return run_batches(self.run, feed, self.workers, spread=not self.alike)

    @contextmanager
    def side_by_side(self) -> Iterator[Callable]:
        """A function that takes inputs of any length and gives a tensor of rows."""
        size = self.size
        if not self.alike or size is None:
            yield self.run
            return
        with one_thread_each(self.workers) as pool:

            def run(inputs: Tensor) -> Tensor:
                starts = range(0, len(inputs), size)
                parts = [inputs[i : i + size] for i in starts]
                return torch.cat(pool.map(self.run, parts))

            yield run


def _filled(inputs: Tensor | list, size: int):
    """Inputs repeated at the end until there are ``size``."""
    n_missing = max(size - len(inputs), 0)
    if isinstance(inputs, list):
        return inputs + inputs[-1:] * n_missing
    return torch.cat([inputs, inputs[-1:].expand(n_missing, *inputs.shape[1:])])
