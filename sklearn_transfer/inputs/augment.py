"""Augmented views of images: random, and yet a function of pixels and a seed.

A view is made from the 8-bit pixels that a network would otherwise see, so that
stored and fresh views, threads and processes all agree.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from numbers import Integral

import numpy as np

from sklearn_transfer._locks import ForkSafeLock
from sklearn_transfer.inputs.files import UnreadableRow
from sklearn_transfer.inputs.recipe import ImageRecipe

# Part of the keys of stored views. Raise it when "flip" or "standard" would make
# another view of the same pixels and seed.
AUGMENT_VERSION = 1
# Of "standard": share of the area that is kept, and width / height of the cut.
# torchvision's own 0.08 is for training from scratch over a hundred epochs.
AREA = (0.35, 1.0)
RATIO = (3 / 4, 4 / 3)
CHOICES = (
    "Write augment='none', 'flip' (mirrored every other time), 'standard' (random "
    "part of the image, mirrored every other time), or a transform that takes and "
    "gives uint8 tensors (3, h, w), such as augment=v2.RandAugment() with "
    "from torchvision.transforms import v2."
)

_random_lock = ForkSafeLock()


@contextmanager
def alone_with_random_state() -> Iterator[None]:
    """Keep transforms of the user from the process's random states meanwhile.

    They draw from those states, which all threads share, and put them back. What
    draws from them in another thread at the same time, such as the dropout of a
    training step, must do so in here, or neither can be repeated.
    """
    with _random_lock.held():
        yield


class Augment:
    """Random views of an image; safe to use from threads.

    Attributes
    ----------
    identity : bytes
        The same for transforms that make the same views; enters the keys under
        which views are stored.
    uses_global_random_state : bool
        Whether it runs inside `alone_with_random_state`, one thread at a time.
    """

    def __init__(self, identity: bytes, view: Callable, uses_global_random_state: bool):
        self.identity = identity
        self.uses_global_random_state = uses_global_random_state
        self._view = view

    def __call__(self, pixels: np.ndarray, seed: int) -> np.ndarray:
        """A view of ``pixels``, (h, w, 3) uint8 in and out, by ``seed``, 64 bits."""
        return self._view(pixels, seed)


def resolve_augment(augment) -> Augment | None:
    """What ``augment=`` means.

    Parameters
    ----------
    augment : {"none", "flip", "standard"} or callable
        A callable takes and gives a uint8 tensor (3, h, w), as torchvision's v2
        transforms do. It may draw from the global random states of torch, numpy
        and python, which are seeded for it and put back.

    Returns
    -------
    augment : Augment or None
        None for "none".

    Raises
    ------
    ValueError
        For another string, or a transform that cannot be pickled.
    TypeError
        For what is neither a string nor a transform.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn_transfer.inputs.augment import resolve_augment
    >>> flip = resolve_augment("flip")
    >>> pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    >>> [flip(pixels, seed)[0, 0, 0].item() for seed in range(6)]
    [0, 0, 9, 9, 0, 0]
    """
    if isinstance(augment, str):
        if augment == "none":
            return None
        if augment not in _NAMED:
            raise ValueError(f"augment={augment!r} is not known. {CHOICES}")
        identity = f"{augment} {AUGMENT_VERSION}".encode()
        return Augment(identity, _NAMED[augment], uses_global_random_state=False)
    if isinstance(augment, type):
        raise TypeError(
            f"augment={augment.__name__} is a class. Write augment="
            f"{augment.__name__}(...), with its settings."
        )
    if not callable(augment):
        raise TypeError(f"augment={augment!r} is not a transform. {CHOICES}")
    return Augment(_identity(augment), _Transform(augment), True)


# --- "flip" and "standard" ---------------------------------------------------


def _flip(pixels: np.ndarray, seed: int) -> np.ndarray:
    return _mirrored(pixels, np.random.default_rng(seed))


def _standard(pixels: np.ndarray, seed: int) -> np.ndarray:
    from PIL import Image

    rng = np.random.default_rng(seed)
    height, width = pixels.shape[:2]
    left, top, w, h = random_box(height, width, rng)
    image = Image.fromarray(np.ascontiguousarray(pixels)).resize(
        (width, height), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h)
    )
    return _mirrored(np.array(image), rng)


def _mirrored(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.array(pixels[:, ::-1] if rng.random() < 0.5 else pixels, order="C")


def random_box(
    height: int, width: int, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(left, top, w, h) of a random part, by the rule of RandomResizedCrop.

    Area and logarithm of the ratio are uniform; after ten boxes that do not fit,
    the largest one in the centre whose ratio is allowed.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*AREA)
        ratio = np.exp(rng.uniform(*np.log(RATIO)))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left = int(rng.integers(width - w + 1))
            top = int(rng.integers(height - h + 1))
            return left, top, w, h
    w = min(width, max(1, round(height * RATIO[1])))
    h = min(height, max(1, round(width / RATIO[0])))
    return (width - w) // 2, (height - h) // 2, w, h


_NAMED: dict[str, Callable] = {"flip": _flip, "standard": _standard}


# --- transforms of the user --------------------------------------------------


class _Transform:
    """A transform of tensors, as a function of pixels and a seed."""

    def __init__(self, transform: Callable):
        self._transform = transform

    def __call__(self, pixels: np.ndarray, seed: int) -> np.ndarray:
        import torch

        # (3, h, w), a copy: the transform may write into it.
        image = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
        with _seeded(seed):
            try:
                view = self._transform(image)
            except Exception as error:
                error.add_note(
                    f"Raised by augment={_named(self._transform)} on a uint8 tensor "
                    f"of shape {tuple(image.shape)}."
                )
                raise
        self._check(view, (3, *pixels.shape[:2]))
        # A plain array even where the view is a tv_tensor.
        return np.ascontiguousarray(view.detach().cpu().numpy().transpose(1, 2, 0))

    def _check(self, view, shape: tuple[int, int, int]) -> None:
        import torch

        if not isinstance(view, torch.Tensor):
            came, fix = f"a {type(view).__name__}", "Remove ToPILImage or the like."
        elif view.dtype != torch.uint8:
            came = f"a tensor of {view.dtype}"
            fix = "Remove ToDtype and Normalize: the backbone normalises pixels itself."
        elif tuple(view.shape) != shape:
            came = f"a tensor of shape {tuple(view.shape)}"
            fix = f"Give transforms that cut or resize size={shape[1:]}."
        else:
            return
        raise ValueError(
            f"augment={_named(self._transform)} gave {came}, and a uint8 tensor of the "
            f"shape that came, {shape}, is needed. {fix}"
        )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the process's random states, alone with them, and put them back.

    Not torch.manual_seed under fork_rng, which would seed the GPUs for good.
    """
    import torch

    with alone_with_random_state():
        states = torch.get_rng_state(), np.random.get_state(), random.getstate()
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            torch.set_rng_state(states[0])
            np.random.set_state(states[1])
            random.setstate(states[2])


