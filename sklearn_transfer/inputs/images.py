"""Images: what came as X, as uint8 RGB pixels of the size a network wants.

Choices that could have been otherwise:

- Transparency is dropped, as ``convert("RGB")`` of Pillow and so torchvision's
  loaders do, never composited: networks were trained on pixels read that way.
- EXIF orientation is applied, to PIL images too. Animations give their first frame.
- 16-bit grey is divided by 257, never clipped; nothing is scaled by its own range.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from numbers import Real
from typing import BinaryIO

import numpy as np

from sklearn_transfer._locks import ForkSafeLock
from sklearn_transfer._memory import give_memory_back
from sklearn_transfer.inputs.containers import (
    Rows,
    as_rows,
    is_missing,
    is_pil_image,
    to_numpy,
)
from sklearn_transfer.inputs.files import (
    UnreadableRow,
    open_image,
    read_regular,
    reasons,
    regular_file,
    sha256_of_path,
)
from sklearn_transfer.inputs.pixels import (
    channels_last,
    eight_bit,
    image_of_levels,
    levels,
    orientation_of,
    rgb_array,
    transposed,
    upright_size,
)
from sklearn_transfer.inputs.recipe import (
    ImageRecipe,
    crop_box,
    positive_ints,
    turned_box,
)

# Pixels, of which a file of 20 kB may hold 180 million: such pictures are decoded one
# at a time, lest every thread hold a gigabyte.
LARGE = 2**25
_DECODES = ("auto", "exact")


def image_rows(
    X, image_shape=None, value_range=None, decode="auto", reader=None
) -> ImageRows:
    """Read X as images; nothing is opened or decoded yet.

    Parameters
    ----------
    X : list, tuple, array, tensor, Series or DataFrame of one column
        Of paths, encoded files (bytes), PIL images or arrays of shape (h, w),
        (h, w, 1 | 3 | 4) or (1 | 3 | 4, h, w), channels last where both fit.
    image_shape : tuple of int, default=None
        (h, w), (h, w, c) or (c, h, w) of each row of a 2-D numeric X.
    value_range : (float, float), default=None
        Values that mean black and white, for all numeric arrays. None: by dtype
        for integers, and [0, 1] for floats.
    decode : {"auto", "exact"}, default="auto"
        "exact" turns off the shortcuts that decode large pictures smaller.
    reader : str, default=None
        The estimator that messages speak of, as for `as_rows`.

    Raises
    ------
    TypeError, ValueError
        If X is no collection of samples, or another argument makes no sense.
        Bad samples raise later, one by one, as UnreadableRow.
    """
    if decode not in _DECODES:
        raise ValueError(f"decode={decode!r} is not 'auto' or 'exact'.")
    if image_shape is not None:
        image_shape = positive_ints(image_shape, "image_shape", lengths=(2, 3))
    if value_range is not None:
        value_range = _checked_range(value_range)
    rows = as_rows(X, what="image", image_shape=image_shape, reader=reader)
    return ImageRows(rows, image_shape, value_range, decode)


class ImageRows:
    """Images in row order, each read when asked for; safe to use from threads."""

    def __init__(self, rows: Rows, image_shape, value_range, decode: str):
        self._rows = rows
        self._image_shape = image_shape
        self._value_range = value_range
        self._exact = decode == "exact"

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, i: int) -> str:
        """How row ``i`` is called in messages, such as "row 3 ('a.jpg')"."""
        row = self._rows[i]
        if isinstance(row, (str, os.PathLike)):
            return f"row {i} ({os.fsdecode(row)!r})"
        return f"row {i}"

    def digest(self, i: int) -> bytes:
        """Sha256, 32 bytes, of the file's bytes, or of the RGB pixels.

        Raises
        ------
        UnreadableRow
        """
        row = self._rows[i]
        if _is_path(row):
            return self._file_digest(sha256_of_path(row))
        if _is_encoded(row):
            return self._file_digest(hashlib.sha256(bytes(row)).digest())
        with reasons():
            pixels = self._upright_pixels(row)
        head = f"image-pixels {pixels.shape} exact={self._exact}".encode()
        return hashlib.sha256(head + hashlib.sha256(pixels.data).digest()).digest()

    def load(self, i: int, recipe: ImageRecipe, digest: bytes | None = None):
        """Pixels of row ``i``, resized and cropped, (h, w, 3) uint8.

        Parameters
        ----------
        recipe : ImageRecipe
        digest : bytes, default=None
            What ``digest(i)`` gave; for files, checked against the bytes decoded.

        Raises
        ------
        UnreadableRow
        """
        row = self._rows[i]
        with reasons():
            if not _is_encoded(row):
                image, orientation = self._image_in_memory(row)
                return self._fit(image, orientation, recipe, image.size)
            data = read_regular(row) if _is_path(row) else bytes(row)
            if digest is not None:
                found = self._file_digest(hashlib.sha256(data).digest())
                if found != digest:
                    raise UnreadableRow(
                        "the file changed while it was being read; run again"
                    )
            return self._decode(BytesIO(data), recipe)

    def size(self, i: int) -> tuple[int, int]:
        """(h, w) of the upright picture, read from the header where there is one.

        Raises
        ------
        UnreadableRow
        """
        row = self._rows[i]
        with reasons():
            if _is_path(row):
                with regular_file(row) as file:
                    return upright_size(open_image(file))
            if _is_encoded(row):
                return upright_size(open_image(BytesIO(bytes(row))))
            if is_pil_image(row):
                return upright_size(row)
            return channels_last(self._array(row)).shape[:2]

    def _file_digest(self, sha256: bytes) -> bytes:
        # The options that change what a file's bytes become: whatever else a key
        # is made of, two settings never share a stored row.
        options = f"image-file {self._value_range} exact={self._exact}".encode()
        return hashlib.sha256(options + sha256).digest()

    def _array(self, row) -> np.ndarray:
        if isinstance(row, (list, tuple, set, dict)) or not (
            hasattr(row, "__array__") or hasattr(row, "detach")
        ):
            raise UnreadableRow(
                f"{type(row).__name__} is not an image; a path, bytes, a PIL image "
                "or an array is needed (numpy.asarray makes one of nested lists)"
            )
        array = to_numpy(row)
        if array.ndim == 1 and self._image_shape is not None:
            return array.reshape(self._image_shape)
        return array

    def _image_in_memory(self, row):
        """A PIL image of mode L or RGB, and its EXIF orientation."""
        if is_missing(row):
            raise UnreadableRow("missing")
        if is_pil_image(row):
            # A lazily opened image decodes itself at first use, and the same
            # object may stand in several rows that several threads read.
            with _loading_lock.held():
                row.load()
                orientation = orientation_of(row)
            return eight_bit(row, self._value_range), orientation
        pixels = channels_last(self._array(row))
        return image_of_levels(levels(pixels, self._value_range)), 1

    def _upright_pixels(self, row) -> np.ndarray:
        image, orientation = self._image_in_memory(row)
        return rgb_array(transposed(image, orientation))

    def _decode(self, file: BinaryIO, recipe: ImageRecipe) -> np.ndarray:
        image = open_image(file)
        full, shrink = image.size, 1
        if not self._exact and image.format == "JPEG":
            shrink = _draft(image, recipe)
        # libjpeg holds a progressive picture whole, however small it is decoded.
        held = full if image.info.get("progressive") else image.size
        with _alone_if_large(*held):
            image.load()
            # After load: PNG may carry its EXIF behind the pixels, and TIFF turns
            # itself upright in load and then reports no orientation.
            orientation = orientation_of(image)
            image = eight_bit(image, self._value_range)
            pixels = self._fit(image, orientation, recipe, full, shrink)
            del image
        return pixels

    def _fit(
        self, image, orientation: int, recipe, full: tuple[int, int], shrink: int = 1
    ) -> np.ndarray:
        """Resize and crop in one step, turn upright, give (h, w, 3) uint8.

        ``full`` is the stored picture's (w, h) before it was decoded ``shrink``
        times smaller. Turning comes last, when there is little left to turn.
        """
        from PIL import Image

        width, height = full[::-1] if orientation >= 5 else full
        box = turned_box(crop_box(height, width, recipe), orientation, height, width)
        size = recipe.crop if orientation >= 5 else recipe.crop[::-1]  # (w, h)
        box = tuple(edge / shrink for edge in box)
        if (box[2] - box[0], box[3] - box[1]) == size and all(
            edge == int(edge) for edge in box
        ):
            image = image.crop(tuple(map(int, box)))
        else:
            image = image.resize(
                size,
                Image.Resampling[recipe.interpolation.upper()],
                box=box,
                reducing_gap=None if self._exact else 2.0,
            )
        return rgb_array(transposed(image, orientation))


def _draft(image, recipe: ImageRecipe) -> int:
    """Let libjpeg decode at 1/2, 1/4 or 1/8 of the size; gives 1, 2, 4 or 8.

    Only from 4 times the resized size, and never below twice of it.
    """
    full = image.size
    turned = orientation_of(image) >= 5
    height, width = full if turned else full[::-1]
    new_h, new_w = recipe.resized(height, width)
    if height < 4 * new_h or width < 4 * new_w:
        return 1
    twice = (2 * new_h, 2 * new_w) if turned else (2 * new_w, 2 * new_h)
    drafted = image.draft("RGB", twice)
    # The box is the full picture's extent in decoded pixels, full / shrink.
    return round(full[0] / drafted[1][2]) if drafted else 1


def _is_path(row) -> bool:
    return isinstance(row, (str, os.PathLike))


def _is_encoded(row) -> bool:
    return _is_path(row) or isinstance(row, (bytes, bytearray, memoryview))


_loading_lock = ForkSafeLock()
_large_lock = ForkSafeLock()


@contextmanager
def _alone_if_large(width: int, height: int) -> Iterator[None]:
    """Decode a large picture while no other is: up to 12 bytes a pixel are held."""
    if width * height <= LARGE:
        yield
        return
    with _large_lock.held():
        yield
        give_memory_back()


def _checked_range(value_range) -> tuple[float, float]:
    good = isinstance(value_range, (tuple, list, np.ndarray)) and len(value_range) == 2
    if good and all(isinstance(v, Real) and math.isfinite(v) for v in value_range):
        black, white = map(float, value_range)
        if black < white:
            return black, white
    raise ValueError(
        f"value_range={value_range!r} is not (black, white), two numbers of which the "
        "second is larger. Write for example value_range=(0, 255)."
    )
