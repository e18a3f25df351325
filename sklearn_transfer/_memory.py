"""Freed memory that the C library keeps, or gives back."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # as malloc.h numbers them
MOST = 2**31 - 1
# Where glibc's own adjustment of the two ends; it cannot be switched on again.
USUAL = {MMAP_THRESHOLD: 2**25, TRIM_THRESHOLD: 2**26}

_keeping: set[object] = set()  # a lock here could be left taken by an interrupt


@contextmanager
def memory_kept() -> Iterator[None]:
    """Inside, memory that is freed stays for who asks next, in the whole process.

    glibc gives large blocks back to the kernel as soon as they are free, and each
    step of a training, which frees all activations, would begin with new pages.
    A step of resnet18 at 160 pixels took 390 ms so, and takes 305. Nothing happens
    with other C libraries, or where the environment says how malloc is to be.
    """
    one = object()
    try:
        _keeping.add(one)
        _set_thresholds({MMAP_THRESHOLD: MOST, TRIM_THRESHOLD: MOST})
        yield
    finally:
        _keeping.discard(one)
        if not _keeping:
            _set_thresholds(USUAL)


def _set_thresholds(values: dict[int, int]) -> None:
    """Of bytes above which glibc asks the kernel for a block, or gives back."""
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    for which, value in values.items():
        _call("mallopt", which, value)


def give_memory_back() -> None:
    """Let go of what glibc keeps of freed memory, for each thread its own."""
    _call("malloc_trim", 0)


def _call(name: str, *args: int) -> None:
    try:
        getattr(ctypes.CDLL(None), name)(*args)
    except (AttributeError, OSError, TypeError):
        pass  # another C library, or Windows
