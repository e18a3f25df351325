"""torchvision's classification networks as lists of stages, one rule a family."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.vision_transformer import interpolate_embeddings

from sklearn_transfer.backbones.splitting import (
    GlobalAverage,
    LastStage,
    ReadThroughTail,
    chain,
    children_of,
)
from sklearn_transfer.backbones.stages import Layout, StagedBackbone
from sklearn_transfer.backbones.torchvision_names import TORCHVISION_WEIGHTS
from sklearn_transfer.backbones.weights import (
    fetch,
    is_weight_file,
    load_body,
    match_keys,
    read_state_dict,
    seeded,
)
from sklearn_transfer.inputs.images import ImageRecipe

RANDOM = "random"
AUXILIARY_HEADS = ("AuxLogits", "aux1", "aux2")
# Swin pads maps to whole windows, so one patch is enough; its metadata give the
# training size as the smallest.
SMALLEST_SWIN = 4
MAXVIT_STEP = 224  # strides of 32 times partitions of 7


def load(
    name: str, weights: str, image_size: int | tuple[int, int] | None = None
) -> StagedBackbone:
    """Load a torchvision network: eval mode, float32, on the CPU, without head.

    Parameters
    ----------
    name : str
        A classification network, as ``torchvision.models.list_models`` has it.
    weights : str
        An enum name ("IMAGENET1K_V1"), "random" (untrained, always the same), or
        the path of a weight file.
    image_size : int, (int, int) or None, default=None
        Pixels of the input, (height, width); None is the size of the weights'
        own recipe, for "random" and files that of the name's pinned enum. So are
        interpolation, mean and standard deviation, and for Inception and
        GoogLeNet the rescaling of channels before the first layer, which their
        published weights need.

    Returns
    -------
    backbone : StagedBackbone

    Raises
    ------
    ValueError
        If there is no such enum, or the network cannot take such images.
    BackboneNotFoundError
        If the weights are not here and cannot be downloaded.
    WeightsError
        If the file is damaged or of another network.
    """
    entry = _recipe_entry(name, weights)
    recipe = _recipe(entry, image_size)
    _check_size(name, entry, recipe.crop)
    net = _untrained(name, recipe.crop)
    if weights != RANDOM:
        path: str | Path = weights
        if not is_weight_file(weights):
            path = fetch(entry.url, f"torchvision:{name}")
        _load_weights(net, read_state_dict(path), f"{path} for torchvision:{name}")
    split = RULES[type(net)](net.eval())
    return StagedBackbone(
        split.stages,
        split.readout,
        layouts=split.layouts or ["nchw"] * len(split.stages),
        recipe=recipe,
        name=f"torchvision:{name}",
        n_prefix=split.n_prefix,
    )


# --- recipe and network ------------------------------------------------------


def _recipe_entry(name: str, weights: str):
    """The enum member whose recipe holds; for "random" and files the pinned one."""
    members = models.get_model_weights(name).__members__
    if weights == RANDOM or is_weight_file(weights):
        weights = TORCHVISION_WEIGHTS[name][0]
    if weights not in members:
        valid = [repr(member) for member in members if member != "DEFAULT"]
        raise ValueError(
            f"backbone='torchvision:{name}@{weights}': {name} has no weights "
            f"{weights!r}. Write {', '.join(valid)}, 'random', or the path of a "
            "weight file, such as './weights.safetensors'."
        )
    return members[weights]


def _recipe(entry, image_size) -> ImageRecipe:
    own = entry.transforms()
    normal = {
        "interpolation": own.interpolation.value,
        "mean": tuple(own.mean),
        "std": tuple(own.std),
    }
    if image_size is not None:
        return ImageRecipe.for_size(image_size, **normal)
    (resize,), (crop,) = own.resize_size, own.crop_size
    return ImageRecipe(resize=resize, crop=(crop, crop), **normal)


def _check_size(name: str, entry, size: tuple[int, int]) -> None:
    """Raise where the network cannot take images of (height, width) ``size``."""
    step = MAXVIT_STEP if name.startswith("maxvit") else 0
    if name.startswith("vit"):
        step = int(name.rpartition("_")[2])  # the patch: vit_b_16
    if step:
        if size[0] != size[1] or size[0] % step:
            near = max(step, round(min(size) / step) * step)
            raise ValueError(
                f"{name} takes square images whose side is a multiple of {step} "
                f"pixels, not {size[0]} x {size[1]}. Write image_size={near}."
            )
        return
    smallest = SMALLEST_SWIN if name.startswith("swin") else entry.meta["min_size"][0]
    if min(size) < smallest:
        raise ValueError(
            f"{name} takes images of at least {smallest} x {smallest} pixels, not "
            f"{size[0]} x {size[1]}: smaller ones vanish in its pooling. Write "
            f"image_size={smallest} or more."
        )


def _untrained(name: str, size: tuple[int, int]) -> nn.Module:
    options: dict[str, object] = {}
    if name in ("googlenet", "inception_v3"):
        # Said aloud because their defaults warn, and keep auxiliary heads.
        options = {"aux_logits": False, "transform_input": True, "init_weights": True}
    elif name.startswith("vit"):
        options = {"image_size": size[0]}
    elif name.startswith("maxvit"):
        options = {"input_size": size}
    with seeded():
        return models.get_model(name, weights=None, **options)


def _load_weights(net: nn.Module, state: dict[str, Tensor], source: str) -> None:
    head = _head_name(net)
    container = head.partition(".")[0]
    own = set(net.state_dict())

    def is_head(key: str) -> bool:
        # VGG's classifier is mostly body, so the container's name alone says
        # nothing about the network's own keys; of a fine-tuned file it may hold
        # a head of more layers.
        first = key.partition(".")[0]
        return (
            key.startswith(f"{head}.")
            or (first == container and key not in own)
            or first in AUXILIARY_HEADS
        )

    if isinstance(net, models.DenseNet):
        # Published when modules could be named "norm.1".
        old = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.")
        state = {old.sub(r"\1\2.", key): tensor for key, tensor in state.items()}
    if isinstance(net, models.VisionTransformer):
        state = _fit_positions(net, match_keys(net, state))
    load_body(net, state, is_head=is_head, source=source)


def _head_name(net: nn.Module) -> str:
    """Name of the last Linear, or of SqueezeNet's last convolution."""
    kind = nn.Conv2d if isinstance(net, models.SqueezeNet) else nn.Linear
    return [name for name, module in net.named_modules() if isinstance(module, kind)][
        -1
    ]


