"""A user's own network as a backbone."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sklearn_transfer.backbones.spec import fingerprint_text
from sklearn_transfer.backbones.splitting import (
    GlobalAverage,
    chain,
    layouts_of,
    probe,
    same,
    trace,
    uncovered,
)
from sklearn_transfer.backbones.stages import StagedBackbone
from sklearn_transfer.inputs.images import ImageRecipe

SHOWN = 5


def backbone_from_module(
    module: nn.Module,
    *,
    stages: Sequence[str]
    | Sequence[tuple[str, nn.Module]]
    | Mapping[str, nn.Module]
    | None = None,
    image_size: int | tuple[int, int],
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
    std: tuple[float, float, float] = (0.229, 0.224, 0.225),
    interpolation: str = "bilinear",
    name: str | None = None,
) -> ModuleBackbone:
    """Make ``backbone=`` of your own network.

    The network is copied: ``module`` itself is never changed, and training it
    further does not change what estimators compute.

    Parameters
    ----------
    module : torch.nn.Module
        The body, without a head: images (n, 3, h, w) to vectors (n, d) or maps
        (n, c, h, w), of which the mean over space is taken. Put ``nn.Identity()``
        in the place of a classifier.
    stages : list of str, list of (str, Module), dict or None, default=None
        The stages in running order: names of submodules ("layer1",
        "features.3"), or names of your choice with submodules of ``module``. Run
        one after the other they must give what ``module`` gives. Modules without
        parameters join the stage before. None: the children of ``module``.
    image_size : int or (int, int)
        Pixels of the input, (height, width). The short side is resized to it and
        the centre cut out.
    mean, std : tuple of 3 floats
        Subtracted from pixels in [0, 1], and what the rest is divided by. By
        default those of ImageNet.
    interpolation : {"bilinear", "bicubic", "lanczos", "nearest"}, \
