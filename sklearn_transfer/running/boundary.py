"""Activations at one boundary: as the network takes them, and as they are stored."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sklearn_transfer.backbones.stages import StagedBackbone, Tokens


class Boundary:
    """What lies after stage ``k`` of a network that runs on ``device`` in ``dtype``.

    A stored row is what the network's memory holds of it, so that nothing is
    turned around on the way: of maps (n, c, h, w), which are channels_last there,
    it is (h, w, c); of texts (length, d), without padding; else as it is. bfloat16,
    which numpy does not have, is stored as its bits, uint16.
    """

    def __init__(self, net: StagedBackbone, k: int, device, dtype: torch.dtype):
        self.net, self.device, self.dtype = net, device, dtype
        self.is_map = net.layouts[k - 1] == "nchw"
        self.is_text = hasattr(net, "collate")

    def stored_form(self, h: Tensor | Tokens) -> Tensor:
        """Rows side by side, (n, ...); texts still padded, (n, t, d)."""
        h = h.hidden if isinstance(h, Tokens) else h
        # (n, c, h, w) in channels_last is (n, h, w, c) in memory: a view.
        return (h.permute(0, 2, 3, 1) if self.is_map else h).contiguous()

    def network_form(self, rows: Tensor, lengths: Sequence[int]) -> Tensor | Tokens:
        """What the next stage takes; ``lengths`` matter for texts alone."""
        if self.is_text:
            mask = self.mask_of(lengths).to(self.device, non_blocking=True)
            return Tokens(rows, mask)
        return rows.permute(0, 3, 1, 2) if self.is_map else rows

    def mask_of(self, lengths: Sequence[int]) -> Tensor:
        """(n, t) int64 for texts of so many tokens, as wide as the network pads."""
        ids = [np.zeros(length, np.int32) for length in lengths]
        return self.net.collate(ids).attention_mask

    def rows_of(self, h: Tensor | Tokens) -> list[np.ndarray]:
        """Each row as it is stored."""
        rows = self.stored_form(h).cpu()
        bits = rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows
        if not isinstance(h, Tokens):
            return list(bits.numpy())
        lengths = h.mask.sum(1).tolist()
        return [row[:n] for row, n in zip(bits.numpy(), lengths, strict=True)]

    def batch_of(self, rows: Sequence[np.ndarray]) -> Tensor | Tokens:
        """What the next stage takes, on the device, from stored rows."""
        stacked = self.stacked(rows).to(self.device, non_blocking=True)
        return self.network_form(stacked, [len(row) for row in rows])

    def stacked(self, rows: Sequence[np.ndarray]) -> Tensor:
        """Stored rows side by side on the host, pinned where the device is a GPU.

        Always a copy, which a network may write into; stored rows are read-only.
        """
        shape = rows[0].shape
        if self.is_text:
            lengths = [len(row) for row in rows]
            shape = (self.mask_of(lengths).shape[1], *shape[1:])
        kept = torch.uint16 if self.dtype == torch.bfloat16 else self.dtype
        pinned = self.device.type == "cuda"
        out = torch.empty((len(rows), *shape), dtype=kept, pin_memory=pinned)
        for place, row in zip(out.numpy(), rows, strict=True):
            place[: len(row)] = row
            place[len(row) :] = 0  # behind a text's end
        return out.view(self.dtype)
