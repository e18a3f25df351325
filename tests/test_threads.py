"""Threads that work ahead."""

from __future__ import annotations

import _thread
import dis
import functools
import gc
import os
import signal
import sys
import threading
import time
from itertools import pairwise
from queue import SimpleQueue

import pytest

from sklearn_transfer import _threads
from sklearn_transfer._threads import Threads


def wait_for_threads(n: int) -> None:
    """Until no more than ``n`` threads run."""
    started = time.monotonic()
    while _thread._count() > n:
        seconds = time.monotonic() - started
        assert seconds < 10, "a thread goes on for ever"
        if seconds > 0.05:  # takes a second where much is loaded
            gc.collect()
        threading.Event().wait(0.001)


@pytest.fixture(autouse=True)
def no_thread_left():
    before = _thread._count()
    yield
    wait_for_threads(before)


def test_results_come_in_order():
    with Threads(3) as threads:
        assert threads.map(lambda x: x * x, range(50)) == [x * x for x in range(50)]
        assert list(threads.ahead(str, range(50), 4)) == list(map(str, range(50)))
        assert list(threads.ahead(str, [], 4)) == []
        assert threads.submit(divmod, 7, 2).result() == (3, 1)


def test_only_so_many_are_under_way():
    taken = []

    def items():
        for i in range(10):
            taken.append(i)
            yield i

    with Threads(2) as threads:
        results = threads.ahead(str, items(), 3)
        for i, _ in enumerate(results):
            assert len(taken) == min(i + 3, 10)


def test_an_error_of_a_task_is_raised_where_its_result_is_asked_for():
    with Threads(1) as threads:
        bad, good = threads.submit(int, "x"), threads.submit(int, "1")
        with pytest.raises(ValueError, match="invalid literal"):
            bad.result()
        assert good.result() == 1


def test_each_thread_prepares_once_and_what_fails_is_told():
    prepared = []

    def prepare():
        prepared.append(threading.get_ident())
        if len(prepared) == 1:
            raise OSError("no luck")

    with Threads(1, prepare) as threads:
        with pytest.raises(OSError, match="no luck"):
            threads.submit(int).result()
        threads.map(int, "123")
    assert len(prepared) == 2 and len(set(prepared)) == 1


def test_no_more_threads_than_tasks():
    before = _thread._count()
    with Threads(64) as threads:
        threads.map(int, "12")
        assert _thread._count() <= before + 2


def test_what_nobody_will_use_is_dropped():
    begun, may_end, done = SimpleQueue(), SimpleQueue(), []

    def held():
        begun.put(None)
        may_end.get()
        done.append("held")

    with Threads(1) as threads:
        threads.submit(held)
        dropped = [threads.submit(done.append, i) for i in range(10)]
        begun.get()
        threads._crew.dismiss()  # as leaving the with does first
        may_end.put(None)
    assert done == ["held"]  # which was waited for
    with pytest.raises(RuntimeError, match="ended before"):
        dropped[0].result()


def test_threads_that_have_ended_take_no_task():
    with Threads(1) as threads:
        threads.submit(int).result()
    with pytest.raises(RuntimeError, match="inside the with"):
        threads.submit(int)


def test_a_thread_that_is_free_serves_before_another_is_started():
    with Threads(8) as threads:
        for _ in range(20):
            threads.submit(int).result()
            while not threads._crew.idle.qsize():
                pass
        assert threads._crew.n_started == 1


def test_a_thread_holds_no_batch_once_it_is_idle():
    import weakref

    class Batch:
        pass

    with Threads(1) as threads:
        batch = Batch()
        seen = weakref.ref(batch)
        threads.submit(lambda b: None, batch).result()
        del batch
        threads.submit(int).result()
        assert seen() is None


def test_threads_end_where_nobody_leaves_the_with():
    before = _thread._count()
    threads = Threads(2)
    threads.map(int, "12")
    del threads
    wait_for_threads(before)


def test_a_thread_may_collect_its_own():
    box = [Threads(1)]
    pending = box[0].submit(lambda: (box.clear(), gc.collect()))
    pending.result()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_waits_for_no_thread():
    with Threads(1) as threads:
        threads.submit(int).result()
        child = os.fork()
        if child == 0:
            threads.__exit__()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0


def work_a_little(at_work: list) -> None:
    def task(number):
        at_work.append(number)
        sum(range(1000))
        at_work.remove(number)

    with Threads(2) as threads:
        for _ in threads.ahead(task, range(20), 3):
            pass


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@pytest.mark.skipif(
    sys.gettrace() is not None, reason="an interrupt inside coverage would hang there"
)
def test_an_interrupt_at_any_moment_leaves_nobody_waiting():
    """concurrent.futures hangs in here."""
    before, n_interrupted = _thread._count(), 0
    old = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for i in range(2000):
            at_work: list = []
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-5 + i % 100 * 1e-5)
                work_a_little(at_work)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                n_interrupted += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert n_interrupted > 100
    wait_for_threads(before)


PLACES = {"CALL", "CALL_KW", "CALL_FUNCTION_EX", "RESUME"}


@functools.cache
def looks_for_signals(code) -> set[int]:
    """Offsets at which CPython may raise what a signal asks for."""
    steps = list(dis.get_instructions(code))
    behind = {b.offset for a, b in pairwise(steps) if a.opname in PLACES}
    loops = {a.argval for a in steps if a.opname.startswith("JUMP_BACKWARD")}
    return behind | loops


class Interrupting:
    """A trace function that raises at the ``n``-th place in the module's code."""

    def __init__(self, n: int):
        self.n, self.seen = n, 0

    def __call__(self, frame, event, arg):
        if frame.f_code.co_filename != _threads.__file__:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self.local

    def local(self, frame, event, arg):
        if event == "opcode" and frame.f_lasti in looks_for_signals(frame.f_code):
            self.seen += 1
            if self.seen == self.n:
                raise KeyboardInterrupt
        return self.local


def test_an_interrupt_at_each_place_leaves_no_thread_and_no_task():
    before, n = _thread._count(), 0
    while True:
        at_work: list = []
        interrupting, n = Interrupting(n + 1), n + 1
        old = sys.gettrace()
        sys.settrace(interrupting)
        try:
            work_a_little(at_work)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(old)
        wait_for_threads(before)
        assert at_work == []
        if interrupting.seen < n:
            break
    assert n > 100
