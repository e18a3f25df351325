"""Pixels of any kind as 8-bit grey or RGB, upright."""

from __future__ import annotations

import struct
from functools import partial

import numpy as np

from sklearn_transfer.inputs.files import UnreadableRow

# Pixels that are scaled together: on the way they are wider than before and after.
_SCALED_TOGETHER = 2**20


def eight_bit(image, value_range):
    """A PIL image of any mode as one of mode L or RGB, decoded and not resized."""
    mode = image.mode
    if mode in ("L", "RGB"):
        return image
    if mode == "F" or mode.startswith("I"):
        pixels = np.asarray(image)
        # Pillow's "I" is 32 bits wide, but holds what 16-bit files hold.
        if mode == "I" and value_range is None:
            value_range = (0, 65535)
        return image_of_levels(levels(pixels, value_range))
    if mode in ("P", "PA"):
        # Through RGBA: straight to RGB warns where the palette has transparency.
        image = image.convert("RGBA")
    elif mode in ("La", "RGBa"):
        image = image.convert(mode.upper())  # undo the premultiplied alpha
    return image.convert("L" if image.mode in ("1", "LA") else "RGB")


def rgb_array(image) -> np.ndarray:
    """(h, w, 3) uint8, contiguous and writable, of a PIL image of mode L or RGB."""
    pixels = np.array(image)
    if pixels.ndim == 2:
        return np.repeat(pixels[:, :, None], 3, axis=2)
    return pixels


def image_of_levels(pixels: np.ndarray):
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(pixels))


def channels_last(pixels: np.ndarray) -> np.ndarray:
    """(h, w) or (h, w, 3), alpha dropped, still of the dtype that came."""
    shape = pixels.shape
    if pixels.ndim == 3:
        if shape[2] not in (1, 3, 4) and shape[0] in (1, 3, 4):
            pixels = np.moveaxis(pixels, 0, 2)
        if pixels.shape[2] == 1:
            pixels = pixels[:, :, 0]
        elif pixels.shape[2] in (3, 4):
            pixels = pixels[:, :, :3]
        else:
            raise UnreadableRow(
                f"an array of shape {shape} has neither 1, 3 nor 4 channels"
            )
    if pixels.ndim != 2 and pixels.ndim != 3:
        needed = "(h, w), (h, w, c) or (c, h, w) is needed"
        raise UnreadableRow(f"an array of shape {shape} is not an image; {needed}")
    if 0 in shape:
        raise UnreadableRow(f"an array of shape {shape} holds no pixels")
    return pixels


def levels(pixels: np.ndarray, value_range) -> np.ndarray:
    """Values of any numeric dtype as grey levels 0 .. 255, uint8."""
    kind = pixels.dtype.kind
    if kind not in "biuf":
        raise UnreadableRow(
            f"an array of dtype {pixels.dtype} is not an image; convert it, for "
            "example with .astype('uint8')"
        )
    if value_range is None and pixels.dtype == np.uint8:
        return pixels
    black, white = value_range or ((0, 1) if kind == "f" else (0, 255))
    is_wide = pixels.dtype.newbyteorder("=") == np.uint16
    if value_range is None and kind == "b":
        scale = _of_bits
    elif value_range is None and is_wide:
        scale = _of_sixteen_bits
    else:
        _check_values(pixels, black, white, value_range)
        scale = partial(_of_values, black=black, white=white)
    out = np.empty(pixels.shape, np.uint8)
    together = max(1, _SCALED_TOGETHER * len(pixels) // max(1, pixels.size))
    for start in range(0, len(pixels), together):
        out[start : start + together] = scale(pixels[start : start + together])
    return out


def _of_bits(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.uint8) * np.uint8(255)


def _of_sixteen_bits(pixels: np.ndarray) -> np.ndarray:
    return (pixels.astype(np.uint32) + 128) // 257


def _of_values(pixels: np.ndarray, black: float, white: float) -> np.ndarray:
    wide = np.dtype(np.float32 if pixels.dtype.itemsize <= 2 else np.float64)
    scaled = (pixels.astype(wide) - black) * (255.0 / (white - black))
    return np.clip(np.rint(scaled), 0, 255)


def _check_values(pixels: np.ndarray, black, white, value_range) -> None:
    low, high = float(pixels.min()), float(pixels.max())
    if not np.isfinite([low, high]).all():
        raise UnreadableRow("its pixels hold NaN or infinite values")
    slack = 1e-3 * (white - black)  # a quarter of a grey level: float16, resampling
    if black - slack <= low and high <= white + slack:
        return
    if value_range is None:
        why = (
            "floats must lie in [0, 1]"
            if pixels.dtype.kind == "f"
            else "outside 0 .. 255"
        )
    else:
        why = f"outside value_range={value_range}"
    raise UnreadableRow(
        f"its {pixels.dtype} pixels go from {low:g} to {high:g}; {why}. Say which "
        f"values are black and white: value_range={_guess_range(low, high)}"
    )


def _guess_range(low: float, high: float) -> tuple[int, int]:
    for black, white in ((0, 1), (-1, 1), (0, 16), (0, 255), (0, 4095), (0, 65535)):
        if black <= low and high <= white:
            return black, white
    return int(np.floor(low)), int(np.ceil(high))


def transposed(image, orientation: int):
    if orientation == 1:
        return image
    from PIL.Image import Transpose

    return image.transpose(
        {
            2: Transpose.FLIP_LEFT_RIGHT,
            3: Transpose.ROTATE_180,
            4: Transpose.FLIP_TOP_BOTTOM,
            5: Transpose.TRANSPOSE,
            6: Transpose.ROTATE_270,
            7: Transpose.TRANSVERSE,
            8: Transpose.ROTATE_90,
        }[orientation]
    )


def orientation_of(image) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none or it is damaged."""
    from PIL import Image, ImageFile

    exif = image.info.get("exif")
    # getexif warns of any damage in the EXIF, so what is plain is read here. It
    # still sees to PIL images turned by hand, and to the rarer homes of the tag.
    is_plain = isinstance(exif, bytes) and "xmp" not in image.info
    if is_plain and isinstance(image, ImageFile.ImageFile):
        return _tag_0112(exif)
    try:
        # The base method: PNG's own would decode the pixels to look behind them.
        value = Image.Image.getexif(image).get(0x0112, 1)
    except Exception:  # damaged metadata must not cost the picture
        return 1
    return int(value) if value in range(1, 9) else 1


def _tag_0112(exif: bytes) -> int:
    """The orientation in the first directory of an EXIF block, else 1."""
    data = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "L", data, 4)
        (count,) = struct.unpack_from(order + "H", data, start)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, n_values = struct.unpack_from(order + "HHL", data, at)
            if tag == 0x0112:
                if n_values != 1 or kind not in (3, 4):
                    return 1
                form = "H" if kind == 3 else "L"  # SHORT by the standard; some: LONG
                (value,) = struct.unpack_from(order + form, data, at + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:  # the block ends early
        pass
    return 1


def upright_size(image) -> tuple[int, int]:
    width, height = image.size
    # Pillow's TIFF reader already gives the size of the turned picture.
    turned = image.format != "TIFF" and orientation_of(image) >= 5
    return (width, height) if turned else (height, width)
