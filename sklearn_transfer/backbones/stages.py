"""The one idea: a backbone is an ordered list of named stages.

until(x, k)   activations after the first k stages; until(x, N) is the vector
after(h, k)   the vector, from activations after stage k
taps(x, ...)  every stage's activations, pooled, in one forward pass
fingerprint   sha256 of weights + architecture
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

Layout = Literal["nchw", "nhwc", "tokens", "vector"]


class Tokens(NamedTuple):
    """Hidden states of a batch of texts, padded on the right.

    ``hidden`` is (n, t, d); ``mask`` is (n, t), 1 where there is a token.
    """

    hidden: Tensor
    mask: Tensor


def pool(h: Tensor | Tokens, how: str, layout: Layout, n_prefix: int = 0) -> Tensor:
    """Reduce activations to one float32 vector a sample, (n, d).

    Parameters
    ----------
    h : Tensor or Tokens
        Activations after a stage.
    how : {"avg", "max", "cls", "last", "flatten"}
        "cls" and "last" take one token; "avg" and "max" run over space, or over
        the unmasked tokens.
    layout : {"nchw", "nhwc", "tokens", "vector"}
        What the dimensions of ``h`` mean. A vector is returned as it is.
    n_prefix : int
        Tokens at the front that stand for no place in the image (class token,
        registers); "avg", "max" and "flatten" leave them out.

    Raises
    ------
    ValueError
        If the pooling makes no sense for the layout.
    """
    if isinstance(h, Tokens):
        return _pool_texts(h, how)
    if layout == "vector":
        return h.float()
    if layout == "tokens":
        if how == "cls" and n_prefix:
            return h[:, 0].float()
        places = h[:, n_prefix:]  # (n, t, d)
        if how == "avg":
            return places.float().mean(1)
    else:
        maps = h.permute(0, 3, 1, 2) if layout == "nhwc" else h  # (n, c, h, w)
        if how == "avg":
            # In float32: a bf16 sum over 12,544 places loses the third digit.
            return maps.mean((2, 3), dtype=torch.float32)
        places = maps.flatten(2).transpose(1, 2)  # (n, h*w, c)
    if how == "max":
        return places.amax(1).float()
    if how == "flatten":
        # Channel-major, as torch.flatten of an (n, c, h, w) map gives.
        return places.transpose(1, 2).flatten(1).float()
    raise ValueError(
        f"pooling={how!r} needs tokens, and this stage gives a feature map. "
        "Write pooling='avg', 'max' or 'flatten'."
    )


def _pool_texts(h: Tokens, how: str) -> Tensor:
    hidden, mask = h.hidden, h.mask.bool()  # (n, t, d), (n, t)
    if how == "cls":
        return hidden[:, 0].float()
    if how == "last":
        last = mask.sum(1).sub(1).clamp(min=0)
        return hidden[torch.arange(hidden.shape[0]), last].float()
    if how == "avg":
        weights = mask.unsqueeze(2).float()
        total = (hidden.float() * weights).sum(1)
        return total / weights.sum(1).clamp(min=1)
    if how == "max":
        return hidden.float().masked_fill(~mask.unsqueeze(2), -torch.inf).amax(1)
    raise ValueError(
        "pooling='flatten' is not defined for texts, whose lengths differ. "
        "Write pooling='avg', 'max', 'cls' or 'last'."
    )


class StagedBackbone(nn.Module):
    """An ordered list of named stages, ending in one vector per sample.

    Parameters
    ----------
    stages : mapping of str to Module
        In order. Each takes what the one before gives; together they hold every
        parameter of the body. The head is no stage.
    readout : Module
        Parameter-free: what the last stage gives, to the vector that enters the
        network's own last Linear.
    layouts : sequence of {"nchw", "nhwc", "tokens", "vector"}
        Layout after each stage.
    recipe : ImageRecipe or TextRecipe
        How a sample becomes the network's input.
    name : str
        Architecture, as it enters the fingerprint.
    n_prefix : int
        Tokens that stand for no place, in stages of layout "tokens".

    Attributes
    ----------
    stage_names : tuple of str
    n_stages : int
    """

    def __init__(
        self,
        stages: Mapping[str, nn.Module],
        readout: nn.Module,
        *,
        layouts: Sequence[Layout],
        recipe: Any,
        name: str,
        n_prefix: int = 0,
    ):
        super().__init__()
        # Module names may not hold dots ("layer.0"), so the names stand apart.
        self.stage_names = tuple(stages)
        self.stages = nn.ModuleList(stages.values())
        self.readout = readout
        self.layouts = tuple(layouts)
        self.recipe = recipe
        self.name = name
        self.n_prefix = n_prefix
        if len(self.layouts) != len(self.stages):
            raise ValueError(f"{len(self.stages)} stages, {len(self.layouts)} layouts")
        self.eval()

    @property
    def n_stages(self) -> int:
        return len(self.stages)

    def example(self):
        """The input of one made-up sample, to measure by; always the same."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(1, 3, *self.recipe.crop, generator=generator)

    def prepare(self, batch, device: torch.device, dtype: torch.dtype):
        """What the first stage takes, on ``device``, from pixels (n, h, w, 3) uint8."""
        n, height, width, _ = batch.shape
        mean = torch.tensor(self.recipe.mean, device=device).repeat(width)
        std = torch.tensor(self.recipe.std, device=device).repeat(width)
        # (x / 255 - mean) / std as one multiply-add over whole rows of pixels:
        # broadcasting along an axis of 3 is 5 times slower. In float32, because
        # bf16 would round the shift before the network sees it.
        rows = batch.to(device, non_blocking=True).view(n, height, width * 3)
        x = torch.addcmul(-mean / std, rows, 1 / (255 * std)).to(dtype)
        # Permuting (n, h, w, 3) gives a channels_last view; nothing is copied.
        return x.view(n, height, width, 3).permute(0, 3, 1, 2)

    def run(self, h, start: int, stop: int):
        """Activations after stage ``stop``, from those after stage ``start``."""
        for stage in self.stages[start:stop]:
            h = stage(h)
        return h

    def until(self, x, k: int):
        """Activations after the first ``k`` stages; for k = N, the vector."""
        h = self.run(x, 0, k)
        return self.readout(h) if k == self.n_stages else h

    def after(self, h, k: int):
        """The vector, from activations after stage ``k`` (k < N)."""
        return self.readout(self.run(h, k, self.n_stages))

    def tail(self, k: int) -> StagedBackbone:
        """A copy to train from activations after stage ``k``; no tensor is shared.

        Its first ``k`` stages are left out and its parameters are those of the
        others. One that a stage left out uses too belongs to that stage: it stays
        in the copy and asks for no gradient.
        """
        # All of it, then less: copied stage by stage, what stages share would not
        # be shared any more.
        twin = copy.deepcopy(self)
        frozen = {id(p) for stage in twin.stages[:k] for p in stage.parameters()}
        for parameter in twin.parameters():
            parameter.requires_grad_(id(parameter) not in frozen)
        for i in range(k):
            twin.stages[i] = twin._left_of(i)
        return twin

    def _left_of(self, stage: int) -> nn.Module:
        """What later stages need of one that is left out."""
        return nn.Identity()

    def forward(self, x):
        return self.until(x, self.n_stages)

    def taps(self, x, pooling: str, wanted: Sequence[int]) -> list[Tensor]:
        """Pooled activations after each wanted stage, one forward pass, (n, d_k).

        ``pooling="auto"`` gives the network's own vector after the last stage
        and the mean over places or tokens after the others.
        """
        out = {}
        h, done = x, 0
        for k in sorted(set(wanted)):
            h, done = self.run(h, done, k), k
            out[k] = self.tap(h, k, pooling)
        return [out[k] for k in wanted]

    def tap(self, h, k: int, pooling: str) -> Tensor:
        """Activations after stage ``k``, pooled to (n, d) float32."""
        if pooling == "auto":
            if k == self.n_stages:
                return self.readout(h).float()
            pooling = "avg"
        return pool(h, pooling, self.layouts[k - 1], self.n_prefix)

    def fingerprint(self) -> str:
        """Sha256, in hexadecimal, of architecture, stages and every tensor."""
        digest = hashlib.sha256(repr((self.name, self.stage_names)).encode())
        for key, tensor in self.state_dict().items():
            if key.endswith("num_batches_tracked"):
                continue  # a counter of training steps; inference never reads it
            digest.update(f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
            flat = tensor.detach().cpu().contiguous().view(-1)
            digest.update(np.ascontiguousarray(flat.view(torch.uint8).numpy()).data)
        return digest.hexdigest()
