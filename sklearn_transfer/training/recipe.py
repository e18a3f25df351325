"""The recipe of a fine-tuning: rates, decay, schedule, average, pull, mixing.

Every part has a neutral value that means exactly "off".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sklearn_transfer.backbones.stages import Tokens

SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "sgd")
MOMENTUM = 0.9  # of "sgd"


@dataclass(frozen=True)
class Recipe:
    """How the tail and the head are trained; parameters as the estimators' own."""

    lr: float
    head_lr: float
    layer_decay: float = 1.0
    unfreeze_every: int | None = None
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    l2_sp: float = 0.0
    mixup: float = 0.0
    warmup: float = 0.0
    schedule: str = "constant"
    clip_norm: float | None = None
    ema: float = 0.0


def parameter_groups(
    stages: Sequence[nn.Module], head: nn.Module, recipe: Recipe
) -> list[dict]:
    """Optimizer groups: two for each stage with something to train, and the head's.

    The last stage learns at ``lr``, each one before at ``layer_decay`` times the
    rate after it (Howard and Ruder, ULMFiT, 2018, arXiv:1801.06146). Norms and
    biases, which are vectors, are not decayed.
    """
    rates = [recipe.lr * recipe.layer_decay**d for d in range(len(stages))][::-1]
    owned = own_parameters([*stages, head])
    groups = []
    for parameters, rate in zip(owned, [*rates, recipe.head_lr], strict=True):
        groups += _decayed_and_not(parameters, rate, recipe.weight_decay)
    return groups


def own_parameters(modules: Sequence[nn.Module]) -> list[list[nn.Parameter]]:
    """Trainable parameters of each; what several use belongs to the first."""
    seen: set[int] = set()
    owned = []
    for module in modules:
        own = [p for p in module.parameters() if p.requires_grad and id(p) not in seen]
        seen |= {id(p) for p in own}
        owned.append(own)
    return owned


def _decayed_and_not(trained: list[nn.Parameter], rate: float, weight_decay: float):
    matrices = [p for p in trained if p.ndim > 1]
    vectors = [p for p in trained if p.ndim <= 1]
    for parameters, decay in ((matrices, weight_decay), (vectors, 0.0)):
        if parameters:
            yield {
                "params": parameters,
                "lr": rate,
                "initial_lr": rate,
                "weight_decay": decay,
            }


def make_optimizer(groups: list[dict], recipe: Recipe, device: torch.device):
    """The torch optimizer that the recipe names."""
    # One pass over the memory instead of five; a text model's embeddings are half
    # of its parameters, and their update took as long as a small batch.
    fused = device.type in ("cpu", "cuda")
    if recipe.optimizer == "adamw":
        return FlatAdamW(groups, fused=fused)
    return torch.optim.SGD(groups, momentum=MOMENTUM, fused=fused)


class FlatAdamW(torch.optim.AdamW):
    """torch's AdamW, as fast on convolutions that are channels_last.

    Its kernel for a CPU takes three times as long on tensors that are not contiguous
    (15.6 ms for four of 512 x 512 x 3 x 3, and 5.5), though it treats every number
    alike. So it gets the same memory in the order in which it lies.
    """

    def _init_group(self, group, *lists):
        has_complex = super()._init_group(group, *lists)
        weights, gradients, *moments, _ = lists
        for i, weight in enumerate(weights):
            if not _lie_alike(gradients[i], weight):
                # Set by somebody's callback; the kernel would pair wrong numbers.
                gradients[i] = torch.empty_like(weight).copy_(gradients[i])
            if _is_channels_last(weight):
                for tensors in (weights, gradients, *filter(None, moments)):
                    tensors[i] = tensors[i].permute(0, 2, 3, 1)
        return has_complex


def _lie_alike(a: Tensor, b: Tensor) -> bool:
    # Where a dimension is 1 its stride says nothing.
    return a.stride() == b.stride() or (a.is_contiguous() and b.is_contiguous())


def _is_channels_last(weight: Tensor) -> bool:
    """Whether it is so, and not contiguous as well."""
    return (
        weight.dim() == 4
        and not weight.is_contiguous()
        and weight.is_contiguous(memory_format=torch.channels_last)
    )


def multiplier(step: int, n_steps: int, recipe: Recipe) -> float:
    """What every rate is multiplied with at ``step``, counted from 0.

    A straight line up over the first ``warmup`` share of the steps, then constant,
    or down to zero along a line or a half cosine (Loshchilov and Hutter, SGDR,
    2017, arXiv:1608.03983).
    """
    n_warmup = math.ceil(recipe.warmup * n_steps)
    if step < n_warmup:
        return (step + 1) / (n_warmup + 1)
    if recipe.schedule == "constant":
        return 1.0
    done = (step - n_warmup) / max(n_steps - n_warmup, 1)
    if recipe.schedule == "linear":
        return 1.0 - done
    return 0.5 * (1.0 + math.cos(math.pi * done))


