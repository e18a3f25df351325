"""Out of memory, told apart from other errors, and smaller batches after it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a batch failed for want of memory, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    # The CPU allocator and oneDNN raise a plain RuntimeError.
    return isinstance(error, RuntimeError) and any(
        sign in text
        for sign in ("DefaultCPUAllocator", "can't allocate memory", "out of memory")
    )


class ShrinkingBatches:
    """Run batches, halving them once memory is short and staying there.

    Parameters
    ----------
    run : callable
        Takes a batch (Tensor or NamedTuple of Tensors), gives an array (n, d).
    """

    def __init__(self, run: Callable[[object], np.ndarray]):
        self.run = run
        self.size: int | None = None  # samples at once; None is a whole batch

    def __call__(self, inputs) -> np.ndarray:
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
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

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


def _length(inputs) -> int:
    return len(inputs) if isinstance(inputs, torch.Tensor) else len(inputs[0])


def _slice(inputs, start: int, stop: int):
    if isinstance(inputs, torch.Tensor):
        return inputs[start:stop]
    return type(inputs)(*(t[start:stop] for t in inputs))


def _shape(inputs) -> tuple[int, ...]:
    tensor = inputs if isinstance(inputs, torch.Tensor) else inputs[0]
    return tuple(tensor.shape[1:])
