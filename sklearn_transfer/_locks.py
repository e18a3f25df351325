"""A lock that survives a fork."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ForkSafeLock:
    """A reentrant lock that is free in a forked child.

    Another thread may hold it while the process forks, and does not exist in the
    child to release it. For locks that live as long as the process.
    """

    def __init__(self):
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock inside; whoever forks inside releases the one it took."""
        with self._lock:
            yield
