"""Freed memory that the C library keeps, or gives back."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

# Parameters of mallopt, as malloc.h numbers them.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
# No block from the kernel directly, and none back. Not a large MMAP_THRESHOLD, which
# glibc before 2.35 refuses above 32 MB.
KEPT = {MMAP_MAX: 0, TRIM_THRESHOLD: -1}
# glibc's own number of blocks, and the highest that its adjustment of the thresholds
# goes: setting one has switched that adjustment off for good.
AFTERWARDS = {MMAP_MAX: 65_536, MMAP_THRESHOLD: 2**25, TRIM_THRESHOLD: 2**26}


def is_set_by_user() -> bool:
    """Whether the environment says how malloc is to be."""
    names = ("MMAP_MAX_", "MMAP_THRESHOLD_", "TOP_PAD_", "TRIM_THRESHOLD_")
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return "glibc.malloc" in tunables or any("MALLOC_" + n in os.environ for n in names)


# Asked at import, as glibc asks at its start: whoever sets one later must not keep
# what was changed from being put back.
_is_left_alone = is_set_by_user()


class _User:
    """Who wants memory to be kept."""


# Weak: an interrupt before it is discarded then leaves nobody behind, as it would
# leave a lock taken. Two threads may cross here; one then trains without, at worst.
_keeping: weakref.WeakSet[_User] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keeping.clear)


@contextmanager
def memory_kept() -> Iterator[None]:
    """Inside, memory that is freed stays for who asks next.

    glibc gives large blocks back to the kernel as soon as they are free, and each
    step of a training, which frees all activations, would begin with new pages.
    A step of resnet18 at 160 pixels takes 390 ms so, and 305 here. The setting is
    the process's; outside the main thread blocks above 64 MB come and go as ever.
    Nothing happens with other C libraries.
    """
    user = _User()
    try:
        _keeping.add(user)
        _set(KEPT)
        yield
    finally:
        _keeping.discard(user)
        if not _keeping:
            _set(AFTERWARDS)
            give_memory_back()


def _set(values: dict[int, int]) -> None:
    if _is_left_alone:
        return
    for parameter, value in values.items():
        _call("mallopt", parameter, value)


def give_memory_back() -> None:
    """Let go of what glibc keeps of freed memory, for each thread its own."""
    _call("malloc_trim", 0)


def _call(name: str, *args: int) -> None:
    try:
        getattr(ctypes.CDLL(None), name)(*args)
    except (AttributeError, OSError, TypeError):
        pass  # another C library, or Windows