default="bilinear"
        How images are resized.
    name : str or None, default=None
        Shown by ``repr``. None is the name of the module's class.

    Returns
    -------
    backbone : ModuleBackbone
        Takes the place of a backbone string. Clones as itself, and pickles with
        its weights.

    Raises
    ------
    ValueError
        If the stages do not give what the module gives, or leave out some of its
        parameters; or if the module cannot run in channels_last, as where it uses
        ``view`` on maps and not ``reshape``.

    Examples
    --------
    >>> import numpy as np
    >>> from torch import nn
    >>> from sklearn_transfer import ImageFeaturizer, backbone_from_module
    >>> net = nn.Sequential(
    ...     nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU()
    ... )
    >>> backbone = backbone_from_module(net, image_size=32, name="tiny")
    >>> images = np.zeros((5, 40, 40, 3), dtype="uint8")
    >>> ImageFeaturizer(backbone).fit_transform(images).shape
    (5, 16)
    """
    recipe = ImageRecipe.for_size(
        image_size, interpolation=interpolation, mean=mean, std=std
    )
    label = name if name is not None else type(module).__name__
    # One deep copy of both, so that the stages are submodules of the copied network.
    net, parts = copy.deepcopy((module, _named_parts(module, stages)))
    net.eval().cpu()
    for _, part in parts:
        part.eval().cpu()
    split = chain(parts)
    readout, layouts = _check(net, split, recipe.crop, given=stages is not None)
    _check_memory_format(net, recipe.crop)
    staged = StagedBackbone(
        split,
        readout,
        layouts=layouts,
        recipe=recipe,
        # The digest of what it does is taken here, once, and pickled with the name:
        # another machine's rounding must not make it another network.
        name=f"module:{label}:{_architecture(net)}:{_behaviour(split, recipe.crop)}",
    )
    fingerprint = fingerprint_text(staged.fingerprint(), recipe)
    return ModuleBackbone(label, fingerprint, staged)


@dataclass(frozen=True, eq=False, repr=False)
class ModuleBackbone:
    """A user's own network, frozen; made by `backbone_from_module`.

    Two are equal where weights, architecture, stages, recipe and the activations
    of two made-up images are.
    """

    name: str
    fingerprint: str
    _staged: StagedBackbone

    @property
    def stage_names(self) -> tuple[str, ...]:
        return self._staged.stage_names

    def load(self, image_size: int | tuple[int, int] | None = None) -> StagedBackbone:
        """A copy of the network in eval mode, for images of ``image_size`` pixels.

        Raises
        ------
        ValueError
            If the network cannot take such images.
        """
        staged = copy.deepcopy(self._staged)
        if image_size is None:
            return staged
        own = staged.recipe
        staged.recipe = ImageRecipe.for_size(
            image_size, interpolation=own.interpolation, mean=own.mean, std=own.std
        )
        _run(staged, staged.recipe.crop)
        return staged

    def __sklearn_clone__(self) -> ModuleBackbone:
        return self

    def __copy__(self) -> ModuleBackbone:
        return self

    def __deepcopy__(self, memo) -> ModuleBackbone:
        return self  # frozen, as a string would be

    def __eq__(self, other) -> bool:
        if not isinstance(other, ModuleBackbone):
            return NotImplemented
        return self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        n = len(self.stage_names)
        return f"ModuleBackbone({self.name!r}, {n} stages, {self.fingerprint[:8]})"


def _named_parts(module: nn.Module, stages) -> list[tuple[str, nn.Module]]:
    if stages is None:
        return list(module.named_children()) or [(type(module).__name__, module)]
    items = list(stages.items() if isinstance(stages, Mapping) else stages)
    parts = []
    for item in items:
        name, part = (item, None) if isinstance(item, str) else item
        if part is None:
            try:
                part = module.get_submodule(name)
            except AttributeError:
                known = [repr(n) for n, _ in module.named_children()]
                raise ValueError(
                    f"stages: {type(module).__name__} has no submodule {name!r}. Its "
                    f"children are {', '.join(known)}."
                ) from None
        parts.append((name, part))
    names = [name for name, _ in parts]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"stages: {sorted(twice)} are named twice.")
    return parts


def _check(net: nn.Module, stages: Mapping[str, nn.Module], size, *, given: bool):
    """Readout and layouts; a ValueError where the stages are not the network."""
    whole = type(net).__name__
    if not stages:
        raise ValueError(f"{whole} has no parameters, so it has no stages.")
    if left := uncovered(net, stages.values()):
        more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        raise ValueError(
            f"No stage holds {', '.join(left[:SHOWN])}{more} of {whole}. Replace a "
            "classifier by nn.Identity() first (net.fc = nn.Identity()); name every "
            "other submodule that has parameters in stages=[...], and move "
            "parameters of the network itself into a submodule."
        )
    wanted = _run(net, size)
    if not isinstance(wanted, Tensor) or wanted.ndim not in (2, 4):
        got = tuple(wanted.shape) if isinstance(wanted, Tensor) else type(wanted)
        raise ValueError(
            f"{whole} gives {got} for two images; a backbone must give vectors (n, d) "
            "or maps (n, c, h, w). Wrap it in a module whose forward does."
        )
    try:
        activations = _quietly(lambda: trace(stages, probe(size)))
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ValueError(f"{_advice(whole, stages, given)} ({error})") from error
    layouts = layouts_of(activations)
    readout = GlobalAverage() if layouts[-1] == "nchw" else nn.Identity()
    vector = GlobalAverage()(wanted) if wanted.ndim == 4 else wanted
    if layouts[-1] == "tokens" or not same(readout(activations[-1]), vector):
        raise ValueError(_advice(whole, stages, given))
    return readout, layouts


def _advice(whole: str, stages: Mapping[str, nn.Module], given: bool) -> str:
    reason = "" if given else ": its forward does more than call its children"
    return (
        f"The stages {', '.join(map(repr, stages))}, run in this order, do not give "
        f"what {whole} gives{reason}. Write stages=[(name, module), ...] in the order "
        "of its forward, for example with nn.Sequential(net.conv1, nn.ReLU()) for what "
        "belongs together."
    )


def _run(net: nn.Module, size: tuple[int, int]):
    """What the network gives for two images of ``size``."""
    try:
        return _quietly(lambda: net(probe(size)))
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise ValueError(
            f"The network does not take images (n, 3, {size[0]}, {size[1]}): {error}. "
            "Write the image_size it was made for; grey images come as three channels."
        ) from error


def _check_memory_format(net: nn.Module, size: tuple[int, int]) -> None:
    """The layout in which networks run, which not every forward can take."""
    layout = torch.channels_last
    try:
        turned = copy.deepcopy(net).to(memory_format=layout)
        _quietly(lambda: turned(probe(size).contiguous(memory_format=layout)))
    except RuntimeError as error:
        raise ValueError(
            f"{type(net).__name__} does not run on weights and maps in channels_last, "
            f"in which networks are run: {error} Write x.reshape(...) or x.flatten(1) "
            "where its forward has x.view(...)."
        ) from error


def _quietly(run):
    """What ``run`` gives, without gradients and without drawing global numbers."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return run()


