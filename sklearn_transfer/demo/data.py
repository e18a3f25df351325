"""Photographs, digits and docstrings that lie in installed packages, as rows.

Training and test rows never share a part of a photograph or a module.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

# What is to be seen where: boxes (left, top, right, bottom) in pixels, drawn by
# hand. Those for training and for testing lie apart: another storey of the
# tower, the other half of the flower or of the face.
BOXES = {
    "roof": {
        "train": [("china", 118, 72, 300, 130), ("china", 90, 150, 330, 192)],
        "test": [("china", 66, 248, 350, 292), ("china", 205, 340, 300, 392)],
    },
    "gallery": {
        "train": [("china", 105, 192, 322, 236)],
        "test": [("china", 80, 292, 342, 342)],
    },
    "tree": {
        "train": [("china", 400, 310, 640, 427), ("china", 575, 165, 640, 310)],
        "test": [("china", 0, 345, 200, 427), ("china", 0, 180, 60, 275)],
    },
    "petals": {
        "train": [("flower", 190, 110, 305, 325)],
        "test": [("flower", 318, 110, 425, 325), ("flower", 300, 385, 440, 427)],
    },
    "blur": {
        "train": [("china", 350, 0, 640, 120), ("flower", 0, 0, 160, 427)],
        "test": [("china", 0, 0, 115, 90), ("flower", 450, 0, 640, 380)],
    },
    "flag": {
        "train": [("hopper", 0, 0, 135, 125)],
        "test": [("hopper", 0, 140, 120, 300)],
    },
    "face": {
        "train": [("hopper", 160, 140, 258, 320)],
        "test": [("hopper", 262, 140, 365, 320)],
    },
}
SMALLEST, LARGEST = 40, 64  # side of a patch, in pixels

# Where docstrings are read. Every other module, in alphabetical order, is for
# testing, so that near-duplicates stay on one side. Left out: numpy.polynomial,
# whose six modules differ in a word, and scipy.stats, where most are one phrase.
PLACES = {
    "numpy": "fft lib linalg ma",
    "scipy": "cluster fft integrate interpolate linalg ndimage signal",
    "sklearn": "cluster covariance datasets decomposition ensemble linear_model "
    "manifold metrics model_selection neighbors preprocessing",
    "torch": "autograd cuda distributions nn optim",
}
# What would give the library away without being read: its names and markup.
_ROLE = re.compile(r":[\w:]+:`~?([^`<]*)[^`]*`")
_GIVEAWAY = re.compile(
    r"\b(numpy|np|scipy|sklearn|scikit-learn|pytorch|torch|tensors?|ndarrays?|"
    r"estimators?)\b|[`*\\]",
    re.IGNORECASE,
)


class Rows(NamedTuple):
    """Samples and their labels; X is a list, an array or a dict of columns."""

    X: object
    y: np.ndarray


def photographs() -> dict[str, Image.Image]:
    """Photographs by name: scikit-learn's two, and matplotlib's where installed."""
    from sklearn.datasets import load_sample_image

    found = {
        name: Image.fromarray(load_sample_image(f"{name}.jpg"))
        for name in ("china", "flower")
    }
    try:
        from matplotlib.cbook import get_sample_data

        path = get_sample_data("grace_hopper.jpg", asfileobj=False)
        found["hopper"] = Image.open(path)
    except (ImportError, FileNotFoundError):
        pass  # two photographs and five kinds of patches, then
    return found


def patches(split: str, per_class: int, seed: int) -> Rows:
    """Grey patches, 40 to 64 pixels a side, labelled by what is to be seen.

    Place, scale, mirroring, brightness and contrast are drawn at random, so that
    none of them gives the label away.

    Parameters
    ----------
    split : {"train", "test"}
        Which parts of the photographs.
    per_class, seed : int

    Returns
    -------
    X : list of ndarray of shape (side, side), uint8
    y : ndarray of str
    """
    photos = {name: photo.convert("L") for name, photo in photographs().items()}
    rng = np.random.default_rng(seed)
    X, y = [], []
    for label, splits in BOXES.items():
        boxes = [box for box in splits[split] if box[0] in photos]
        if boxes:
            X += [_patch(photos, boxes, rng) for _ in range(per_class)]
            y += [label] * per_class
    return Rows(X, np.array(y))


def _patch(photos: dict, boxes: Sequence[tuple], rng) -> np.ndarray:
    """One patch that lies wholly in one of the boxes, the larger the likelier."""
    areas = np.array([(x1 - x0) * (y1 - y0) for _, x0, y0, x1, y1 in boxes])
    photo, x0, y0, x1, y1 = boxes[rng.choice(len(boxes), p=areas / areas.sum())]
    side = rng.integers(SMALLEST, min(LARGEST, x1 - x0, y1 - y0), endpoint=True)
    left = rng.integers(x0, x1 - side, endpoint=True)
    top = rng.integers(y0, y1 - side, endpoint=True)
    window = photos[photo].crop((left, top, left + side, top + side))
    pixels = np.asarray(window, float)[:, :: rng.choice([-1, 1])]
    contrast, brightness = rng.uniform(0.7, 1.2), rng.uniform(100, 156)
    pixels = (pixels - pixels.mean()) * contrast + brightness
    return pixels.clip(0, 255).astype(np.uint8)


def digits(split: str, per_class: int, seed: int) -> Rows:
    """Handwritten digits, 8 x 8 pixels from 0 to 16, a row each.

    Even rows of scikit-learn's set are for training, odd ones for testing.
    """
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    start = 0 if split == "train" else 1
    X, y = X[start::2], y[start::2]
    rows = chosen(y, per_class, seed)
    return Rows(X[rows], y[rows])


@cache
def docstrings() -> dict[str, np.ndarray]:
    """Public functions and classes of four libraries, as columns of a table.

    Read from the source files; no library is imported.

    Returns
    -------
    columns : dict of str to ndarray
        ``summary`` (the docstring's first paragraph, give-aways removed),
        ``library``, ``n_words`` of the whole docstring, ``split`` ("train" or
        "test", by module), and numbers from the code: ``n_lines``,
        ``n_parameters``, ``n_defaults``, ``is_class``.
    """
    rows: dict[str, dict] = {}
    for library, places in PLACES.items():
        for i, path in enumerate(_modules(library, places.split())):
            origin = {"library": library, "split": "test" if i % 2 else "train"}
            for node in _documented(path):
                row = _described(node) | origin
                if 4 <= len(row["summary"].split()) <= 60:
                    rows.setdefault(row["summary"], row)
    first = next(iter(rows.values()))
    return {key: np.array([row[key] for row in rows.values()]) for key in first}


def _modules(library: str, places: Sequence[str]) -> list[Path]:
    spec = importlib.util.find_spec(library)
    assert spec is not None and spec.submodule_search_locations is not None
    (root,) = spec.submodule_search_locations
    found = (path for place in places for path in Path(root, place).rglob("*.py"))
    return sorted(path for path in found if "tests" not in path.parts)


def _documented(path: Path) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Public functions and classes with a docstring, at a module's top level."""
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            if not node.name.startswith("_") and ast.get_docstring(node, clean=False):
                yield node


def _described(node: ast.FunctionDef | ast.ClassDef) -> dict:
    text = ast.get_docstring(node) or ""
    functions = [node] if isinstance(node, ast.FunctionDef) else node.body
    functions = [n for n in functions if isinstance(n, ast.FunctionDef)]
    takes = functions[0] if functions else None  # of a class, its first method
    arguments = takes.args if takes else ast.arguments([], [], None, [], [], None, [])
    documented_lines = _n_lines(node.body[0])
    summary = _GIVEAWAY.sub(" ", _ROLE.sub(r"\1", text.split("\n\n")[0]))
    return {
        "summary": " ".join(summary.split()),
        "n_words": len(text.split()),
        "n_lines": _n_lines(node) - documented_lines,
        "n_parameters": len(arguments.args) + len(arguments.kwonlyargs),
        "n_defaults": len(arguments.defaults) + len(arguments.kw_defaults),
        "is_class": isinstance(node, ast.ClassDef),
    }


def _n_lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def chosen(y: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Positions of ``per_class`` random rows of each class."""
    rng = np.random.default_rng(seed)
    return np.concatenate(
        [
            rng.permutation(np.flatnonzero(y == label))[:per_class]
            for label in np.unique(y)
        ]
    )
