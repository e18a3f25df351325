"""One door for X: whatever container came, one element a row comes out."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

# A stack of images stays one array; everything else is a list.
Rows: TypeAlias = Sequence | np.ndarray

_FEATURIZER = {"image": "ImageFeaturizer", "text": "TextFeaturizer"}
_SAMPLE = {"image": "path, bytes, PIL image or array", "text": "string"}


def as_rows(
    X,
    *,
    what: str,
    image_shape: tuple[int, ...] | None = None,
    reader: str | None = None,
) -> Rows:
    """Read X as a sequence of n samples, without looking into the samples.

    Parameters
    ----------
    X : list, tuple, ndarray, tensor, Series, or DataFrame of one column
        pandas and polars both count. For images also a stack of shape
        (n, h, w), (n, h, w, c) or (n, c, h, w), or numeric rows of shape
        (n, h * w * c) together with ``image_shape``.
    what : {"image", "text"}
        Which samples are wanted; decides what a numeric array means.
    image_shape : tuple of int, default=None
        (h, w), (h, w, c) or (c, h, w) of each numeric row.
    reader : str, default=None
        The estimator that messages speak of; None is the featurizer of ``what``,
        which a ColumnTransformer may hold.

    Returns
    -------
    rows : list or ndarray
        ``len(rows)`` is n and ``rows[i]`` the i-th sample. Arrays are views.

    Raises
    ------
    TypeError
        If X has no order or no length (dict, set, generator) or is sparse.
    ValueError
        If X is a single sample, is empty, has several columns, or holds numeric
        rows that ``image_shape`` does not fit.
    """
    _refuse_single_samples(X, what)
    if hasattr(X, "tocsr"):
        raise TypeError(
            "Sparse data was passed for X, but dense data is required. "
            "Use '.toarray()' to convert to a dense numpy array."
        )
    if hasattr(X, "collect_schema") and hasattr(X, "collect"):
        raise TypeError("X is a polars LazyFrame; write X.collect().")
    if _is_dataframe(X):
        return _rows_of_dataframe(X, what, image_shape, reader)
    if _is_series(X):
        return _not_empty(X.to_list(), (len(X),))
    if _is_array_like(X):
        return _rows_of_array(to_numpy(X), what, image_shape, reader)
    if isinstance(X, Sequence):
        return _rows_of_sequence(X, what, image_shape, reader)
    raise TypeError(
        f"X is a {type(X).__name__}, which has no rows in a fixed order. Pass a list, "
        "an array or a column of a data frame, for example list(X), or of a dict "
        "list(X.values())."
    )


def is_missing(value) -> bool:
    """Whether a sample is None, NaN, pandas.NA or NaT."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    if isinstance(value, (float, np.floating, np.datetime64, np.timedelta64)):
        return bool(value != value)
    return False