def _architecture(net: nn.Module) -> str:
    """Short digest of what tensors do not tell: classes, settings and their code."""
    digest = hashlib.sha256()
    classes = set()
    for name, module in net.named_modules():
        kind = type(module)
        settings = sorted(
            (key, value)
            for key, value in vars(module).items()
            if key != "training" and not key.startswith("_") and _is_plain(value)
        )
        digest.update(repr((name, kind.__qualname__, settings)).encode())
        if not kind.__module__.startswith("torch."):
            classes.add(kind)
    for source in sorted(_source(kind) for kind in classes):
        digest.update(source.encode())
    return digest.hexdigest()[:16]


def _behaviour(stages: Mapping[str, nn.Module], size: tuple[int, int]) -> str:
    """Short digest of what the stages make of two fixed images.

    Behaviour, because no list of attributes is complete: a function kept as an
    attribute, a tensor that is no buffer, a constant in code typed at a prompt. It
    stands beside `_architecture`, which tells what these images do not show.
    """
    try:
        # In float64 rounding is a billionth of what is kept, so that the number of
        # threads does not show.
        figures = _quietly(lambda: _sketches(stages, size, torch.float64, digits=6))
    except Exception:  # the user's code, which may insist on its own dtypes
        figures = _quietly(lambda: _sketches(stages, size, None, digits=3))
    return hashlib.sha256("\n".join(figures).encode()).hexdigest()[:16]


def _sketches(stages: Mapping[str, nn.Module], size, dtype, digits: int) -> list[str]:
    """For each stage the shape, norm and two random projections of activations.

    A few sums, not every value: of a million rounded values some always lie where
    the smallest change rounds them the other way.
    """
    torch.default_generator.manual_seed(0)  # for networks that draw numbers
    generator = torch.Generator().manual_seed(0)
    h, figures = probe(size), []
    if dtype is not None:
        h = h.to(dtype)
    for stage in stages.values():
        h = copy.deepcopy(stage).to(dtype=dtype)(h)
        flat = h.flatten().double()
        norm = flat.norm().item()
        figures.append(f"{tuple(h.shape)} {norm:.{digits}e}")
        for _ in range(2):
            # Rademacher signs: integers are the same on every machine.
            signs = torch.randint(0, 2, flat.shape, generator=generator) * 2 - 1
            # Divided by the norm alone, it is of order 1 and may be near 0.
            figures.append(
                f"{(flat @ signs.double()).item() / (norm or 1.0):.{digits}f}"
            )
    return figures


def _is_plain(value) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _source(kind: type[nn.Module]) -> str:
    with contextlib.suppress(OSError, TypeError):
        return inspect.getsource(kind)
    return kind.forward.__code__.co_code.hex()  # defined at a prompt
