"""The embedded network and its weights, which ship with the package."""

from __future__ import annotations

from pathlib import Path

from sklearn_transfer.backbones.embedded import PIXELS
from sklearn_transfer.backbones.embedded.network import EmbeddedResNet
from sklearn_transfer.backbones.splitting import GlobalAverage
from sklearn_transfer.backbones.stages import StagedBackbone
from sklearn_transfer.backbones.weights import (
    is_weight_file,
    load_body,
    read_state_dict,
    seeded,
)
from sklearn_transfer.exceptions import BackboneNotFoundError
from sklearn_transfer.inputs.images import ImageRecipe

WEIGHTS = Path(__file__).with_name("tiny_imagenet_resnet.safetensors")
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
STEP = 16  # pixels; see EmbeddedResNet


def load(
    weights: str | None = None, image_size: int | tuple[int, int] | None = None
) -> StagedBackbone:
    """Load the embedded network: eval mode, float32, on the CPU, without head.

    Parameters
    ----------
    weights : str or None, default=None
        None: the weights that ship with the package. "random": untrained, always
        the same. Else the path of a weight file of the same network.
    image_size : int, (int, int) or None, default=None
        Pixels of the input, (height, width), multiples of 16. None is 64.

    Raises
    ------
    ValueError
        If ``image_size`` is no multiple of 16, or ``weights`` none of these.
    BackboneNotFoundError
        If there is no weight file.
    WeightsError
        If the file is of another network.
    """
    size = PIXELS if image_size is None else image_size
    recipe = ImageRecipe.for_size(size, interpolation="bilinear", mean=MEAN, std=STD)
    _check_size(recipe.crop)
    with seeded():
        net = EmbeddedResNet()
    if weights != "random":
        path = _weight_file(weights)
        load_body(
            net,
            read_state_dict(path),
            is_head=lambda key: key.startswith("fc."),
            source=f"{path} for 'embedded'",
        )
    names = ("stem", "layer1", "layer2", "layer3", "layer4")
    return StagedBackbone(
        {name: getattr(net, name) for name in names},
        GlobalAverage(),
        layouts=["nchw"] * len(names),
        recipe=recipe,
        name="embedded",
    )


def _weight_file(weights: str | None) -> Path:
    if weights is not None:
        if not is_weight_file(weights):
            raise ValueError(
                f"backbone='embedded@{weights}': after '@' the embedded network takes "
                "'random' or the path of a weight file, such as "
                "'./weights.safetensors'."
            )
        return Path(weights)
    if not WEIGHTS.is_file():
        raise BackboneNotFoundError(
            f"This installation lacks {WEIGHTS}, which ships with the package. "
            "Reinstall: pip install --force-reinstall sklearn-transfer"
        )
    return WEIGHTS


def _check_size(size: tuple[int, int]) -> None:
    near = tuple(max(STEP, round(pixels / STEP) * STEP) for pixels in size)
    if near != tuple(size):
        write = near[0] if near[0] == near[1] else near
        raise ValueError(
            f"The embedded network takes images whose sides are multiples of {STEP} "
            f"pixels, not {size[0]} x {size[1]}. Write image_size={write}."
        )
