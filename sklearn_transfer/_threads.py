"""Threads that work ahead, and that no interrupt can leave waiting."""

from __future__ import annotations

import _thread
import functools
import itertools
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Threads:
    """Work off tasks in the order in which they come, until the ``with`` is left.

    Not concurrent.futures: its pools, like threading.Thread.start, wait on
    conditions, whose steps are Python code. Ctrl-C between two of them leaves a lock
    taken, and whoever comes next waits for ever. Here the main thread waits in C
    alone, where an interrupt comes either before or after.

    Parameters
    ----------
    most : int
        Threads at most. Each is started when a task comes.
    prepare : callable, default=None
        Called in each thread before its first task.
    """

    def __init__(self, most: int, prepare: Callable[[], object] | None = None):
        self._most, self._prepare = most, prepare
        self._tasks: SimpleQueue = SimpleQueue()
        self._running: dict[int, Any] = {}  # by thread, a lock held until it ends
        # For when an interrupt comes before __enter__ or in __exit__, and for threads
        # that work while the interpreter ends: torch crashes under those.
        self._end = functools.partial(_end, self._tasks, self._running, os.getpid())
        self._at_last = weakref.finalize(self, self._end)

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *raised) -> None:
        self._end()
        self._at_last.detach()  # an interrupt in there would be swallowed

    def submit(self, function: Callable[..., R], *args) -> Pending[R]:
        """Have a thread call ``function``."""
        pending: Pending[R] = Pending()
        self._tasks.put((function, args, pending))
        if len(self._running) < self._most:
            ends = _thread.allocate_lock()
            ends.acquire()
            # What an interrupt keeps out of the list ends too, just unawaited.
            thread = _thread.start_new_thread(_work, (self._tasks, self._prepare, ends))
            self._running[thread] = ends
        return pending

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """``function`` of each item, in order."""
        pending = [self.submit(function, item) for item in items]
        return [one.result() for one in pending]

    def ahead(
        self, function: Callable[[T], R], items: Iterable[T], n: int
    ) -> Iterator[R]:
        """``function`` of each item in order; ``n`` are under way at any time."""
        pending: deque[Pending[R]] = deque()
        items = iter(items)
        while True:
            for item in itertools.islice(items, n - len(pending)):
                pending.append(self.submit(function, item))
            if not pending:
                return
            yield pending.popleft().result()


class Pending(Generic[R]):
    """What a task will give; to be asked once."""

    def __init__(self):
        self._box: SimpleQueue = SimpleQueue()

    def put(self, value: Any, error: BaseException | None) -> None:
        self._box.put((value, error))

    def result(self) -> R:
        """Wait for the task; its value, or the error that it raised."""
        value, error = self._box.get()
        if error is None:
            return value
        try:
            raise error
        finally:
            del error  # whose traceback holds this frame


def _work(tasks: SimpleQueue, prepare: Callable | None, ends) -> None:
    # Threads not made by threading.Thread lack what debuggers and coverage set there.
    sys.settrace(threading.gettrace())
    try:
        while (task := tasks.get()) is not None:
            function, args, pending = task
            try:
                if prepare is not None:
                    prepare()
                    prepare = None
                pending.put(function(*args), None)
            except BaseException as error:
                pending.put(None, error)
            # An idle thread must not hold a batch.
            del task, function, args, pending
        tasks.put(None)  # for the next thread
    finally:
        ends.release()


def _end(tasks: SimpleQueue, running: dict, made_in: int) -> None:
    """Drop what nobody will use, and wait for what is being done.

    To be called any number of times: the first call may have been interrupted.
    """
    if os.getpid() != made_in:
        return  # the threads did not come along into a forked child
    try:
        while True:
            tasks.get_nowait()
    except Empty:
        tasks.put(None)
    for thread, ends in list(running.items()):
        # The garbage of an interrupted call may be collected by a thread of its own.
        if thread != threading.get_ident():
            with ends:
                pass
