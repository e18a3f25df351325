"""Batches through the network, several at a time on the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from sklearn_transfer._threads import Threads


def workers_for(device: torch.device) -> int:
    """Batches that run at the same time: one a CPU thread, one on a GPU."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def run_batches(
    run: Callable[[Any], Any],
    batches: Iterable[tuple[list[int], object]],
    workers: int,
    *,
    spread: bool = True,
) -> Iterator[tuple[list[int], Any]]:
    """Rows and features of each batch, in order.

    One thread a batch rather than all threads on each: threads that share a
    layer wait for each other at its end, and on a busy machine for the one that
    was interrupted; there the same batches took up to ten times as long. A lone
    batch gets all threads, unless ``spread`` is False: how many share a sum decides
    its last bits.
    """
    batches = iter(batches)
    first = list(itertools.islice(batches, 2))
    feed = itertools.chain(first, batches)
    if workers == 1 or (spread and len(first) < 2):
        for rows, inputs in feed:
            yield rows, run(inputs)
        return

    def run_one(batch):
        rows, inputs = batch
        return rows, run(inputs)

    with one_thread_each(workers) as pool:
        yield from pool.ahead(run_one, feed, workers + 1)


def one_thread_each(workers: int) -> Threads:
    """Workers whose networks run on one thread each."""
    return Threads(workers, _take_one_thread)


def _take_one_thread() -> None:
    """Let this thread's networks run on it alone; other threads keep theirs."""
    torch.get_num_threads()  # torch sets up a new thread at first use
    # Not torch.set_num_threads, which sets the number for all threads to come.
    threadpool_limits(1, user_api="openmp")
