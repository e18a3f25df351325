"""Who computes a row: a process, and a call of it.

A lock file tells other processes that this one lives, but an interrupted call
leaves its claims behind in a process that lives on. So a claim may name its call
too, and within this process holds only as long as that call is under way.
"""

from __future__ import annotations

import os
import threading
from typing import TypeGuard

from sklearn_transfer.store.owners import Owners

# Calls under way by name: the thread that began each. A forked child inherits
# them, which does no harm: its claims bear another process's name.
_threads: dict[str, int] = {}


class Call:
    """One call that computes rows, under way from here to `end`."""

    def __init__(self):
        self.name = os.urandom(8).hex()
        # Before the first claim, so that an interrupt may come at any point.
        _threads[self.name] = threading.get_ident()

    def end(self) -> None:
        _threads.pop(self.name, None)


def claimant(owners: Owners, call: Call | None) -> str:
    """In whose name a claim is made: this process, and its call if it has one."""
    me = owners.me()
    return me if call is None else f"{me}/{call.name}"


def is_alive(name: object, owners: Owners) -> TypeGuard[str]:
    """Whether the process lives and, if it is this one, the call is under way."""
    if not isinstance(name, str):
        return False  # a garbled record
    process, _, call = name.partition("/")
    if call and owners.is_here(process):
        return call in _threads
    return owners.alive(process)


def bars(name: object, owners: Owners) -> bool:
    """Whether a claim in this name keeps the calling thread from computing.

    One by a call of its own thread does not: it would wait for itself, for ever.
    """
    if not is_alive(name, owners):
        return False
    return _threads.get(name.partition("/")[2]) != threading.get_ident()
