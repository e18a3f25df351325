"""timm's networks as lists of stages; needs the extra ``timm``.

timm has a hundred families and no common list of stages, but most say in the order
of their children how they run. So the children are run in that order, containers
opened, until they give what ``forward_features`` gives; what remains is the head.
A network whose children do not is refused: the check runs at every load.
"""

from __future__ import annotations

import copy
import difflib
import math
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sklearn_transfer.backbones.splitting import (
    LastStage,
    ReadThroughTail,
    layouts_of,
    probe,
    same,
    sequence,
    trace,
    uncovered,
)
from sklearn_transfer.backbones.stages import StagedBackbone
from sklearn_transfer.backbones.weights import (
    WEIGHT_SUFFIXES,
    is_weight_file,
    load_body,
    offline,
    read_state_dict,
    seeded,
)
from sklearn_transfer.exceptions import BackboneNotFoundError
from sklearn_transfer.inputs.images import ImageRecipe

RANDOM = "random"
# Containers whose children run one after the other, and names that open a stage:
# "layer1", "s1", "denseblock1" and any child of a container that is a number.
CONTAINERS = ("stages", "blocks", "layers", "features")
OPENS_STAGE = re.compile(r"((layer|level|stage|block|denseblock|s)\d+|(?<=\.)\d+)$")


def load(
    name: str,
    weights: str | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> StagedBackbone:
    """Load a timm network: eval mode, float32, on the CPU, without head.

    Parameters
    ----------
    name : str
        A name of ``timm.list_models()``, optionally with a tag
        ("resnet18.a1_in1k").
    weights : str or None, default=None
        None: the pretrained weights of the name's tag, from the Hugging Face hub.
        A tag; "random" (untrained, always the same); or the path of a weight file.
    image_size : int, (int, int) or None, default=None
        Pixels of the input, (height, width). None is the weights' own recipe.

    Returns
    -------
    backbone : StagedBackbone

    Raises
    ------
    ImportError
        If timm is not installed.
    ValueError
        If there is no such network or tag, the network cannot take such images,
        or its stages cannot be told apart.
    BackboneNotFoundError
        If the weights are not here and cannot be downloaded.
    WeightsError
        If the file is of another network.
    """
    net = _load_net(name, weights)
    recipe = _recipe(net, name, image_size)
    x = _fitted_probe(net, name, recipe.crop, image_size)
    try:
        return _staged(net, x, recipe, f"timm:{name}")
    except (ValueError, AttributeError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"timm:{name} ({type(net).__name__}) does not run its children in their "
            "order, so its stages cannot be told apart. Those that do include resnet, "
            "resnetv2, regnet, efficientnet, mobilenetv3, convnext, densenet, nfnet, "
            "vit, deit, swin, maxvit and mixer. For this one write "
            f"backbone_from_module(timm.create_model({name!r}, pretrained=True, "
            f"num_classes=0), stages=[...], image_size={recipe.crop}). ({error})"
        ) from error


# --- network and recipe ------------------------------------------------------


def _load_net(name: str, weights: str | None) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            f"backbone='timm:{name}' needs timm: pip install 'sklearn-transfer[timm]'"
        ) from error
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(
            f"timm has no network {name!r}.{hint} list_backbones('timm') names them "
            "all; a transformers folder contains a '/', such as './my-model'."
        )
    file = weights if weights is not None and is_weight_file(weights) else None
    pretrained = file is None and weights != RANDOM
    full_name = f"{name}.{weights}" if pretrained and weights else name
    if pretrained:
        _check_source(timm, full_name)
    try:
        # num_classes=0: what parametric layers a family has after pooling stay.
        with seeded():
            net = timm.create_model(full_name, pretrained=pretrained, num_classes=0)
    except OSError as error:
        raise _not_found(full_name, f"downloading them failed ({error})") from error
    if file is not None:
        heads = net.pretrained_cfg.get("classifier") or ()
        heads = (heads,) if isinstance(heads, str) else tuple(heads)
        load_body(
            net,
            read_state_dict(file),
            is_head=lambda key: key.startswith(tuple(f"{head}." for head in heads)),
            source=f"{file} for timm:{name}",
        )
    return net.eval()