def _identity(transform: Callable) -> bytes:
    """Sha256 of the transform's pickle and of the modules that it names."""
    try:
        # Twice, because equal strings that are one object or two make different
        # pickles, and in a worker, which gets a copy, they may be the other.
        data, modules = _pickled(pickle.loads(_pickled(transform)[0]))
    except Exception as error:
        raise ValueError(
            f"augment={_named(transform)} cannot be pickled ({error}), so neither its "
            "views nor the estimator could be kept. Use a function or a transform "
            "of plain settings, such as augment=v2.RandAugment()."
        ) from error
    digest = hashlib.sha256(b"transform" + hashlib.sha256(data).digest())
    for name in sorted(modules):
        digest.update(name.encode() + b"\0" + _source_digest(name))
    return digest.digest()


def _pickled(obj) -> tuple[bytes, set[str]]:
    """The pickle of ``obj``, and the modules whose classes and functions it names.

    By cloudpickle: a notebook's functions are pickled by value, as they are now.
    What a module defines is pickled by name, and would find the views of before the
    module was edited; hence the modules.
    """
    import cloudpickle
    import torch

    modules: set[str] = set()

    class Pickler(cloudpickle.Pickler):
        def reducer_override(self, obj):
            modules.add(getattr(obj, "__module__", None) or "")
            if isinstance(obj, torch.Tensor):
                # By its values: a tensor's own pickle tells where it lies in memory.
                return functools.partial(torch.tensor, dtype=obj.dtype), (obj.tolist(),)
            return super().reducer_override(obj)

    buffer = BytesIO()
    Pickler(buffer, protocol=4).dump(obj)
    return buffer.getvalue(), modules