def to_numpy(value) -> np.ndarray:
    """Array or tensor as an ndarray, sharing its memory where possible."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            value = value.float()  # numpy has no bfloat16
        return value.numpy()
    return np.asarray(value)


def _is_array_like(value) -> bool:
    return hasattr(value, "__array__") or hasattr(value, "detach")


def is_pil_image(value) -> bool:
    """Whether this is a PIL image, without importing PIL."""
    # Image.Image may be subclassed anywhere, so the name is looked up in the MRO.
    return any(
        cls.__module__ == "PIL.Image" and cls.__name__ == "Image"
        for cls in type(value).__mro__
    )


def _is_dataframe(X) -> bool:
    return hasattr(X, "columns") and (hasattr(X, "iloc") or hasattr(X, "get_columns"))


def _is_series(X) -> bool:
    # pandas Series and Index, polars Series. An ndarray has tolist but no to_list.
    return hasattr(X, "to_list") and hasattr(X, "dtype")


def _refuse_single_samples(X, what: str) -> None:
    single = isinstance(X, (str, bytes, bytearray, memoryview, os.PathLike))
    # Never np.ndim: it would turn a polars frame into an array first.
    ndim = getattr(X, "ndim", None)
    if single or is_pil_image(X) or ndim == 0:
        raise ValueError(
            f"X is one {type(X).__name__}, not a collection of samples. "
            "For a single sample wrap it in a list: [X]."
        )
    if what == "image" and ndim == 3 and X.shape[2] in (1, 3, 4):
        raise ValueError(
            f"X has shape {tuple(X.shape)}, which is one (h, w, c) image. For a "
            "single sample wrap it in a list: [X]. If it is a stack of grey images "
            "of shape (n, h, w), write X[..., None]."
        )


def _not_empty(rows: Rows, shape: tuple[int, ...]) -> Rows:
    if len(rows) == 0:
        raise ValueError(
            f"Found array with 0 sample(s) (shape={tuple(shape)}) while a minimum "
            "of 1 is required."
        )
    return rows


def _rows_of_dataframe(X, what: str, image_shape, reader) -> Rows:
    names = list(X.columns)
    _not_empty(range(len(X)), X.shape)
    if not names:
        raise ValueError(
            f"Found array with 0 feature(s) (shape={tuple(X.shape)}) while a minimum "
            "of 1 is required."
        )
    columns = [_column(X, j) for j in range(len(names))]
    numeric = [_is_numeric(column) for column in columns]
    if what == "image" and all(numeric):
        return _numeric_rows(X.to_numpy(), image_shape)
    if len(names) > 1:
        _refuse_columns(names, numeric, what, reader)
    return columns[0].to_list()


def _column(X, j: int):
    # By position: names may repeat, and pandas gives a frame for a repeated name.
    return X.iloc[:, j] if hasattr(X, "iloc") else X.get_columns()[j]


def _is_numeric(column) -> bool:
    is_polars = hasattr(column.dtype, "is_numeric")
    if is_polars:
        return column.dtype.is_numeric()
    # pandas extension dtypes (Int64, Float32, ...) have numpy's kind letter too.
    return getattr(column.dtype, "kind", "O") in "biuf"


def _rows_of_array(X: np.ndarray, what: str, image_shape, reader) -> Rows:
    _not_empty(X, X.shape)
    if X.dtype.kind == "c":
        raise ValueError(f"Complex data not supported, and X has dtype {X.dtype}.")
    if X.dtype.kind == "S":
        raise ValueError(
            f"X has dtype {X.dtype}, which drops trailing zero bytes. Write "
            "X.astype(str) for paths or texts, and list[bytes] for encoded files."
        )
    if X.dtype.kind in "biuf" and what == "image":
        return _rows_of_numbers(X, image_shape)
    if X.ndim == 2 and X.shape[1] > 1:
        numeric = [X.dtype.kind in "biuf"] * X.shape[1]
        _refuse_columns(list(range(X.shape[1])), numeric, what, reader, "[:, {}]")
    if X.ndim > 2 or (X.ndim == 2 and X.shape[1] == 0):
        raise ValueError(
            f"X has shape {X.shape}; one {_SAMPLE[what]} a row is needed, shape (n,) "
            "or (n, 1)."
        )
    # tolist gives python's own str and keeps objects as they are.
    return X.reshape(-1).tolist()


def _rows_of_numbers(X: np.ndarray, image_shape) -> np.ndarray:
    if X.ndim == 2:
        return _numeric_rows(X, image_shape)
    if X.ndim in (3, 4):
        return X  # (n, h, w), (n, h, w, c) or (n, c, h, w)
    raise ValueError(
        f"Expected images, got a {X.ndim}D numeric array of shape {X.shape}. Needed: "
        "a stack (n, h, w), (n, h, w, c) or (n, c, h, w), or rows (n, h * w * c) "
        "with image_shape=(h, w). Reshape your data with X.reshape(n, h, w)."
    )


def _numeric_rows(X: np.ndarray, image_shape) -> np.ndarray:
    n, n_columns = X.shape
    if image_shape is None:
        raise ValueError(
            f"X has {n_columns} numeric columns (shape={X.shape}); which picture they "
            f"make is not known. Write {_guess_image_shape(n_columns)} (height, width)."
            " If X is one grey image, wrap it in a list: [X]."
        )
    if math.prod(image_shape) != n_columns:
        raise ValueError(
            f"X has {n_columns} numeric columns, and image_shape={tuple(image_shape)} "
            f"needs {math.prod(image_shape)}. Write {_guess_image_shape(n_columns)}."
        )
    if X.dtype.kind not in "biuf":
        X = X.astype(float)  # frames that mix dtypes come as object
    return X.reshape(n, *image_shape)


def _guess_image_shape(n_columns: int) -> str:
    for channels, tail in ((1, ""), (3, ", 3"), (4, ", 4")):
        side = math.isqrt(n_columns // channels)
        if channels * side * side == n_columns:
            return f"image_shape=({side}, {side}{tail})"
    return f"image_shape=(h, w) with h * w = {n_columns}"


def _rows_of_sequence(X: Sequence, what: str, image_shape, reader) -> Rows:
    _not_empty(X, (len(X),))
    first = X[0]
    if not all(isinstance(row, (list, tuple)) for row in X):
        return list(X)  # a list among other rows is named as one that is none
    if all(len(row) == 1 for row in X):
        if image_shape is None and not isinstance(first[0], (int, float)):
            return [row[0] for row in X]
    leaf = first
    while isinstance(leaf, (list, tuple)) and leaf:
        leaf = leaf[0]
    # Only plain values: numpy would unpack PIL images and arrays into pixels.
    if isinstance(leaf, (int, float, str, np.number)):
        try:
            return _rows_of_array(np.array(X), what, image_shape, reader)
        except ValueError as error:
            if "inhomogeneous" not in str(error):
                raise
    raise ValueError(
        f"The rows of X are {type(first).__name__}s of {type(leaf).__name__}, not all "
        f"of one length. One {_SAMPLE[what]} a row is needed."
    )


def _refuse_columns(
    names: list, numeric: list[bool], what: str, reader: str | None, taken="[{}]"
) -> None:
    """Several columns: print the line which does what was meant."""
    pairs = zip(names, numeric, strict=True)
    wanted = [name for name, number in pairs if not number] or names
    if reader is not None:
        one = f"[{_quoted(wanted[0])}]"
        raise ValueError(
            f"X has {len(names)} columns, and {reader} reads one. Pass "
            f"X{taken.format(one)}, or in a Pipeline put before it "
            f'ColumnTransformer([({_quoted(what)}, "passthrough", {one})]).'
        )
    featurizer = _FEATURIZER[what]
    steps = ", ".join(
        f"({_quoted(what if len(wanted) == 1 else str(name))}, {featurizer}(), "
        f"{_quoted(name)})"
        for name in wanted[:3]
    )
    if len(wanted) > 3:
        steps += ", ..."
    raise ValueError(
        f"X has {len(names)} columns, and {featurizer} reads one. Name it: "
        f'ColumnTransformer([{steps}], remainder="passthrough").'
    )


def _quoted(name) -> str:
    """The name as code, in double quotes where it is a string."""
    return json.dumps(name, ensure_ascii=False) if isinstance(name, str) else repr(name)
