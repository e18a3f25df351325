"""Threads that work ahead, and that no interrupt can leave waiting."""

from __future__ import annotations

import _thread
import atexit
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
        Threads at most. Each is started when a task comes and all are busy.
    prepare : callable, default=None
        Called in each thread before its first task.
    """

    def __init__(self, most: int, prepare: Callable[[], object] | None = None):
        self._most, self._crew = most, _Crew(prepare)
        # For when an interrupt comes before __enter__ or in __exit__. It does not
        # wait: whoever collects garbage may hold a lock that a task needs.
        self._at_last = weakref.finalize(self, self._crew.dismiss)
        self._at_last.atexit = False

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *raised) -> None:
        self._most = 0
        self._crew.dismiss()
        self._crew.wait()
        self._at_last.detach()  # an interrupt in there would be swallowed

    def submit(self, function: Callable[..., R], *args) -> Pending[R]:
        """Have a thread call ``function``."""
        if self._most == 0:
            raise RuntimeError("These threads have ended: submit inside the with.")
        pending: Pending[R] = Pending()
        self._crew.tasks.put((function, args, pending))
        try:
            self._crew.idle.get_nowait()
        except Empty:
            if self._crew.n_started < self._most:
                self._crew.start_one()
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


class _Crew:
    """What threads share with their pool, which they must not keep alive."""

    def __init__(self, prepare: Callable[[], object] | None):
        self.prepare, self.made_in = prepare, os.getpid()
        self.tasks: SimpleQueue = SimpleQueue()
        self.idle: SimpleQueue = SimpleQueue()  # a None for each thread that waits
        self.n_started = 0
        # By thread, a lock that is held until it ends.
        self.working: dict[int, Any] = {}

    def start_one(self) -> None:
        self.n_started += 1
        ends = _thread.allocate_lock()
        ends.acquire()
        _thread.start_new_thread(self.work, (ends,))

    def work(self, ends) -> None:
        """What a thread does, from its beginning to its end."""
        me = _thread.get_ident()
        try:
            # Not by who starts it: an interrupt would come right behind the start.
            # A thread that is not here yet, as others are waited for, will find no
            # task any more.
            self.working[me], _at_work[me] = ends, self
            # Threads not made by threading.Thread lack what debuggers, coverage and
            # profilers set there.
            sys.settrace(threading.gettrace())
            sys.setprofile(threading.getprofile())
            self._work_off(self.prepare)
        finally:
            # First: nobody who was interrupted as he held the lock waits for it anew.
            self.working.pop(me, None)
            _at_work.pop(me, None)
            ends.release()

    def _work_off(self, prepare: Callable[[], object] | None) -> None:
        while (task := self.tasks.get()) is not None:
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
            self.idle.put(None)
        self.tasks.put(None)  # for the next thread

    def dismiss(self) -> None:
        """Drop what nobody will use, and let the threads go; as often as one likes."""
        try:
            while True:
                task = self.tasks.get_nowait()
                if task is not None:
                    task[-1].put(None, RuntimeError("The threads ended before this."))
        except Empty:
            self.tasks.put(None)

    def wait(self) -> None:
        """Until what is being done is done."""
        if os.getpid() != self.made_in:
            return  # threads do not come along into a forked child
        for thread, ends in list(self.working.items()):
            if thread != _thread.get_ident():
                with ends:
                    pass


_at_work: dict[int, _Crew] = {}  # by thread


@atexit.register
def _wait_for_all() -> None:
    """The interpreter must not end under a thread that is in torch: that crashes."""
    crews = list(_at_work.values())
    for crew in crews:
        crew.dismiss()
    for crew in crews:
        crew.wait()