def _fit_positions(net: models.VisionTransformer, state: dict[str, Tensor]):
    """The state with its grid of position embeddings resized to the network's."""
    key = "encoder.pos_embedding"
    if key not in state:
        return state  # load_body names what is absent
    state = {**state, key: state[key].float()}
    return interpolate_embeddings(net.image_size, net.patch_size, state)


# --- one rule a family -------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """What a rule gives; layouts None means a map (n, c, h, w) everywhere."""

    stages: dict[str, nn.Module]
    readout: nn.Module
    layouts: list[Layout] | None = None
    n_prefix: int = 0


def _averaged(stages: dict[str, nn.Module]) -> Split:
    return Split(stages, GlobalAverage())


def _with_tail(stages: dict[str, nn.Module], *tail: nn.Module, flat: bool) -> Split:
    """Parametric layers after pooling: they belong to the last stage."""
    last = next(reversed(stages))
    stage = LastStage(stages[last], nn.Sequential(*tail))
    pooling = GlobalAverage() if flat else nn.AdaptiveAvgPool2d(1)
    return Split({**stages, last: stage}, ReadThroughTail(stage, pooling))


def _split_resnet(net: models.ResNet) -> Split:
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
    layers = {f"layer{i}": getattr(net, f"layer{i}") for i in range(1, 5)}
    return _averaged({"stem": stem, **layers})


def _split_features(net) -> Split:
    """MobileNetV2, EfficientNet, SqueezeNet: each child of ``features``."""
    return _averaged(chain(children_of(net.features, "features")))


def _split_mobilenet_v3(net: models.MobileNetV3) -> Split:
    linear, activation = net.classifier[:2]
    stages = chain(children_of(net.features, "features"))
    return _with_tail(stages, linear, activation, flat=True)


def _split_convnext(net: models.ConvNeXt) -> Split:
    norm, flatten = net.classifier[:2]
    stages = chain(children_of(net.features, "features"))
    return _with_tail(stages, norm, flatten, flat=False)  # LayerNorm2d


def _split_maxvit(net: models.MaxVit) -> Split:
    stages = chain([("stem", net.stem), *children_of(net.blocks, "blocks")])
    return _with_tail(stages, *net.classifier[2:5], flat=True)  # norm, Linear, Tanh


def _split_densenet(net: models.DenseNet) -> Split:
    stages: dict[str, list[nn.Module]] = {"stem": []}
    for name, module in net.features.named_children():
        if name.startswith("denseblock"):
            stages[name] = []
        stages[next(reversed(stages))].append(module)  # a transition ends its block
    stages["denseblock4"].append(nn.ReLU())
    return _averaged({name: nn.Sequential(*parts) for name, parts in stages.items()})


def _split_mnasnet(net: models.MNASNet) -> Split:
    layers = net.layers  # 0-7 stem, 8-13 stacks of blocks, 14-16 last convolution
    stacks = {f"layers.{i}": layers[i] for i in range(8, 14)}
    return _averaged({"stem": layers[:8], **stacks, "layers.14": layers[14:]})


def _split_shufflenet(net: models.ShuffleNetV2) -> Split:
    return _averaged(chain(_children_before(net, "fc")))


