"""One tuning: a net is built, its head started, and every epoch watched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch

from sklearn_transfer.backbones.stages import StagedBackbone
from sklearn_transfer.training.examples import Examples
from sklearn_transfer.training.head import Head, fit_probe, fit_scaling
from sklearn_transfer.training.lora import add_lora, lora_state
from sklearn_transfer.training.net import TunedNet
from sklearn_transfer.training.network import TunedNetwork
from sklearn_transfer.training.recipe import Losses, Recipe


@dataclass(frozen=True)
class Shape:
    """What a network is made of, in plain values: enough to build it anew.

    ``n_features`` enter the head and ``n_outputs`` leave it; the first ``k`` stages
    are not part of it.
    """

    k: int
    n_stages: int
    n_features: int
    n_outputs: int
    pooling: str
    normalize: bool
    head: str | int = "linear"
    dropout: float = 0.0
    lora_rank: int = 0
    fixed_norms: bool = True


def build_network(backbone: StagedBackbone | None, shape: Shape) -> TunedNetwork:
    """The tail of a backbone with a new head; a backbone is not needed for k = N.

    Draws from torch's random state.
    """
    head = Head(
        shape.n_features, shape.n_outputs, kind=shape.head, dropout=shape.dropout
    )
    body = None
    if shape.k < shape.n_stages:
        body = cast(StagedBackbone, backbone).tail(shape.k)
    network = TunedNetwork(
        body, shape.k, head, shape.pooling, shape.normalize, shape.fixed_norms
    )
    if shape.lora_rank and body is not None:
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        add_lora(network.trained_stages, shape.lora_rank, generator)
        network.adapters = lora_state(network)
    return network


def make_net(
    network: TunedNetwork,
    losses: Losses,
    recipe: Recipe,
    *,
    batch_size: int,
    device: torch.device,
    precision: str,
    seed: int = 0,
    callbacks=None,
) -> TunedNet:
    """A skorch net around the network, on its device, ready to train or predict."""
    # As the activations are: else every pass would turn the weights around.
    network = network.to(device=device, memory_format=torch.channels_last)
    net = TunedNet(
        network,
        losses,
        recipe=recipe,
        precision=precision,
        generator=torch.Generator().manual_seed(seed),
        batch_size=batch_size,
        lr=recipe.lr,
        callbacks=callbacks,
        device=str(device),
    )
    return net.initialize()


def start_head(head: Head, features, targets, weights, *, task, common, init) -> None:
    """Centre and scale of the features; for "probe" also its linear map."""
    if init == "probe":
        # The folds of its inner cross-validation are always the same: equal rows
        # then share one probe, whatever the seed of the training is.
        probe = fit_probe(
            features,
            targets,
            weights,
            task=task,
            n_out=head.linear.out_features,
            common=common,
            seed=0,
        )
        head.load_probe(probe)
    else:
        head.load_scaling(*fit_scaling(features, weights, common))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Ready to train: gradients on, random state seeded; as it was afterwards."""
    devices = [device] if device.type == "cuda" else []
    with (
        # The user may be inside torch.no_grad(), or an interrupt may have left it on.
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices=devices),
    ):
        torch.random.default_generator.manual_seed(seed)
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@dataclass
class Watch:
    """Notes what each epoch gave, keeps the best weights, and says when to stop.

    Parameters
    ----------
    net : TunedNet
    valid : Examples or None
        Validation rows, if there are any.
    score : callable or None
        Gives the score of the validation rows from their outputs; higher is better.
    by_loss : bool
        Whether the validation loss, and not the score, decides.
    patience : int or None
        Epochs without a better value after which to stop. None never stops, and
        keeps the last weights.
    tell : callable
        Called after each epoch with its record; True ends the training.
    """

    net: TunedNet
    valid: Examples | None
    score: Callable[[np.ndarray], float] | None
    by_loss: bool
    patience: int | None
    tell: Callable[[dict], bool]
    n_recomputed: int = 0
    records: list[dict] = field(default_factory=list)
    best: float = -math.inf
    best_epoch: int = 0
    best_weights: dict | None = None
    n_frozen: int = -1
    thawed: int = 0  # the epoch before stages were last unfrozen

    def begin(self) -> None:
        """Note the start, which an epoch has to better: a probe is a whole answer."""
        if self.valid is not None and self.patience is not None:
            self._compare(*self._judge(self.net.outputs(self.valid)), 0)

    def after_epoch(self, epoch: int) -> bool:
        seen = self.net.history[-1]
        groups = self.net.optimizer_.param_groups
        loss = score = math.nan
        if self.valid is not None:
            loss, score = self._judge(self.net.valid_outputs_)
        record = {
            "epoch": epoch,
            "train_loss": float(seen["train_loss"]),
            "valid_loss": loss,
            "valid_score": score,
            "lr": max((float(group["lr"]) for group in groups[:-2]), default=0.0),
            "head_lr": float(groups[-1]["lr"]),
            "frozen_stages": self.net.module_.n_frozen,
            "recomputed_rows": self.n_recomputed,
            "seconds": float(seen["seconds"]),
        }
        self.records.append(record)
        wants_to_stop = self.tell(record)
        if self.patience is None:
            return wants_to_stop
        self._compare(loss, score, epoch)
        # Epochs of the head alone can hardly better the probe: patience counts from
        # when stages began to learn, and ends when none waits any more.
        module = self.net.module_
        if module.n_frozen != self.n_frozen:
            self.n_frozen, self.thawed = module.n_frozen, epoch - 1
        since = epoch - max(self.best_epoch, self.thawed)
        return wants_to_stop or (module.n_frozen == module.k and since >= self.patience)

    def _judge(self, outputs) -> tuple[float, float]:
        """Loss and score of the validation rows."""
        assert self.valid is not None and self.score is not None
        return self.net.loss_of(outputs, self.valid), self.score(outputs.numpy())

    def _compare(self, loss: float, score: float, epoch: int) -> None:
        value = -loss if self.by_loss else score
        # Anything is better than not a number.
        if value > self.best or self.best_weights is None or math.isnan(self.best):
            self.best, self.best_epoch = value, epoch
            self.best_weights = {
                name: tensor.detach().clone()
                for name, tensor in self.net.module_.learned().items()
            }

    def end(self) -> None:
        """Put the best weights back, where there was something to judge by."""
        if self.best_weights is not None:
            self.net.module_.load_learned(self.best_weights)
        elif self.records:
            self.best_epoch = len(self.records)


def as_arrays(network: TunedNetwork) -> dict[str, np.ndarray]:
    """What was learned, as numpy arrays: they load where there is no GPU."""
    arrays = {}
    for name, tensor in network.learned().items():
        # A copy: what is trained on afterwards must not change what was kept.
        arrays[name] = tensor.detach().cpu().numpy().copy()
    return arrays


def from_arrays(
    network: TunedNetwork, arrays: dict[str, np.ndarray], *, may_miss: bool = False
) -> None:
    """Load what `as_arrays` gave."""
    learned = {name: torch.tensor(array) for name, array in arrays.items()}
    network.load_learned(learned, may_miss=may_miss)
