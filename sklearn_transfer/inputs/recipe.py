"""How an image becomes a network's input, as plain numbers, and its geometry."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

# Part of every key in a store. Raise it when the same file or array would give
# other pixels than before: stored rows are then computed anew.
PREPROCESSING_VERSION = 1


_INTERPOLATIONS = ("bilinear", "bicubic", "lanczos", "nearest")


@dataclass(frozen=True)
class ImageRecipe:
    """How an image becomes the network's input; part of every store key.

    Parameters
    ----------
    resize : int or (int, int)
        The short side becomes this many pixels; a pair (h, w): the image is
        resized until it covers both. The aspect is kept.
    crop : (int, int)
        (h, w), then cut from the centre; not larger than ``resize``.
    interpolation : {"bilinear", "bicubic", "lanczos", "nearest"}
    mean, std : tuple of 3 floats
        For pixels / 255, applied by the network's side.
    squash : bool
        Resize to exactly ``resize`` without keeping the aspect; only for weights
        whose own recipe does so.
    version : int
        PREPROCESSING_VERSION.
    """

    resize: int | tuple[int, int]
    crop: tuple[int, int]
    interpolation: str = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    squash: bool = False
    version: int = PREPROCESSING_VERSION

    def __post_init__(self):
        resize = positive_ints(self.resize, "resize")
        crop = positive_ints(self.crop, "crop")
        if self.interpolation not in _INTERPOLATIONS:
            raise ValueError(
                f"interpolation={self.interpolation!r} is not one of "
                f"{', '.join(map(repr, _INTERPOLATIONS))}."
            )
        if crop[0] > resize[0] or crop[1] > resize[1]:
            raise ValueError(f"crop={crop} is larger than resize={self.resize}.")
        # Plain python values only, because keys are made from the repr.
        plain = resize[0] if isinstance(self.resize, Integral) else resize
        object.__setattr__(self, "resize", plain)
        object.__setattr__(self, "crop", crop)
        object.__setattr__(self, "mean", tuple(map(float, self.mean)))
        object.__setattr__(self, "std", tuple(map(float, self.std)))

    @classmethod
    def for_size(cls, size: int | tuple[int, int], **others) -> ImageRecipe:
        """What ``image_size=size`` means: short side to size, centre cut out."""
        height, width = positive_ints(size, "image_size")
        return cls(resize=size, crop=(height, width), **others)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the whole picture after resizing, before the crop."""
        h, w = positive_ints(self.resize, "resize")
        if self.squash:
            return h, w
        # Integers throughout, and the long side rounded down as torchvision does.
        if h * width >= w * height:
            return h, max(w, h * width // height)
        return max(h, w * height // width), w


def crop_box(height: int, width: int, recipe: ImageRecipe) -> tuple[float, ...]:
    """(left, top, right, bottom) in the original that becomes the centre crop.

    Resizing only this part equals resizing the whole and cropping: Pillow's
    filters look beyond the box, and offsets are rounded as the two steps would.
    """
    full_h, full_w = recipe.resized(height, width)
    crop_h, crop_w = recipe.crop
    top, left = round((full_h - crop_h) / 2), round((full_w - crop_w) / 2)
    return (
        left * width / full_w,
        top * height / full_h,
        min((left + crop_w) * width / full_w, width),
        min((top + crop_h) * height / full_h, height),
    )


def turned_box(box, orientation: int, height: int, width: int):
    """The same box in the frame as stored, from the upright (height, width) one."""
    left, top, right, bottom = box
    if orientation in (2, 3, 6, 7):
        left, right = width - right, width - left
    if orientation in (3, 4, 7, 8):
        top, bottom = height - bottom, height - top
    if orientation >= 5:
        return top, left, bottom, right
    return left, top, right, bottom


def positive_ints(value, name: str, lengths=(2,)) -> tuple[int, ...]:
    """A tuple of python ints; a single int stands for a square."""
    if isinstance(value, Integral) and lengths == (2,):
        value = (value, value)
    good = isinstance(value, (tuple, list)) and len(value) in lengths
    if good and all(
        isinstance(v, Integral) and not isinstance(v, bool) and int(v) > 0
        for v in value
    ):
        return tuple(map(int, value))
    form = " or ".join({2: "(h, w)", 3: "(h, w, c)"}[n] for n in lengths)
    raise ValueError(f"{name}={value!r} is not {form} in positive whole numbers.")
