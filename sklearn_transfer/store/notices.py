"""What a store is told by its user, and tells: each once a folder in a process."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from sklearn_transfer.exceptions import CacheWarning

# Budget in bytes of every store, in place of a tenth of the free space.
BYTES_VARIABLE = "SKLEARN_TRANSFER_CACHE_BYTES"


def bytes_from_environment(variable: str) -> int | None:
    """The number of bytes that an environment variable sets; None if it is unset.

    Raises
    ------
    ValueError
        If it is set to something else.
    """
    text = os.environ.get(variable, "").strip()
    if not text:
        return None
    if not text.isdecimal():
        raise ValueError(
            f"{variable}={text!r} is not a number of bytes. Set it to digits "
            f"alone, for example {variable}=2000000000 for 2 GB, or unset it."
        )
    return int(text)


# Folders that were warned about; a forked child does not repeat its parent.
_unusable: set[Path] = set()
_too_small: set[Path] = set()


def warn_unusable(folder: Path, error: Exception, stacklevel: int) -> None:
    """The folder fails; the store has turned itself off."""
    if folder in _unusable:
        return
    _unusable.add(folder)
    warnings.warn(
        f"The cache folder {folder} cannot be used ({error}). Nothing is "
        "stored from here on; results are the same, computed each time. Write "
        "cache=None to work without a cache, or name a folder with space that "
        "you may write to, such as cache='features'.",
        CacheWarning,
        stacklevel=stacklevel + 1,
    )


def warn_too_small(folder: Path, budget: int, age: float, stacklevel: int) -> None:
    """Rows used less than ``age`` seconds ago had to leave for the budget."""
    if folder in _too_small:
        return
    _too_small.add(folder)
    warnings.warn(
        f"The cache in {folder} is full: with a budget of {budget:,} bytes it drops "
        f"rows that were used less than {age / 60:.0f} minutes ago, and they are "
        "computed anew when they are asked for again. Set the environment variable "
        f"{BYTES_VARIABLE}={max(10 * budget, 10**9)} (bytes), or name a folder on a "
        "disk with more free space, such as cache='/data/features'.",
        CacheWarning,
        stacklevel=stacklevel + 1,
    )
