"""What is wanted of every row, in plain values; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sklearn_transfer.store.keys import KeyMaker


@dataclass(frozen=True)
class Request:
    """What is wanted of every row, in plain values that also make its key.

    ``stages`` are the taps that one pass stores, ``widths`` their features.
    """

    recipe: object
    fingerprint: str
    dtype: str
    pooling: str
    stages: tuple[int, ...]
    widths: tuple[int, ...]

    def keys(self, digests: Sequence[bytes | None]) -> list[bytes | None]:
        """The key of each row under this request; None where it has no digest."""
        maker = KeyMaker(
            recipe=self.recipe,
            fingerprint=self.fingerprint,
            dtype=self.dtype,
            boundary=f"taps {self.pooling} {self.stages}",
        )
        return [None if digest is None else maker.key(digest) for digest in digests]

    def prefix_keys(
        self, digests: Sequence[bytes | None], k: int
    ) -> list[bytes | None]:
        """The key of each row's activations after stage ``k``, as they are."""
        maker = KeyMaker(
            recipe=self.recipe,
            fingerprint=self.fingerprint,
            dtype=self.dtype,
            boundary=f"stage {k}",
        )
        return [None if digest is None else maker.key(digest) for digest in digests]

    def columns(self, wanted: Sequence[int]) -> np.ndarray:
        """Columns of a stored row that hold the wanted stages, in their order."""
        ends = np.cumsum(self.widths)
        spans = {
            stage: np.arange(end - width, end)
            for stage, width, end in zip(self.stages, self.widths, ends, strict=True)
        }
        return np.concatenate([spans[stage] for stage in wanted])