def _source_digest(module: str) -> bytes:
    """Sha256 of a module's file; empty for what has none, such as builtins."""
    path = getattr(sys.modules.get(module), "__file__", None)
    if module == "__main__" or path is None or not os.path.isfile(path):
        return b""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _named(transform: Callable) -> str:
    return getattr(transform, "__name__", type(transform).__name__)


# --- views as rows -----------------------------------------------------------


class FixedViews:
    """``n_views`` views of every row, always the same; they look like ImageRows.

    Index ``v * n + i`` is view v of row i. A view depends on the row's content, the
    augmentation and v alone, so that folds and candidates share what is stored.

    Parameters
    ----------
    rows : ImageRows
        n rows.
    augment : Augment
    n_views : int
        At least 1.
    """

    def __init__(self, rows, augment: Augment, n_views: int):
        is_int = isinstance(n_views, Integral) and not isinstance(n_views, bool)
        if not is_int or n_views < 1:
            raise ValueError(
                f"n_views={n_views!r} is not a number of views a row. Write n_views=4, "
                "or n_views=0 for fresh views in every epoch."
            )
        self.n_views = int(n_views)
        self._rows = rows
        self._augment = augment
        # Of each row, once known: pixels in memory would be hashed for every view.
        self._digests: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._rows) * self.n_views

    def row_of(self, i: int) -> int:
        """The row that index ``i`` is a view of."""
        return i % len(self._rows)

    def name(self, i: int) -> str:
        """How the row is called in messages; all its views share the name."""
        return self._rows.name(self.row_of(i))

    def size(self, i: int) -> tuple[int, int]:
        """(h, w) of the upright picture.

        Raises
        ------
        UnreadableRow
        """
        return self._rows.size(self.row_of(i))

    def digest(self, i: int) -> bytes:
        """32 bytes that tell the row's content, the augmentation and the view.

        Raises
        ------
        UnreadableRow
        """
        view = i // len(self._rows)
        parts = b"view %d " % view + self._row_digest(i) + self._augment.identity
        return hashlib.sha256(parts).digest()

    def load(self, i: int, recipe: ImageRecipe, digest: bytes | None = None):
        """Pixels of view ``i``, (h, w, 3) uint8; parameters as for ImageRows.

        Raises
        ------
        UnreadableRow
        """
        if digest is not None and digest != self.digest(i):
            raise UnreadableRow("the file changed while it was being read; run again")
        row_digest = self._row_digest(i)
        pixels = self._rows.load(self.row_of(i), recipe, row_digest)
        return self._augment(pixels, self._seed(i, row_digest))

    def _row_digest(self, i: int) -> bytes:
        row = self.row_of(i)
        if row not in self._digests:
            self._digests[row] = self._rows.digest(row)
        return self._digests[row]

    def _seed(self, i: int, row_digest: bytes) -> int:
        view = i // len(self._rows)
        seed = hashlib.sha256(b"seed %d " % view + row_digest).digest()[:8]
        return int.from_bytes(seed, "little")


class FreshViews:
    """Another view of each row in every epoch; they look like ImageRows.

    Parameters
    ----------
    rows : ImageRows
    augment : Augment
    seed : int
        Not negative. A view depends on the pixels, the seed, the epoch and the
        row's number.
    """

    def __init__(self, rows, augment: Augment, seed: int):
        self._rows = rows
        self._augment = augment
        self._seed = int(seed)
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._rows)

    def set_epoch(self, epoch: int) -> None:
        """Views of this epoch, from 0, from the next ``load`` on."""
        self._epoch = int(epoch)

    def name(self, i: int) -> str:
        """How row ``i`` is called in messages."""
        return self._rows.name(i)

    def size(self, i: int) -> tuple[int, int]:
        """(h, w) of the upright picture.

        Raises
        ------
        UnreadableRow
        """
        return self._rows.size(i)

    def digest(self, i: int) -> bytes:
        """The digest of row ``i`` itself: nothing of a fresh view may be stored by it.

        Raises
        ------
        UnreadableRow
        """
        return self._rows.digest(i)

    def load(self, i: int, recipe: ImageRecipe, digest: bytes | None = None):
        """Pixels of a view of row ``i``, (h, w, 3) uint8; parameters as for ImageRows.

        Raises
        ------
        UnreadableRow
        """
        seeds = np.random.SeedSequence((self._seed, self._epoch, int(i)))
        seed = int(seeds.generate_state(1, np.uint64)[0])
        return self._augment(self._rows.load(i, recipe, digest), seed)