def _check_source(timm, name: str) -> None:
    """Raise where there are no pretrained weights, or none may be fetched."""
    base, _, tag = name.partition(".")
    names = (n.partition(".") for n in timm.list_pretrained(f"{base}*"))
    tags = [tag for found, _, tag in names if found == base]
    if not tags or (tag and tag not in tags):
        choices = ", ".join(f"'timm:{base}.{t}'" for t in tags if t)
        raise ValueError(
            f"timm has no pretrained weights {tag!r} for {base!r}. Write "
            f"{choices + ' or ' if choices else ''}'timm:{base}@random' (untrained)."
        )
    if offline() and not _is_here(timm.get_pretrained_cfg(name)):
        raise _not_found(name, "HF_HUB_OFFLINE forbids downloads")


def _is_here(cfg) -> bool:
    """Whether the weights lie in the hub's cache, or torch.hub's."""
    if not cfg.hf_hub_id:
        url = cfg.url or ""
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        return (folder / url.rpartition("/")[2]).is_file()
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(cfg.hf_hub_id, local_files_only=True))
    except OSError:
        return False
    return any(path.suffix in WEIGHT_SUFFIXES for path in folder.iterdir())


def _not_found(name: str, reason: str) -> BackboneNotFoundError:
    from huggingface_hub.constants import HF_HUB_CACHE

    base = name.partition(".")[0]
    return BackboneNotFoundError(
        f"The weights of 'timm:{name}' are not in {HF_HUB_CACHE}, and {reason}. "
        "Connect to the network and try again, name a file you have "
        f"(backbone='timm:{base}@/path/to/weights.safetensors'), or use the network "
        "that ships with the package (backbone='embedded')."
    )


def _recipe(net: nn.Module, name: str, image_size) -> ImageRecipe:
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(net)
    how = config["interpolation"]
    normal: dict[str, Any] = {
        # "random" is a choice of training; timm evaluates such weights bilinearly.
        "interpolation": "bilinear" if how == "random" else how,
        "mean": tuple(config["mean"]),
        "std": tuple(config["std"]),
    }
    if image_size is not None:
        return ImageRecipe.for_size(image_size, **normal)
    if config["crop_mode"] == "border":
        raise ValueError(
            f"timm:{name} was made for images padded to a square, which is not done "
            f"here. Write image_size={config['input_size'][1]} to cut the centre."
        )
    h, w = config["input_size"][1:]
    pair = tuple(math.floor(side / config["crop_pct"]) for side in (h, w))
    squash = config["crop_mode"] == "squash"
    resize = pair if squash or h != w else pair[0]
    return ImageRecipe(resize=resize, crop=(h, w), squash=squash, **normal)


@torch.no_grad()
def _fitted_probe(net: nn.Module, name: str, size: tuple[int, int], asked) -> Tensor:
    """Two images of ``size``, after the network was fitted to it where it must be."""
    own = tuple(net.pretrained_cfg.get("input_size", (3, 224, 224))[1:])
    try:
        if size != own and hasattr(net, "set_input_size"):
            with warnings.catch_warnings():
                # Swin's tables make PyTorch advise timm about contiguous tensors.
                warnings.simplefilter("ignore")
                net.set_input_size(img_size=size)  # interpolates positions
        x = probe(size)
        net(x)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        if asked is None:
            raise
        raise ValueError(
            f"timm:{name} does not take images of {size[0]} x {size[1]} pixels "
            f"({error}). It was made for {own[0]} x {own[1]}: write image_size=None, "
            "or a multiple of its patches and windows."
        ) from error
    return x


# --- stages ------------------------------------------------------------------


