"""One door for X: the same rows from every container, and errors that help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
from PIL import Image

from sklearn_transfer.inputs.containers import as_rows
from sklearn_transfer.inputs.images import ImageRecipe, image_rows

PATHS = ["a.png", "b.png", "c.png"]
STACK = np.random.default_rng(0).integers(0, 256, (5, 8, 6, 3), dtype=np.uint8)
RECIPE = ImageRecipe.for_size(8)


class Tensor:
    """Quacks like a torch tensor: no __array__ is used, and no numpy methods."""

    def __init__(self, array):
        self.array, self.shape, self.ndim = array, array.shape, array.ndim
        self.dtype = "torch.uint8"

    def detach(self):
        return self

    cpu = detach

    def numpy(self):
        return self.array


PATH_CONTAINERS = {
    "list": list,
    "tuple": tuple,
    "str array": np.array,
    "object array": lambda p: np.array(p, dtype=object),
    "object column": lambda p: np.array(p, dtype=object)[:, None],
    "str column": lambda p: np.array(p)[:, None],
    "list of lists": lambda p: [[path] for path in p],
    "Series": pd.Series,
    "shuffled index": lambda p: pd.Series(p, index=[2, 0, 0]),
    "categorical": lambda p: pd.Series(p, dtype="category"),
    "frame": lambda p: pd.DataFrame({"path": p}),
    "polars Series": pl.Series,
    "polars frame": lambda p: pl.DataFrame({"path": p}),
}


@pytest.mark.parametrize("what", ["image", "text"])
@pytest.mark.parametrize("container", PATH_CONTAINERS.values(), ids=PATH_CONTAINERS)
def test_strings_come_out_in_row_order_as_python_str(container, what):
    rows = as_rows(container(PATHS), what=what)
    assert list(rows) == PATHS
    assert {type(row) for row in rows} == {str}


IMAGE_CONTAINERS = {
    "list of arrays": list,
    "tuple of arrays": tuple,
    "list of PIL": lambda s: [Image.fromarray(a) for a in s],
    "list of channels first": lambda s: [a.transpose(2, 0, 1) for a in s],
    "channels-first stack": lambda s: s.transpose(0, 3, 1, 2),
    "strided stack": lambda s: np.repeat(s, 2, axis=0)[::2],
    "tensor": lambda s: Tensor(s.transpose(0, 3, 1, 2)),
    "list of tensors": lambda s: [Tensor(a.transpose(2, 0, 1)) for a in s],
    "Series of arrays": lambda s: pd.Series(list(s)),
    "Series of PIL": lambda s: pd.Series([Image.fromarray(a) for a in s]),
    "polars objects": lambda s: pl.Series(
        list(map(Image.fromarray, s)), dtype=pl.Object
    ),
    "frame of arrays": lambda s: pd.DataFrame({"image": list(s)}),
    "nested lists of PIL": lambda s: [[Image.fromarray(a)] for a in s],
    "nested lists of numbers": lambda s: s.tolist(),
}
FLAT_CONTAINERS = {
    "array": lambda f: f,
    "strided": lambda f: np.repeat(f, 2, axis=0)[::2],
    "lists": lambda f: f.tolist(),
    "rows": list,
    "pandas": pd.DataFrame,
    "polars": lambda f: pl.DataFrame(f.astype(int)),
}


def assert_is_stack(rows):
    expected = image_rows(STACK)
    assert len(rows) == len(STACK)
    for i in range(len(STACK)):
        np.testing.assert_array_equal(rows.load(i, RECIPE), expected.load(i, RECIPE))
        assert rows.digest(i) == expected.digest(i)


@pytest.mark.parametrize("container", IMAGE_CONTAINERS.values(), ids=IMAGE_CONTAINERS)
def test_every_container_gives_the_same_images(container):
    assert_is_stack(image_rows(container(STACK)))


@pytest.mark.parametrize("container", FLAT_CONTAINERS.values(), ids=FLAT_CONTAINERS)
@pytest.mark.parametrize("order", ["channels last", "channels first"])
def test_numeric_rows_take_image_shape(container, order):
    stack = STACK if order == "channels last" else STACK.transpose(0, 3, 1, 2)
    flat = stack.reshape(5, -1)
    assert_is_stack(image_rows(container(flat), image_shape=stack.shape[1:]))


def test_grey_stacks_and_digits():
    grey = STACK[..., 0]
    rows = image_rows(grey)
    np.testing.assert_array_equal(
        rows.load(2, RECIPE), image_rows([Image.fromarray(grey[2])]).load(0, RECIPE)
    )
    digits = np.arange(128.0).reshape(2, 64) % 17
    out = image_rows(digits, image_shape=(8, 8), value_range=(0, 16)).load(1, RECIPE)
    expected = np.rint(digits[1].reshape(8, 8) / 16 * 255)
    np.testing.assert_array_equal(out[:, :, 0], expected)


def test_arrays_are_not_copied():
    assert np.shares_memory(as_rows(STACK, what="image"), STACK)
    flat = STACK.reshape(5, -1)
    for view in (flat, flat[::2], flat[::-1]):
        rows = as_rows(view, what="image", image_shape=(8, 6, 3))
        assert np.shares_memory(rows, STACK)
    tensor = Tensor(STACK.transpose(0, 3, 1, 2))
    assert np.shares_memory(as_rows(tensor, what="image"), STACK)


def test_torch_tensors():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    stack = torch.from_numpy(STACK.copy()).permute(0, 3, 1, 2)
    assert_is_stack(image_rows(stack))
    assert_is_stack(image_rows(list(stack)))
    floats = (stack / 255).requires_grad_()
    assert_is_stack(image_rows(floats))
    grey = torch.zeros(2, 8, 6, dtype=torch.bfloat16)
    assert (image_rows(grey).load(0, RECIPE) == 0).all()


# -- errors --------------------------------------------------------------------


@pytest.mark.parametrize("what", ["image", "text"])
@pytest.mark.parametrize(
    "X",
    [
        "a.png",
        b"bytes",
        Path("a.png"),
        Image.new("RGB", (4, 4)),
        np.array("a.png"),
        np.float64(3),
    ],
    ids=lambda X: type(X).__name__,
)
def test_a_single_sample_should_be_wrapped(X, what):
    with pytest.raises(ValueError, match=r"wrap it in a list: \[X\]"):
        as_rows(X, what=what)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_single_array_should_be_wrapped(channels):
    for X in (np.zeros((8, 6, channels)), Tensor(np.zeros((8, 6, channels)))):
        with pytest.raises(ValueError, match=r"\[X\].*X\[\.\.\., None\]"):
            as_rows(X, what="image")


@pytest.mark.parametrize(
    "X", [{"a": 1}, {1, 2}, (x for x in "ab"), 3, None, pl.LazyFrame({"a": ["b"]})]
)
def test_what_has_no_row_order_is_refused(X):
    with pytest.raises(TypeError, match=r"list\(X\)|X\.collect\(\)"):
        as_rows(X, what="text")


def test_sparse_data_is_refused():
    from scipy import sparse

    with pytest.raises(TypeError, match="Sparse data was passed"):
        as_rows(sparse.csr_array(np.eye(3)), what="image")


@pytest.mark.parametrize("what", ["image", "text"])
@pytest.mark.parametrize(
    "X",
    [
        [],
        (),
        np.empty(0),
        np.empty((0, 3)),
        np.empty((0, 8, 8, 3)),
        pd.Series([], dtype=object),
        pd.DataFrame({"a": []}),
        pd.DataFrame({"a": [], "b": []}),
        pl.Series([], dtype=pl.String),
        pl.DataFrame({"a": []}),
    ],
    ids=lambda X: type(X).__name__,
)
def test_no_rows_is_said_as_sklearn_says_it(X, what):
    with pytest.raises(
        ValueError,
        match=r"Found array with 0 sample\(s\) \(shape=.*\) while a minimum of 1 is",
    ):
        as_rows(X, what=what)


def test_no_columns_is_said_as_sklearn_says_it():
    with pytest.raises(ValueError, match=r"0 feature\(s\) \(shape=\(3, 0\)\)"):
        as_rows(pd.DataFrame(index=range(3)), what="image")


@pytest.mark.parametrize("frame", [pd.DataFrame, pl.DataFrame])
def test_several_columns_print_the_column_transformer(frame):
    X = frame({"price": [1.0, 2.0], "path": ["a", "b"]})
    with pytest.raises(ValueError) as caught:
        as_rows(X, what="image")
    line = 'ColumnTransformer([("image", ImageFeaturizer(), "path")], '
    assert line + 'remainder="passthrough")' in str(caught.value)
    two = frame({"title": ["a"], "n": [1], "it's": ["b"]})
    with pytest.raises(ValueError) as caught:
        as_rows(two, what="text")
    message = str(caught.value)
    assert '("title", TextFeaturizer(), "title")' in message
    code = message[message.index("ColumnTransformer(") : message.rindex(".")]
    compile(code, "message", "eval")


def test_the_printed_column_transformer_works():
    from sklearn.compose import ColumnTransformer
    from sklearn.preprocessing import FunctionTransformer

    def featurizer():
        return FunctionTransformer(
            lambda X: np.array([[len(row)] for row in as_rows(X, what="text")])
        )

    X = pd.DataFrame({"price": [1.0, 2.0], "text": ["a", "bcd"]})
    with pytest.raises(ValueError) as caught:
        as_rows(X, what="text")
    message = str(caught.value)
    code = message[message.index("ColumnTransformer(") : message.rindex(".")]
    names = {"ColumnTransformer": ColumnTransformer, "TextFeaturizer": featurizer}
    made = eval(code, names)
    np.testing.assert_array_equal(made.fit_transform(X), [[1, 1], [3, 2]])


def test_object_arrays_of_several_columns_name_a_position():
    X = np.array([["a.png", "x"], ["b.png", "y"]], dtype=object)
    with pytest.raises(ValueError, match=r'\("0", TextFeaturizer\(\), 0\)'):
        as_rows(X, what="text")


def test_repeated_column_names_are_refused_too():
    X = pd.DataFrame([["a", "b"]], columns=["path", "path"])
    with pytest.raises(ValueError, match="2 columns"):
        as_rows(X, what="image")


@pytest.mark.parametrize(
    "n_columns, line",
    [
        (64, r"image_shape=\(8, 8\)"),
        (4096, r"image_shape=\(64, 64\)"),
        (3072, r"image_shape=\(32, 32, 3\)"),
        (30, r"image_shape=\(h, w\) with h \* w = 30"),
    ],
)
def test_numeric_rows_need_image_shape(n_columns, line):
    for X in (np.zeros((2, n_columns)), pd.DataFrame(np.zeros((2, n_columns)))):
        with pytest.raises(ValueError, match=line):
            as_rows(X, what="image")
        with pytest.raises(ValueError, match=f"needs 35.*{line}"):
            as_rows(X, what="image", image_shape=(5, 7))


@pytest.mark.parametrize(
    "X, words",
    [
        (np.zeros(5), "1D numeric array"),
        (np.zeros((2, 2, 2, 2, 2)), "5D numeric array"),
        (np.zeros((2, 2), complex), "Complex data not supported"),
        (np.array([b"a", b"b"]), r"X\.astype\(str\)"),
        (np.full((2, 2, 2), "a"), "shape"),
        ([["a"], ["b", "c"]], "not all of one length"),
    ],
)
def test_other_arrays_say_what_is_needed(X, words):
    with pytest.raises(ValueError, match=words):
        as_rows(X, what="image")


def test_pandas_and_polars_are_not_needed():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['pandas', 'polars', 'torch']))\n"
        "from sklearn_transfer.inputs import containers, folders, images, texts\n"
        "assert 'PIL.Image' not in sys.modules\n"
        "assert texts.text_rows(['a', None], missing='nan').missing.tolist()[1]\n"
        "assert images.image_rows([[[0.0, 1.0]] * 2], image_shape=None)\n"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=root)
