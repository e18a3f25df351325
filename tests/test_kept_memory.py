"""Freed memory stays for the next step of a training, and no longer."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys

import pytest
from skorch.callbacks import Callback

from sklearn_transfer import ImageClassifier, _memory
from sklearn_transfer._memory import AFTERWARDS, KEPT, memory_kept
from tests.fine_tuning_data import stripes

N_BYTES = 2**27


@pytest.fixture
def thresholds(monkeypatch) -> dict[int, int]:
    """What malloc was told, by number of the parameter; nothing is really said."""
    told: dict[int, int] = {}

    def call(name: str, *args: int) -> None:
        if name == "mallopt":
            told[args[0]] = args[1]

    monkeypatch.setattr(_memory, "_call", call)
    monkeypatch.setattr(_memory, "_is_left_alone", False)
    return told


# In a process of its own and by malloc itself: elsewhere small blocks that come in
# between decide whether a large one finds its place again.
COUNTED = """
import ctypes, resource
from sklearn_transfer._memory import memory_kept

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [
    ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
]

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        block = libc.malloc(N_BYTES)
        libc.memset(block, 1, N_BYTES)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with memory_kept():
    page_faults()
    kept = page_faults()
page_faults()  # the first free gives back what was kept
print(kept, page_faults())
"""


@pytest.mark.skipif(not hasattr(ctypes.pythonapi, "mallopt"), reason="needs glibc")
def test_a_freed_block_is_used_again():
    environ = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))
    }
    script = COUNTED.replace("N_BYTES", str(N_BYTES))
    told = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=environ,
    )
    kept, usual = map(int, told.stdout.split())
    assert usual > 4 * (kept + 1)  # pages may be huge, and other faults count as well


def test_the_last_to_leave_puts_it_back(thresholds):
    first, second = memory_kept(), memory_kept()
    first.__enter__()
    assert thresholds == KEPT
    second.__enter__()
    first.__exit__(None, None, None)
    assert thresholds == KEPT
    second.__exit__(None, None, None)
    assert thresholds == KEPT | AFTERWARDS


def test_it_is_put_back_after_an_error(thresholds):
    with pytest.raises(KeyboardInterrupt), memory_kept():
        raise KeyboardInterrupt
    assert thresholds == KEPT | AFTERWARDS


def test_whom_an_interrupt_has_left_behind_holds_nothing(thresholds):
    def interrupted():
        _memory._keeping.add(_memory._User())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    gc.collect()
    with memory_kept():
        assert thresholds == KEPT
    assert thresholds == KEPT | AFTERWARDS


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # beside threads
def test_a_forked_child_puts_it_back_by_itself(thresholds):
    with memory_kept():
        child = os.fork()
        if child == 0:
            with memory_kept():
                pass
            os._exit(0 if thresholds == KEPT | AFTERWARDS else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert thresholds == KEPT


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "1", True),
        ("GLIBC_TUNABLES", "glibc.malloc.mmap_max=1", True),
        ("GLIBC_TUNABLES", "glibc.rtld.optional_static_tls=2000", False),
        ("MALLOC_ARENA_MAX", "2", False),
    ],
)
def test_what_the_user_has_set_stands(name, value, expected, thresholds, monkeypatch):
    for other in list(os.environ):
        if other.startswith(("MALLOC_", "GLIBC_TUNABLES")):
            monkeypatch.delenv(other)
    monkeypatch.setenv(name, value)
    assert _memory.is_set_by_user() == expected
    monkeypatch.setattr(_memory, "_is_left_alone", expected)
    with memory_kept():
        pass
    assert thresholds == ({} if expected else KEPT | AFTERWARDS)


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_other_c_libraries_are_left_alone(error, monkeypatch):
    def library(name):
        raise error

    monkeypatch.setattr(ctypes, "CDLL", library)
    with memory_kept():
        _memory.give_memory_back()


class Seen(Callback):
    """Notes what malloc is told while a network trains."""

    def __init__(self, thresholds, error=None):
        self.thresholds, self.error = thresholds, error
        self.during: list[dict] = []

    def on_batch_end(self, net, **kwargs):
        self.during.append(dict(self.thresholds))
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [None, ZeroDivisionError("mine")])
def test_training_keeps_its_memory(error, thresholds):
    X, y = stripes(12, 3)
    seen = Seen(thresholds, error)
    model = ImageClassifier(image_size=32, max_epochs=1, callbacks=[seen])
    if error is None:
        model.fit(X, y)
    else:
        with pytest.raises(ZeroDivisionError):
            model.fit(X, y)
    assert seen.during
    assert all(told == KEPT for told in seen.during)
    assert thresholds == KEPT | AFTERWARDS
