"""What comes of X and y that are not what is needed: errors with the line that helps.

Each public estimator is found by introspection, and asked in every method that reads X.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import polars as pl
import pytest
from PIL import Image
from scipy import sparse
from sklearn.base import is_classifier, is_regressor

import sklearn_transfer
from sklearn_transfer.exceptions import UnreadableRowsError
from tests.fine_tuning_data import remarks, stripes, text_model

PUBLIC = [getattr(sklearn_transfer, name) for name in sklearn_transfer.__all__]
ESTIMATORS = [found for found in PUBLIC if inspect.isclass(found)]
OF_IMAGES = [found for found in ESTIMATORS if found.__name__.startswith("Image")]
OF_TEXTS = [found for found in ESTIMATORS if found not in OF_IMAGES]
READS_X = (
    "fit",
    "partial_fit",
    "transform",
    "predict",
    "predict_proba",
    "predict_log_proba",
    "decision_function",
)
N = 8
IMAGES, CLASSES = stripes(N)
TEXTS, _ = remarks(N)
VALUES = np.linspace(-1.0, 1.0, N)


def new(cls):
    """The smallest estimator of a class."""
    small: dict = {"precision": "float32"}
    if hasattr(cls, "predict"):
        small |= {"max_epochs": 1, "early_stopping": False, "random_state": 0}
    if cls in OF_IMAGES:
        return cls(image_size=16, **small)
    return cls(text_model(), **small)


def good_x(cls):
    return IMAGES if cls in OF_IMAGES else TEXTS


def good_y(cls):
    return VALUES if is_regressor(new(cls)) else CLASSES


@functools.cache
def fitted(cls):
    return new(cls).fit(good_x(cls), good_y(cls))


def methods(cls) -> list[str]:
    return [name for name in READS_X if hasattr(cls, name)]


def ask(cls, method: str, X):
    """Call a method on X, with a y that is as it should be."""
    if method == "fit":
        return new(cls).fit(X, good_y(cls))
    if method == "partial_fit":
        return new(cls).partial_fit(X, good_y(cls))
    return getattr(fitted(cls), method)(X)


def objects(*rows) -> np.ndarray:
    found = np.empty(len(rows), object)
    found[:] = rows
    return found


def spoilt(row: int, image) -> list:
    """Good images, and one that is not."""
    return [*IMAGES[:row], image, *IMAGES[row + 1 :]]


def with_value(value) -> np.ndarray:
    found = IMAGES / 255
    found[3, 2, 1, 0] = value
    return found


class Case(NamedTuple):
    """What is passed, the error that it ends in, and words of it."""

    name: str
    make: Callable[[], object]
    error: type[Exception]
    words: str


SINGLE = r"X is one {}, not a collection.*wrap it in a list: \[X\]"
UNORDERED = r"X is a {}, which has no rows in a fixed order.*list\(X\)"
EMPTY = r"0 sample\(s\) \(shape=.*\) while a minimum of 1 is required"

# Of any modality.
NO_COLLECTIONS = [
    Case("a string", lambda: "a.png", ValueError, SINGLE.format("str")),
    Case("bytes", lambda: b"abc", ValueError, SINGLE.format("bytes")),
    Case("a path", lambda: Path("a.png"), ValueError, SINGLE.format("PosixPath")),
    Case("0-d", lambda: np.array(3.0), ValueError, SINGLE.format("ndarray")),
    Case("0-d string", lambda: np.str_("a"), ValueError, SINGLE.format("str_")),
    Case(
        "a picture", lambda: Image.new("L", (3, 3)), ValueError, SINGLE.format("Image")
    ),
    Case("None", lambda: None, TypeError, UNORDERED.format("NoneType")),
    Case("a dict", lambda: {"a": [1]}, TypeError, r"dict.*list\(X\.values\(\)\)"),
    Case("a set", lambda: {"a"}, TypeError, UNORDERED.format("set")),
    Case(
        "a generator",
        lambda: (c for c in "ab"),
        TypeError,
        UNORDERED.format("generator"),
    ),
    Case("a map", lambda: map(str, "ab"), TypeError, UNORDERED.format("map")),
    Case("a number", lambda: 3, TypeError, UNORDERED.format("int")),
    Case("a class", lambda: list, TypeError, UNORDERED.format("type")),
    Case(
        "a function",
        lambda: len,
        TypeError,
        UNORDERED.format("builtin_function_or_method"),
    ),
    Case(
        "sparse",
        lambda: sparse.csr_array(np.eye(N)),
        TypeError,
        r"Sparse data was passed for X.*\.toarray\(\)",
    ),
    Case("lazy", lambda: pl.LazyFrame({"a": ["b"]}), TypeError, r"X\.collect\(\)"),
    Case("no rows", list, ValueError, EMPTY),
    Case("an empty array", lambda: np.empty((0, 3)), ValueError, EMPTY),
    Case("an empty frame", lambda: pd.DataFrame({"a": []}), ValueError, EMPTY),
    Case(
        "no columns",
        lambda: pd.DataFrame(index=range(N)),
        ValueError,
        r"0 feature\(s\) \(shape=\(8, 0\)\)",
    ),
    Case("lists", lambda: [["a"], ["b", "c"]] * 4, ValueError, "not all of one length"),
    Case("complex", lambda: np.zeros((N, 2), complex), ValueError, "dtype complex128"),
    Case(
        "bytes of one length",
        lambda: np.array([b"a"] * N),
        ValueError,
        r"dtype \|S1.*X\.astype\(str\).*list\[bytes\]",
    ),
    Case(
        "strings in 3-D",
        lambda: np.full((N, 2, 2), "a"),
        ValueError,
        r"shape \(8, 2, 2\).*a row is needed, shape \(n,\) or \(n, 1\)",
    ),
]
IMAGE_CASES = [
    Case(
        "1-D numbers",
        lambda: np.arange(float(N)),
        ValueError,
        r"1D numeric array of shape \(8,\).*X\.reshape\(n, h, w\)",
    ),
    Case("5-D", lambda: np.zeros((N, 1, 1, 1, 1)), ValueError, "5D numeric array"),
    Case(
        "flat pixels",
        lambda: np.zeros((N, 64)),
        ValueError,
        r"64 numeric columns.*Write image_shape=\(8, 8\)",
    ),
    Case(
        "one picture",
        lambda: IMAGES[0],
        ValueError,
        r"shape \(24, 24, 3\), which is one \(h, w, c\) image.*\[X\]",
    ),
]
# Rows that are no images, among good ones: row 3 is named, and why.
IMAGE_ROWS = [
    ("NaN", lambda: with_value(np.nan), "its pixels hold NaN or infinite values"),
    ("infinity", lambda: with_value(np.inf), "its pixels hold NaN or infinite values"),
    ("white is 255.0", lambda: with_value(255), r"value_range=\(0, 255\)"),
    ("too dark", lambda: with_value(-0.5), r"value_range=\(-1, 1\)"),
    ("2 channels", lambda: spoilt(3, np.zeros((8, 8, 2))), "neither 1, 3 nor 4"),
    ("5 channels", lambda: spoilt(3, np.zeros((8, 9, 5))), "neither 1, 3 nor 4"),
    (
        "unequal shapes",
        lambda: objects(*(np.zeros((8, 8 + i, 3 - (i == 3))) for i in range(N))),
        r"shape \(8, 11, 2\) has neither",
    ),
    ("mixed dtypes", lambda: spoilt(3, np.full((8, 8), 300)), r"value_range=\(0, 4095"),
    (
        "strings",
        lambda: spoilt(3, np.array([["a"]])),
        r"dtype <U1.*\.astype\('uint8'\)",
    ),
    ("1-D", lambda: spoilt(3, np.zeros(9)), r"\(h, w, c\) or \(c, h, w\) is needed"),
    ("no pixels", lambda: spoilt(3, np.zeros((0, 9))), "holds no pixels"),
    ("a missing path", lambda: spoilt(3, "none.png"), "no such file in"),
    (
        "a URL",
        lambda: spoilt(3, "https://a.org/b.png"),
        "download it and give the path",
    ),
    ("None", lambda: spoilt(3, None), "missing"),
    ("NA", lambda: pd.Series(spoilt(3, pd.NA), dtype=object), "missing"),
    ("a number", lambda: spoilt(3, 7), "int is not an image; a path, bytes"),
    ("a list", lambda: spoilt(3, [[0, 1], [1, 0]]), "numpy.asarray makes one"),
    ("a dict", lambda: spoilt(3, {"path": "a"}), "dict is not an image"),
    ("no file's bytes", lambda: spoilt(3, b"hello"), "not an image that Pillow reads"),
]
TEXT_ROWS = [
    ("None", None, r'missing: row 3\. Write missing="empty"'),
    ("NaN", float("nan"), r'missing: row 3\. Write missing="empty"'),
    ("NA", pd.NA, r'missing: row 3\. Write missing="empty"'),
    ("a number", 7, r"not strings but int: row 3\. .*\.astype\(str\)"),
    ("a bool", True, r"not strings but bool: row 3\. .*\.astype\(str\)"),
    ("bytes", b"abc", r"not strings but bytes: row 3\. .*text\.decode\(\)"),
    ("a list", ["a", "b"], r"not strings but list: row 3\."),
    ("a picture", IMAGES[0], r"not strings but ndarray: row 3\."),
    ("a path", Path("a.txt"), r"not strings but PosixPath: row 3\."),
]
TEXT_CASES = [
    Case("numbers", lambda: np.arange(N), UnreadableRowsError, "8 of 8.*but int"),
    Case("pictures", lambda: list(IMAGES), UnreadableRowsError, "8 of 8.*but ndarray"),
    Case("a stack", lambda: IMAGES, ValueError, "one string a row is needed"),
]
CASES = [
    *((cls, case) for cls in ESTIMATORS for case in NO_COLLECTIONS),
    *((cls, case) for cls in OF_IMAGES for case in IMAGE_CASES),
    *((cls, case) for cls in OF_TEXTS for case in TEXT_CASES),
]


# scikit-learn's own, where a fit has seen no names.
names_are_new = pytest.mark.filterwarnings("ignore:X has feature names")


def named(value) -> str | None:
    return getattr(value, "__name__", None) or getattr(value, "name", None)


def speaks_of_others(cls, message: str) -> bool:
    """Whether a message tells of an estimator that the user has not written."""
    others = {found.__name__ for found in ESTIMATORS} - {cls.__name__}
    return any(name in message for name in others)


@names_are_new
@pytest.mark.parametrize(("cls", "case"), CASES, ids=named)
def test_what_is_no_column_of_rows_is_refused(cls, case):
    for method in methods(cls):
        with pytest.raises(case.error, match=case.words) as caught:
            ask(cls, method, case.make())
        assert not speaks_of_others(cls, str(caught.value))


@pytest.mark.parametrize("cls", OF_IMAGES, ids=named)
@pytest.mark.parametrize(("name", "make", "words"), IMAGE_ROWS, ids=named)
def test_a_row_that_is_no_image_is_named(cls, name, make, words):
    for method in methods(cls):
        if method == "fit" and not hasattr(cls, "predict"):
            ask(cls, method, make())  # a featurizer's fit looks at no row
            continue
        with pytest.raises(UnreadableRowsError, match=words) as caught:
            ask(cls, method, make())
        assert list(caught.value.rows) == [3]
        assert "1 of 8 images cannot be read" in str(caught.value)
        assert "\n  row 3" in str(caught.value)
        assert "Drop or mend these rows" in str(caught.value)
        assert not speaks_of_others(cls, str(caught.value))


@pytest.mark.parametrize("cls", OF_TEXTS, ids=named)
@pytest.mark.parametrize(("name", "row", "words"), TEXT_ROWS, ids=named)
def test_a_row_that_is_no_text_is_named(cls, name, row, words):
    for method in methods(cls):
        with pytest.raises(UnreadableRowsError, match=words) as caught:
            ask(cls, method, [*TEXTS[:3], row, *TEXTS[4:]])
        assert list(caught.value.rows) == [3]
        assert not speaks_of_others(cls, str(caught.value))


# --- several columns ---------------------------------------------------------------

TABLES = {
    "pandas": lambda: pd.DataFrame({"price": VALUES, "what": TEXTS}),
    "polars": lambda: pl.DataFrame({"price": VALUES, "what": TEXTS}),
    "an array": lambda: np.array([TEXTS, TEXTS], dtype=object).T,
    "lists": lambda: [[text, text] for text in TEXTS],
}


@names_are_new
@pytest.mark.parametrize("cls", ESTIMATORS, ids=named)
@pytest.mark.parametrize("table", TABLES)
def test_of_several_columns_the_line_takes_one(cls, table):
    for method in methods(cls):
        with pytest.raises(
            ValueError, match=f"2 columns, and {cls.__name__} reads one"
        ):
            ask(cls, method, TABLES[table]())
    with pytest.raises(ValueError) as caught:
        ask(cls, "fit", TABLES[table]())
    message = str(caught.value)
    assert not speaks_of_others(cls, message)
    is_frame = table in ("pandas", "polars")
    if not hasattr(cls, "predict"):
        column = '"what")' if is_frame else "0)"
        assert f"{cls.__name__}(), {column}" in message
        return
    line = message.partition("Pass ")[2].partition(", or in a Pipeline")[0]
    assert line == ('X[["what"]]' if is_frame else "X[:, [0]]")
    assert 'ColumnTransformer([("' in message and '"passthrough", [' in message


@pytest.mark.parametrize("cls", [c for c in OF_TEXTS if hasattr(c, "predict")])
@pytest.mark.parametrize("table", ["pandas", "polars", "an array"])
def test_the_line_that_is_printed_works(cls, table):
    """Both lines of the message, run as they stand."""
    from sklearn.compose import ColumnTransformer
    from sklearn.pipeline import make_pipeline

    X = TABLES[table]()
    with pytest.raises(ValueError) as caught:
        new(cls).fit(X, good_y(cls))
    one, _, other = (
        str(caught.value)
        .partition("Pass ")[2]
        .partition(", or in a Pipeline put before it ")
    )
    scope = {"X": X, "ColumnTransformer": ColumnTransformer}
    expected = fitted(cls).predict(TEXTS)
    found = new(cls).fit(eval(one, scope), good_y(cls)).predict(eval(one, scope))
    np.testing.assert_array_equal(found, expected)
    model = make_pipeline(eval(other.removesuffix("."), scope), new(cls))
    np.testing.assert_array_equal(model.fit(X, good_y(cls)).predict(X), expected)


# --- y -----------------------------------------------------------------------------

NO_ARRAY = "Expected array-like"
Y_OF_BOTH = [
    Case("None", lambda: None, ValueError, "requires y to be passed.*y is None"),
    Case("longer", lambda: np.arange(9) % 2, ValueError, r"inconsistent.*\[8, 9\]"),
    Case("shorter", lambda: np.arange(7) % 2, ValueError, r"inconsistent.*\[8, 7\]"),
    Case("NaN", lambda: np.r_[np.nan, np.ones(7)], ValueError, "y contains NaN"),
    Case("inf", lambda: np.r_[np.inf, np.ones(7)], ValueError, "y contains infinity"),
    Case("complex", lambda: np.ones(N) * 1j, ValueError, "Complex data not supported"),
    Case(
        "sparse",
        lambda: sparse.csr_array(CLASSES[:, None]),
        TypeError,
        r"Sparse data was passed for y.*\.toarray\(\)",
    ),
]
Y_OF_CLASSIFIERS = [
    Case("no rows", list, ValueError, r"inconsistent.*\[8, 0\]"),
    Case("one class", lambda: np.ones(N), ValueError, "only one class: 1.0"),
    Case("values", lambda: VALUES, ValueError, "continuous"),
    Case("None in it", lambda: [None, "a"] * 4, ValueError, r"missing, 0, 2, 4, 6\. L"),
    *(
        Case(f"{kind} with NA", make, ValueError, r"missing, 0, 2, 4, 6\. Leave")
        for kind, make in {
            "pandas": lambda: pd.Series([None, "a"] * 4),
            "nullable": lambda: pd.Series([None, "a"] * 4, dtype="string"),
            "categorical": lambda: pd.Series([None, "a"] * 4, dtype="category"),
            "polars": lambda: pl.Series([None, "a"] * 4),
        }.items()
    ),
    Case(
        "NaN in it",
        lambda: objects("a", "b", np.nan, *"ababa"),
        ValueError,
        r"missing, 2\. Leave those rows out of X and y",
    ),
    Case(
        "two columns",
        lambda: np.column_stack([CLASSES, 2 * CLASSES + 1]),
        ValueError,
        r"several columns of classes.*MultiOutputClassifier\(",
    ),
    Case("3-D", lambda: np.ones((N, 1, 1)), ValueError, "Unknown label type"),
    Case("a dict", lambda: {"a": 1}, ValueError, NO_ARRAY),
    Case("a generator", lambda: iter(CLASSES), ValueError, NO_ARRAY),
    Case("a number", lambda: 3, ValueError, NO_ARRAY),
    Case("a string", lambda: "abababab", ValueError, NO_ARRAY),
    Case(
        "bytes", lambda: [b"a", b"b"] * 4, TypeError, "Convert the labels to a string"
    ),
]
NO_NUMBERS = r"y cannot be read as numbers \(.*\), and {} predicts.*pandas\.to_numeric"
Y_OF_REGRESSORS = [
    Case("no rows", list, ValueError, r"0 sample\(s\)"),
    Case("strings", lambda: ["a", "b"] * 4, ValueError, NO_NUMBERS),
    Case("a dict", lambda: {"a": 1}, ValueError, NO_NUMBERS),
    Case("a generator", lambda: iter(VALUES), ValueError, NO_NUMBERS),
    Case("objects", lambda: [object()] * N, ValueError, NO_NUMBERS),
    Case("unequal rows", lambda: [[1], [1, 2]] * 4, ValueError, NO_NUMBERS),
    Case("None in it", lambda: [None, 1.0] * 4, ValueError, "Input y contains NaN"),
    Case("3-D", lambda: np.ones((N, 1, 1)), ValueError, "dim 3, while dim <= 2"),
    Case("a number", lambda: 3, TypeError, "at least 1 dimension"),
]
FINE_TUNERS = [found for found in ESTIMATORS if hasattr(found, "predict")]
Y_CASES = [
    (cls, case)
    for cls in FINE_TUNERS
    for case in Y_OF_BOTH
    + (Y_OF_CLASSIFIERS if is_classifier(new(cls)) else Y_OF_REGRESSORS)
]


@pytest.mark.parametrize(("cls", "case"), Y_CASES, ids=named)
def test_targets_that_are_none_are_refused(cls, case):
    for method in ("fit", "partial_fit"):
        words = case.words.replace("{}", cls.__name__)
        with pytest.raises(case.error, match=words):
            getattr(new(cls), method)(good_x(cls), case.make())


@pytest.mark.parametrize("cls", FINE_TUNERS, ids=named)
def test_a_single_row(cls):
    X, y = good_x(cls)[:1], good_y(cls)[:1]
    assert len(fitted(cls).predict(X)) == 1
    if is_classifier(new(cls)):
        with pytest.raises(
            ValueError, match=rf"{cls.__name__}.*at least 2 classes.*: 0"
        ):
            new(cls).fit(X, y)
    else:
        np.testing.assert_allclose(new(cls).fit(X, y).predict(X), y, atol=1e-3)


# --- what looks odd, and is none the worse ------------------------------------------


@pytest.mark.parametrize("cls", OF_IMAGES, ids=named)
def test_odd_images_are_read(cls):
    bits = IMAGES[..., 0] > 127
    grey = bits.astype(np.uint8) * 255
    mixed = [bits[0], Image.fromarray(grey[1]), grey[2] / 255, *grey[3:]]
    expected = fitted(cls).transform(grey)
    for X in (bits, mixed, objects(*mixed), [row[..., None] for row in bits]):
        np.testing.assert_allclose(fitted(cls).transform(X), expected, atol=1e-5)
    unequal = objects(*(row[: 24 - 2 * i] for i, row in enumerate(grey)))
    assert np.isfinite(fitted(cls).transform(unequal)).all()


# --- the other modality's backbone ---------------------------------------------------


@pytest.mark.parametrize("cls", ESTIMATORS, ids=named)
def test_a_backbone_of_the_other_modality_is_called_one(cls):
    other, kind = ("gpt2", "text") if cls in OF_IMAGES else ("resnet18", "image")
    model = new(cls).set_params(backbone=other)
    with pytest.raises(
        ValueError, match=f"'{other}' names an? {kind} network"
    ) as caught:
        model.fit(good_x(cls), good_y(cls))
    assert not speaks_of_others(cls, str(caught.value))
    assert f"begin with {kind.capitalize()}" in str(caught.value)
