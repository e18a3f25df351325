"""Out of memory, told apart from other errors, and smaller batches after it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np
import torch

T = TypeVar("T")

SIGNS = (
    "DefaultCPUAllocator",
    "can't allocate memory",
    "out of memory",
    "could not create a primitive",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a batch failed for want of memory, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    # The CPU allocator and oneDNN raise a plain RuntimeError.
    # "... primitive descriptor" is what oneDNN cannot do, however small.
    signs = SIGNS[:-1] if "primitive descriptor" in text else SIGNS
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


class ShrinkingBatches(Generic[T]):
    """Run batches, halving them once memory is short and staying there.

    Parameters
    ----------
    run : callable
        Takes a batch (Tensor, list of rows or NamedTuple of Tensors), gives an
        array or tensor (n, ...), or a list of n rows.
    size : int or None
        Samples at once to begin with; None is a whole batch.
    """

    def __init__(self, run: Callable[[Any], T], size: int | None = None):
        self.run, self.size = run, size

    def __call__(self, inputs) -> T:
        """The result for all of ``inputs``, whatever batches it took.

        Raises
        ------
        MemoryError
            If one sample alone does not fit; the message names its size.
        """
        n = _length(inputs)
        parts, start = [], 0
        while start < n:
            stop = n if self.size is None else min(start + self.size, n)
            try:
                parts.append(self.run(_slice(inputs, start, stop)))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._shrink(stop - start, inputs, error)
                continue
            start = stop
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _shrink(self, tried: int, inputs, error: BaseException) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if tried == 1:
            raise MemoryError(
                f"One sample of shape {_shape(inputs)} does not fit in memory. Use "
                "a smaller image_size or max_length, a smaller backbone, or "
                "device='cpu'."
            ) from error
        self.size = max(1, tried // 2)


def _joined(parts: list):
    if isinstance(parts[0], list):
        return list(itertools.chain(*parts))
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts)
    return np.concatenate(parts)


def _length(inputs) -> int:
    return len(inputs[0]) if isinstance(inputs, tuple) else len(inputs)


def _slice(inputs, start: int, stop: int):
    if isinstance(inputs, tuple):
        return type(inputs)(*(t[start:stop] for t in inputs))
    return inputs[start:stop]


def _shape(inputs) -> tuple[int, ...]:
    """Of one sample; of texts, tokens."""
    return tuple((inputs[0] if isinstance(inputs, tuple) else inputs)[0].shape)
