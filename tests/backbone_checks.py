"""What every list of stages promises, whatever source it comes from."""

from __future__ import annotations

import torch
from torch import nn


def perturb(net: nn.Module, x: torch.Tensor) -> nn.Module:
    """Away from the values of a fresh network, under which mistakes do not show.

    Fresh norms are nearly the identity, fresh biases and layer scales zero; a deep
    network's fresh activations vanish, so BatchNorm first sees ``x`` in training
    mode. Returns the network in eval mode.
    """
    generator = torch.Generator().manual_seed(1)

    def noise(shape):
        return 0.1 * torch.randn(shape, generator=generator)

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for parameter in net.parameters():
            if parameter.ndim < 2 or parameter.std() < 1e-3:
                parameter += noise(parameter.shape)
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        kept = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        net.train()(torch.cat([x, x.flip(0) * 0.7]))
        for norm, momentum in zip(norms, kept, strict=True):
            norm.momentum = momentum
            norm.running_mean += noise(norm.running_mean.shape)
    return net.eval()


@torch.no_grad()
def check_stages(net, x: torch.Tensor, vector: torch.Tensor) -> None:
    """The promises of a StagedBackbone on images ``x`` that give ``vector``."""
    assert not any(module.training for module in net.modules())
    scale = vector.abs().max()
    assert (vector[0] - vector[1]).abs().max() > 1e-3 * scale, "images look alike"
    torch.testing.assert_close(net(x), vector, rtol=1e-4, atol=1e-5 * float(scale))
    check_boundaries(net, x)
    check_ownership(net)
    check_layouts(net, x)


def check_boundaries(net, x: torch.Tensor) -> None:
    """Each boundary resumes to the same vector, bit for bit, and is left intact."""
    whole, h = net(x), x
    for k, name in enumerate(net.stage_names[:-1], 1):
        h = net.run(h, k - 1, k)
        stored = h.clone()
        assert torch.equal(net.after(stored, k), whole), name
        assert torch.equal(stored, h), f"what follows {name} writes into its result"
    assert torch.equal(net.until(x, net.n_stages - 1), h)


def check_ownership(net) -> None:
    """Every stage has parameters, none is in two, and they are all there is."""
    seen: set[int] = set()
    for name, stage in zip(net.stage_names, net.stages, strict=True):
        own = {id(parameter) for parameter in stage.parameters()}
        assert own, f"{name} has no parameters"
        assert not own & seen, f"{name} shares parameters with a stage before"
        seen |= own
    assert seen == {id(parameter) for parameter in net.parameters()}
    assert all(key.startswith("stages.") for key in net.state_dict())


def check_layouts(net, x: torch.Tensor) -> None:
    """Layouts name the right dimensions, so each stage pools to one vector a row."""
    aspect = x.shape[3] / x.shape[2]
    h = x
    for k, layout in enumerate(net.layouts, 1):
        h = net.run(h, k - 1, k)
        places = {"nchw": h.shape[2:], "nhwc": h.shape[1:3]}.get(layout)
        if places is not None:
            height, width = places
            assert height * aspect / 2 <= width <= height * aspect * 2, layout
        assert h.ndim == {"nchw": 4, "nhwc": 4, "tokens": 3, "vector": 2}[layout]
        n_channels = h.shape[1] if layout in ("nchw", "vector") else h.shape[-1]
        for how in ("avg", "max"):
            assert net.tap(h, k, how).shape == (len(x), n_channels)
    auto = net.taps(x, "auto", range(1, net.n_stages + 1))
    assert torch.equal(auto[-1], net(x))
