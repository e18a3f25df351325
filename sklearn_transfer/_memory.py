"""Freed memory that the C library keeps."""

from __future__ import annotations

import ctypes


def give_memory_back() -> None:
    """Let go of what glibc keeps of freed memory, for each thread its own."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass  # another C library, or Windows
