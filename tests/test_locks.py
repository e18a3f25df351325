"""A lock that another thread holds while the process forks is free in the child."""

from __future__ import annotations

import os
import threading

import pytest

from sklearn_transfer._locks import ForkSafeLock

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


def is_free(lock: ForkSafeLock) -> bool:
    """Whether another thread could take it."""
    taken = []

    def take():
        inner = lock._lock
        taken.append(inner.acquire(blocking=False))
        if taken[0]:
            inner.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return taken[0]


def exit_code_of_child(check) -> int:
    """0 if ``check`` holds in a forked child."""
    child = os.fork()
    if child == 0:
        os._exit(0 if check() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@needs_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_finds_it_free_whoever_held_it():
    lock, held, done = ForkSafeLock(), threading.Event(), threading.Event()

    def hold():
        with lock.held():
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        assert not is_free(lock)
        assert exit_code_of_child(lambda: is_free(lock)) == 0
    finally:
        done.set()
        thread.join()
    assert is_free(lock)


@needs_fork
def test_a_child_forked_inside_leaves_in_peace():
    lock = ForkSafeLock()
    with lock.held():
        child = os.fork()
    if child == 0:
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_it_is_reentrant():
    lock = ForkSafeLock()
    with lock.held(), lock.held():
        assert not is_free(lock)
    assert is_free(lock)
