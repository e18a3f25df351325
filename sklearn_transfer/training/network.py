"""The trained part of a network: the backbone's tail and the head on it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sklearn_transfer.backbones.stages import StagedBackbone, Tokens
from sklearn_transfer.backbones.tokenize import TokenIds
from sklearn_transfer.training.head import Head
from sklearn_transfer.training.recipe import mixed, own_parameters


class TunedNetwork(nn.Module):
    """Activations after stage ``k`` to outputs (n, m), in float32.

    Parameters
    ----------
    body : StagedBackbone or None
        From ``backbone.tail(k)``. None where every stage is frozen: the network is
        then the head, on vectors.
    k : int
        Stages that it lacks.
    head : Head
    pooling : str
        How the last stage's activations become the vector, as for a featurizer.
    normalize : bool
        Whether the vector is scaled to length one.
    fixed_norms : bool
        Whether BatchNorm keeps its pretrained statistics, of trained stages too.
    """

    def __init__(
        self,
        body: StagedBackbone | None,
        k: int,
        head: Head,
        pooling: str,
        normalize: bool,
        fixed_norms: bool = True,
    ):
        super().__init__()
        self.body, self.head = body, head
        self.k, self.pooling, self.normalize = k, pooling, normalize
        self.n_frozen, self.fixed_norms = k, fixed_norms
        # Names of what trains inside the stages, where not all of it does.
        self.adapters: set[str] | None = None
        self.register_state_dict_post_hook(_contiguous)

    def forward(self, h, others=None, share: float = 1.0) -> Tensor:
        return self.head(self.vector(h, others, share))

    def vector(self, h, others=None, share: float = 1.0) -> Tensor:
        """The vectors (n, d) that enter the head, in float32.

        Where there are ``others``, each row is mixed with the one beside it there.
        """
        done = self.k
        if others is not None:
            # Numbers of words have no mean.
            if self.body is not None and isinstance(h, TokenIds):
                h, others = (self.body.run(ids, 0, 1) for ids in (h, others))
                done = 1
            h = mixed(h, others, share)
        if self.body is None:
            return h.float()
        h = self.body.run(h, done, self.body.n_stages)
        vector = self.body.tap(h, self.body.n_stages, self.pooling)
        return nn.functional.normalize(vector, dim=1) if self.normalize else vector

    @property
    def trained_stages(self) -> list[nn.Module]:
        """The stages that this network holds, first to last."""
        return [] if self.body is None else list(self.body.stages[self.k :])

    def freeze(self, n: int) -> None:
        """Let only the stages after the first ``n`` learn, and the head."""
        if not hasattr(self, "_learning"):
            # What asks for a gradient at first: adapters alone, where there are any.
            self._learning = own_parameters(self.trained_stages)
        self.n_frozen = n
        for number, parameters in enumerate(self._learning, self.k + 1):
            for parameter in parameters:
                parameter.requires_grad_(number > n)
        self.train(self.training)

    def train(self, mode: bool = True) -> TunedNetwork:
        """Training mode for what learns; frozen stages are always in eval mode."""
        super().train(mode)
        for stage in self.trained_stages[: self.n_frozen - self.k]:
            stage.eval()
        if self.fixed_norms or self.adapters is not None:
            # Statistics of a small batch are not those that the head was fitted to,
            # and running ones lag behind for hundreds of steps.
            for norm in self.batch_norms():
                norm.eval()
        return self

    def learned(self) -> dict[str, Tensor]:
        """What training changed, by name: all there is to keep of this network."""
        return {
            name: tensor
            for name, tensor in self.state_dict().items()
            if self._is_learned(name)
        }

    def _is_learned(self, name: str) -> bool:
        if name.startswith("head."):
            return True
        if not name.startswith("body.stages."):
            return False
        if int(name.split(".")[2]) < self.k:
            return False
        return self.adapters is None or name in self.adapters

    def load_learned(self, learned: dict[str, Tensor], *, may_miss=False) -> None:
        """Take over what ``learned`` gave, of this network or of its end."""
        missing, unexpected = self.load_state_dict(learned, strict=False)
        lost = [name for name in missing if self._is_learned(name) and not may_miss]
        if lost or unexpected:
            raise ValueError(f"missing {lost}, unexpected {list(unexpected)}")

    def batch_norms(self) -> Iterator[nn.Module]:
        """The norms in it that count over a batch while they train."""
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                yield module


def _contiguous(module, state: dict, prefix, local_metadata) -> None:
    """A state dict as safetensors and others take it; weights lie as it is fastest."""
    for name, value in state.items():
        if isinstance(value, Tensor):
            state[name] = value.contiguous()


def length(h: Tensor | Tokens | TokenIds) -> int:
    """Rows of a batch."""
    return len(h) if isinstance(h, Tensor) else len(h[0])


def rows_of(h: Tensor | Tokens | TokenIds, part) -> Tensor | Tokens | TokenIds:
    """Some rows of a batch; ``part`` is a slice or row numbers."""
    if isinstance(h, Tensor):
        return h[part]
    return type(h)(*(tensor[part] for tensor in h))


def on_device(h, device: torch.device):
    if isinstance(h, Tensor):
        return h.to(device, non_blocking=True)
    return type(h)(*(tensor.to(device, non_blocking=True) for tensor in h))