def _split_regnet(net: models.RegNet) -> Split:
    blocks = children_of(net.trunk_output, "trunk_output")
    return _averaged(chain([("stem", net.stem), *blocks]))


def _split_inception(net: models.Inception3 | models.GoogLeNet) -> Split:
    blocks = chain(_children_before(net, "avgpool"))
    first = next(iter(blocks))
    if net.transform_input:
        blocks[first] = nn.Sequential(TransformInput(), blocks[first])
    return _averaged(blocks)


def _split_swin(net: models.SwinTransformer) -> Split:
    stages = chain(children_of(net.features, "features"))
    last = next(reversed(stages))
    stages[last] = nn.Sequential(stages[last], net.norm)
    readout = nn.Sequential(net.permute, GlobalAverage())
    return Split(stages, readout, ["nhwc"] * len(stages))


def _split_vgg(net: models.VGG | models.AlexNet) -> Split:
    """Convolutions between max-pools, then fc6 and fc7."""
    stages: dict[str, list[nn.Module]] = {"block1": []}
    for layer in net.features:
        stages[next(reversed(stages))].append(layer)
        if isinstance(layer, nn.MaxPool2d):
            stages[f"block{len(stages) + 1}"] = []
    stages.popitem()  # nothing follows the last max-pool
    n_blocks = len(stages)
    _, fc7, head = (i for i, m in enumerate(net.classifier) if _is_linear(m))
    stages["fc6"] = [net.avgpool, nn.Flatten(), *net.classifier[:fc7]]
    # Dropout right before the head is the head's, as in every other family.
    before_head = net.classifier[fc7:head]
    stages["fc7"] = [m for m in before_head if not isinstance(m, nn.Dropout)]
    layouts: list[Layout] = ["nchw"] * n_blocks
    return Split(
        {name: nn.Sequential(*parts) for name, parts in stages.items()},
        nn.Identity(),
        [*layouts, "vector", "vector"],
    )


def _split_vit(net: models.VisionTransformer) -> Split:
    blocks = dict(net.encoder.layers.named_children())
    last = next(reversed(blocks))
    blocks[last] = nn.Sequential(blocks[last], net.encoder.ln)
    stages = {"embeddings": ViTEmbeddings(net), **blocks}
    return Split(stages, FirstToken(), ["tokens"] * len(stages), n_prefix=1)


RULES: dict[type[nn.Module], Callable[..., Split]] = {
    models.AlexNet: _split_vgg,
    models.ConvNeXt: _split_convnext,
    models.DenseNet: _split_densenet,
    models.EfficientNet: _split_features,
    models.GoogLeNet: _split_inception,
    models.Inception3: _split_inception,
    models.MaxVit: _split_maxvit,
    models.MNASNet: _split_mnasnet,
    models.MobileNetV2: _split_features,
    models.MobileNetV3: _split_mobilenet_v3,
    models.RegNet: _split_regnet,
    models.ResNet: _split_resnet,
    models.ShuffleNetV2: _split_shufflenet,
    models.SqueezeNet: _split_features,
    models.SwinTransformer: _split_swin,
    models.VGG: _split_vgg,
    models.VisionTransformer: _split_vit,
}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _children_before(net: nn.Module, end: str) -> list[tuple[str, nn.Module]]:
    children = list(net.named_children())
    names = [name for name, _ in children]
    return children[: names.index(end)]


class TransformInput(nn.Module):
    """ImageNet-normalised channels to (x - 0.5) / 0.5, for weights from TensorFlow."""

    def forward(self, x: Tensor) -> Tensor:
        red = x[:, 0:1] * (0.229 / 0.5) + (0.485 - 0.5) / 0.5
        green = x[:, 1:2] * (0.224 / 0.5) + (0.456 - 0.5) / 0.5
        blue = x[:, 2:3] * (0.225 / 0.5) + (0.406 - 0.5) / 0.5
        return torch.cat((red, green, blue), 1)


class ViTEmbeddings(nn.Module):
    """Patches, class token and positions: (n, 3, h, w) to (n, 1 + patches, d)."""

    def __init__(self, net: models.VisionTransformer):
        super().__init__()
        self.conv_proj = net.conv_proj
        self.class_token = net.class_token
        self.pos_embedding = net.encoder.pos_embedding
        self.dropout = net.encoder.dropout

    def forward(self, x: Tensor) -> Tensor:
        patches = self.conv_proj(x).flatten(2).transpose(1, 2)  # (n, patches, d)
        token = self.class_token.expand(x.shape[0], -1, -1)  # (n, 1, d)
        return self.dropout(torch.cat((token, patches), 1) + self.pos_embedding)


class FirstToken(nn.Module):
    """The class token: (n, tokens, d) to (n, d)."""

    def forward(self, h: Tensor) -> Tensor:
        return h[:, 0]