@torch.no_grad()
def _staged(net: nn.Module, x: Tensor, recipe, name: str) -> StagedBackbone:
    """The network's stages; a ValueError where they would give another vector."""
    features = net.forward_features(x)
    body, rest = _cut(_pieces(net), x, features)
    stages = _group(body)
    head = Head(_part(net, rest))
    readout: nn.Module = head
    if any(True for _ in head.parameters()):
        last = next(reversed(stages))
        stages[last] = LastStage(stages[last], head)
        readout = ReadThroughTail(stages[last], nn.Identity())
    activations = trace(stages, x)
    vector = net.forward_head(features, pre_logits=True)
    if vector.ndim != 2 or not same(readout(activations[-1]), vector):
        raise ValueError("the stages give another vector than the network")
    if left := uncovered(net, stages.values()):
        raise ValueError(f"no stage holds {', '.join(left[:5])}")
    # Some channels-last families say so in output_fmt, not all.
    width = net.num_features
    channels_last = features.shape[-1] == width != features.shape[1]
    return StagedBackbone(
        stages,
        readout,
        layouts=layouts_of(activations, "nhwc" if channels_last else "nchw"),
        recipe=recipe,
        name=name,
        n_prefix=getattr(net, "num_prefix_tokens", 0),
    )


def _pieces(net: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules in running order; a vision transformer's embeddings are one."""
    pieces: list[tuple[str, nn.Module]] = []
    for name, child in net.named_children():
        if name == "blocks" and hasattr(net, "_pos_embed"):
            before = {piece for piece, _ in pieces}
            direct = {*net._parameters, *net._buffers}  # tokens, positions
            pieces = [("embeddings", Embeddings(_part(net, before | direct)))]
        if name in CONTAINERS and isinstance(child, (nn.Sequential, nn.ModuleList)):
            pieces += [(f"{name}.{n}", part) for n, part in child.named_children()]
        else:
            pieces.append((name, child))
    return pieces


def _cut(pieces, x: Tensor, features: Tensor):
    """The pieces that give ``features``, and the names of the children that remain.

    A norm that happens to change nothing belongs to the body as well; a Dropout or
    an Identity after the last norm does not.
    """
    n_body, h = 0, x
    for i, (_, piece) in enumerate(pieces, 1):
        try:
            h = piece(h)
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            break  # head: it expects what pooling gives
        if not isinstance(h, Tensor):
            break
        has_parameters = any(True for _ in piece.parameters())
        if same(h, features) and (has_parameters or not n_body):
            n_body = i
    if not n_body:
        raise ValueError("no run of its children gives forward_features")
    names = [name.partition(".")[0] for name, _ in pieces]
    return pieces[:n_body], set(names[n_body:]) - set(names[:n_body])


def _group(body: list[tuple[str, nn.Module]]) -> dict[str, nn.Module]:
    """Stages: what comes before the first numbered one is the stem, and what comes
    between or after two belongs to the one before.
    """
    groups: list[tuple[str, list[nn.Module]]] = []
    for name, piece in body:
        if not any(True for _ in piece.parameters()):
            if isinstance(piece, nn.Identity):
                continue
            opens = not groups
        else:
            opens = not groups or OPENS_STAGE.search(name) is not None
        if opens:
            groups.append((name, [piece]))
        else:
            groups[-1][1].append(piece)
    name, stem = groups[0]
    if len(stem) > 1 and not OPENS_STAGE.search(name):
        groups[0] = ("stem", stem)
    return {name: sequence(modules) for name, modules in groups}


def _part(net: nn.Module, keep: Iterable[str]) -> nn.Module:
    """``net`` with only some of its direct children, parameters and buffers.

    Its methods still run where they use no others, so ``_pos_embed`` and
    ``forward_head`` need not be rewritten, and each tensor lies in one stage.
    """
    keep = set(keep)
    part = copy.copy(net)
    for kind in ("_modules", "_parameters", "_buffers"):
        members = getattr(net, kind)
        part.__dict__[kind] = {n: m for n, m in members.items() if n in keep}
    return part


class Embeddings(nn.Module):
    """A vision transformer up to its first block: (n, 3, h, w) to (n, tokens, d)."""

    def __init__(self, part: nn.Module):
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        x = self.part._pos_embed(self.part.patch_embed(x))
        return self.part.norm_pre(self.part.patch_drop(x))


class Head(nn.Module):
    """timm's pooling and what follows it up to the classifier."""

    def __init__(self, part: nn.Module):
        super().__init__()
        self.part = part

    def forward(self, h: Tensor) -> Tensor:
        return self.part.forward_head(h, pre_logits=True)