class Pull:
    """L2-SP: a pull of the trained weights towards where they began.

    Adds the gradient of ``strength / 2 * ||w - w0||**2`` (Li, Grandvalet and
    Davoine, 2018, arXiv:1802.01483). The head began nowhere in particular and
    is not pulled.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], strength: float):
        self.strength = strength
        wanted = parameters if strength else ()
        self.pairs = [(p, p.detach().clone()) for p in wanted if p.requires_grad]

    @torch.no_grad()
    def add_to_gradients(self) -> None:
        for parameter, start in self.pairs:
            if parameter.grad is not None:
                parameter.grad.add_(parameter - start, alpha=self.strength)


class Average:
    """Exponential moving average of the trained weights (Polyak averaging).

    Early on the average is over fewer steps, as its plain form would keep the
    starting point for ``1 / (1 - decay)`` steps.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float):
        self.decay, self.n_steps = decay, 0
        wanted = parameters if decay else ()
        self.pairs = [(p, p.detach().clone()) for p in wanted if p.requires_grad]
        self.is_in_place = False

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew from the weights as they are."""
        self.n_steps, self.is_in_place = 0, False
        for parameter, mean in self.pairs:
            mean.copy_(parameter)

    @torch.no_grad()
    def update(self) -> None:
        self.n_steps += 1
        decay = min(self.decay, self.n_steps / (self.n_steps + 9))
        for parameter, mean in self.pairs:
            mean.lerp_(parameter, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The averaged weights inside, the trained ones again afterwards."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the trained weights and their average."""
        self.is_in_place = not self.is_in_place
        for parameter, mean in self.pairs:
            trained = parameter.detach().clone()
            parameter.copy_(mean)
            mean.copy_(trained)


@dataclass(frozen=True)
class Mix:
    """Each row mixed with another one of its batch (Zhang et al., mixup, 2018,
    arXiv:1710.09412): ``share`` of itself, the rest of row ``partner``."""

    share: float
    partner: Tensor

    @classmethod
    def draw(cls, n: int, alpha: float, generator: torch.Generator) -> Mix | None:
        """A mix of ``n`` rows with a Beta(alpha, alpha) share; None if alpha is 0."""
        if not alpha:
            return None
        # Two Gammas make a Beta; torch's Beta takes no generator.
        concentration = torch.full((2,), float(alpha))
        a, b = torch._standard_gamma(concentration, generator=generator).tolist()
        share = a / (a + b) if a + b > 0 else 0.5
        return cls(share, torch.randperm(n, generator=generator))

    def losses(self, losses: Tensor, others: Tensor) -> Tensor:
        """Losses against the rows' own targets and those of their partners, mixed."""
        return self.share * losses + (1 - self.share) * others


def mixed(h: Tensor | Tokens, others: Tensor | Tokens, share: float) -> Tensor | Tokens:
    """``share`` of each row, the rest of another; of texts, where either has a token.

    A text counts as zero behind its end.
    """
    if not isinstance(h, Tokens):
        return torch.lerp(others, h, share)
    own, other = (
        t.hidden * t.mask.unsqueeze(2).to(t.hidden.dtype) for t in (h, others)
    )
    return Tokens(torch.lerp(other, own, share), torch.maximum(h.mask, others.mask))


class Losses(nn.Module):
    """One loss a row, from outputs (n, m) and targets.

    Parameters
    ----------
    task : {"classes", "labels", "values"}
        Targets are class numbers (n,), 0/1 labels (n, m) or values (n, m).
    values_loss : {"squared_error", "absolute_error", "huber"}
        Of "values", in units of each target's standard deviation.
    label_smoothing : float
        In training only (Szegedy et al., 2016, arXiv:1512.00567); what is
        reported of validation rows is the plain loss.
    """

    def __init__(self, task: str, values_loss="squared_error", label_smoothing=0.0):
        super().__init__()
        self.task, self.values_loss = task, values_loss
        self.label_smoothing = label_smoothing

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        smoothing = self.label_smoothing if self.training else 0.0
        if self.task == "classes":
            return nn.functional.cross_entropy(
                outputs, targets, reduction="none", label_smoothing=smoothing
            )
        if self.task == "labels":
            soft = targets * (1 - smoothing) + 0.5 * smoothing
            losses = nn.functional.binary_cross_entropy_with_logits(
                outputs, soft, reduction="none"
            )
        else:
            loss = {
                "squared_error": nn.functional.mse_loss,
                "absolute_error": nn.functional.l1_loss,
                "huber": nn.functional.huber_loss,
            }[self.values_loss]
            losses = loss(outputs, targets, reduction="none")
        return losses.mean(1)
