"""The whole tuned network as one plain module."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from sklearn_transfer.backbones.stages import StagedBackbone
from sklearn_transfer.backbones.tokenize import TokenIds
from sklearn_transfer.training.lora import merge_lora
from sklearn_transfer.training.network import TunedNetwork


class WholeNetwork(nn.Module):
    """From inputs to outputs, float32, in eval mode, without adapters.

    Parameters
    ----------
    backbone : StagedBackbone
        Whose first stages the tuning left as they are.
    network : TunedNetwork
    mean, spread : array-like of shape (n_outputs,)
        What an output is multiplied with and shifted by: a regressor's units.
    """

    def __init__(self, backbone: StagedBackbone, network: TunedNetwork, mean, spread):
        super().__init__()
        self.backbone = copy.deepcopy(backbone)
        self.head = copy.deepcopy(network.head)
        self.pooling, self.normalize = network.pooling, network.normalize
        if network.body is not None:
            tail = copy.deepcopy(network.body)
            merge_lora(tail)
            for stage, tuned in zip(
                self.backbone.stages[network.k :], tail.stages[network.k :], strict=True
            ):
                stage.load_state_dict(tuned.state_dict())
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("spread", torch.tensor(spread, dtype=torch.float32))
        self.to("cpu").float().eval().requires_grad_(False)

    def outputs(self, x) -> Tensor:
        n = self.backbone.n_stages
        vector = self.backbone.tap(self.backbone.run(x, 0, n), n, self.pooling)
        if self.normalize:
            vector = nn.functional.normalize(vector, dim=1)
        return self.head(vector) * self.spread + self.mean


class WholeImageNetwork(WholeNetwork):
    """Takes images (n, 3, h, w), float in [0, 1], of the backbone's size."""

    def __init__(self, backbone, network, mean, spread):
        super().__init__(backbone, network, mean, spread)
        recipe = backbone.recipe
        channels = {"pixel_mean": recipe.mean, "pixel_std": recipe.std}
        for name, values in channels.items():
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1).float())

    def forward(self, images: Tensor) -> Tensor:
        return self.outputs((images - self.pixel_mean) / self.pixel_std)


class WholeTextNetwork(WholeNetwork):
    """Takes token ids and attention mask, (n, t) int64 each."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.outputs(TokenIds(input_ids, attention_mask))


def whole_network(backbone, network, mean, spread) -> WholeNetwork:
    """The whole network of the backbone's own modality."""
    is_text = hasattr(backbone, "tokenize")
    kind = WholeTextNetwork if is_text else WholeImageNetwork
    return kind(backbone, network, mean, spread)
