"""Small pieces from which every source builds its list of stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from sklearn_transfer.backbones.stages import Layout


class GlobalAverage(nn.Module):
    """Mean over space: (n, c, h, w) to (n, c)."""

    def forward(self, h: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(h, 1).flatten(1)


class LastStage(nn.Module):
    """A last stage whose network goes on with parameters after pooling.

    ``forward`` gives the map, so that it can be pooled in other ways; ``tail``
    (a norm, a Linear) belongs to the stage and runs in its `ReadThroughTail`.
    """

    def __init__(self, body: nn.Module, tail: nn.Module):
        super().__init__()
        self.body = body
        self.tail = tail

    def forward(self, h):
        return self.body(h)


class ReadThroughTail(nn.Module):
    """Readout that pools a map and runs the tail of the last stage on it.

    It holds the stage without registering it: parameters, mode and fingerprint
    are the stage's alone. A tuple, not a closure, so that a deep copy or a
    pickle of the backbone refers to its own stage.
    """

    def __init__(self, stage: LastStage, pooling: nn.Module):
        super().__init__()
        self.pooling = pooling
        self._stage = (stage,)

    def forward(self, h):
        return self._stage[0].tail(self.pooling(h))


def sequence(modules: list[nn.Module]) -> nn.Module:
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


def chain(named: Iterable[tuple[str, nn.Module]]) -> dict[str, nn.Module]:
    """Stages from modules in running order: each with parameters opens one.

    Parameter-free modules join the stage before; leading ones join the first.
    """
    groups: dict[str, list[nn.Module]] = {}
    leading: list[nn.Module] = []
    for name, module in named:
        if any(True for _ in module.parameters()):
            groups[name] = [*leading, module] if not groups else [module]
        elif isinstance(module, nn.Identity):
            continue
        elif groups:
            groups[next(reversed(groups))].append(module)
        else:
            leading.append(module)
    return {name: sequence(modules) for name, modules in groups.items()}


def children_of(module: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    """Children with their names in the whole network, ``prefix.name``."""
    return [(f"{prefix}.{name}", child) for name, child in module.named_children()]


def probe(size: tuple[int, int]) -> Tensor:
    """Two random images (2, 3, h, w), always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, *size, generator=generator)


@torch.no_grad()
def trace(stages: Mapping[str, nn.Module], x: Tensor) -> list[Tensor]:
    """Activations after each stage.

    Raises
    ------
    ValueError
        If a stage writes into its input: what is stored at a boundary would
        change while the network runs on from it.
    """
    activations = []
    for name, stage in stages.items():
        before = x.clone()
        after = stage(x)
        if not isinstance(after, Tensor):
            raise ValueError(
                f"stage {name!r} gives {type(after).__name__}, and a stage must give "
                "one tensor. Put it and what follows it into one stage."
            )
        if not torch.equal(before, x):
            raise ValueError(
                f"stage {name!r} begins by changing its input in place. Build its "
                "first layer with inplace=False, or put it into the stage before."
            )
        activations.append(after)
        x = after
    return activations


def layouts_of(activations: list[Tensor], four_dims: Layout = "nchw") -> list[Layout]:
    """What the dimensions after each stage mean, by their number."""
    names: dict[int, Layout] = {2: "vector", 3: "tokens", 4: four_dims}
    unknown = [tuple(a.shape) for a in activations if a.ndim not in names]
    if unknown:
        raise ValueError(
            f"a stage gives activations of shape {unknown[0]}, and only (n, d), "
            "(n, tokens, d) and (n, c, h, w) can be pooled. Put it and the stage that "
            "follows into one."
        )
    return [names[a.ndim] for a in activations]


def uncovered(net: nn.Module, parts: Iterable[nn.Module]) -> list[str]:
    """Names of parameters and buffers of ``net`` that no part holds."""
    held = {
        id(tensor) for part in parts for tensor in (*part.parameters(), *part.buffers())
    }
    tensors = [*net.named_parameters(), *net.named_buffers()]
    return [name for name, tensor in tensors if id(tensor) not in held]


def same(a: Tensor, b: Tensor) -> bool:
    """Equal up to float32 rounding, relative to the largest value."""
    if a.shape != b.shape:
        return False
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max().clamp(min=1e-6))
