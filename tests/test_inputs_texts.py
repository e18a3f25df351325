"""Texts come out as python strings, whatever container held them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import polars as pl
import pytest

from sklearn_transfer.exceptions import UnreadableRowsError
from sklearn_transfer.inputs.texts import text_rows

TEXTS = ["a text", "", "Ünïcode 🙂"]

CONTAINERS = {
    "list": list,
    "tuple": tuple,
    "ndarray of str": np.array,
    "ndarray of object": lambda t: np.array(t, dtype=object),
    "ndarray of StringDType": lambda t: np.array(t, dtype=np.dtypes.StringDType()),
    "column of object": lambda t: np.array(t, dtype=object)[:, None],
    "list of lists": lambda t: [[text] for text in t],
    "list of numpy str": lambda t: [np.str_(text) for text in t],
    "pandas str": pd.Series,
    "pandas object": lambda t: pd.Series(t, dtype=object),
    "pandas string": lambda t: pd.Series(t, dtype="string"),
    "pandas categorical": lambda t: pd.Series(t, dtype="category"),
    "pandas Index": pd.Index,
    "pandas odd index": lambda t: pd.Series(t, index=[7, 7, -1]),
    "pandas frame": lambda t: pd.DataFrame({"text": t}),
    "polars Series": pl.Series,
    "polars categorical": lambda t: pl.Series(t, dtype=pl.Categorical),
    "polars object": lambda t: pl.Series(t, dtype=pl.Object),
    "polars frame": lambda t: pl.DataFrame({"text": t}),
}


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
def test_every_container_gives_the_same_python_strings(container):
    rows = text_rows(container(TEXTS))
    assert rows.texts == TEXTS
    assert {type(text) for text in rows.texts} == {str}
    assert not rows.missing.any()


def test_arrow_strings_are_strings():
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    series = pd.Series(TEXTS, dtype=pd.ArrowDtype(pyarrow.string()))
    assert text_rows(series).texts == TEXTS


MISSING = {
    "None": lambda: ["a", None, ""],
    "NaN": lambda: ["a", float("nan"), ""],
    "pandas NA": lambda: ["a", pd.NA, ""],
    "NaT": lambda: ["a", pd.NaT, ""],
    "pandas str": lambda: pd.Series(["a", None, ""]),
    "pandas string": lambda: pd.Series(["a", None, ""], dtype="string"),
    "pandas categorical": lambda: pd.Series(["a", None, ""], dtype="category"),
    "polars": lambda: pl.Series(["a", None, ""]),
    "object array": lambda: np.array(["a", None, ""], dtype=object),
}


@pytest.mark.parametrize("make", MISSING.values(), ids=MISSING)
def test_missing_texts_are_named_replaced_or_marked(make):
    with pytest.raises(UnreadableRowsError) as caught:
        text_rows(make())
    assert caught.value.rows == {1: "missing"}
    assert "row 1." in str(caught.value)
    assert 'missing="empty"' in str(caught.value)
    empty = text_rows(make(), missing="empty")
    assert empty.texts == ["a", "", ""] and not empty.missing.any()
    marked = text_rows(make(), missing="nan")
    assert marked.texts == ["a", "", ""]
    assert marked.missing.tolist() == [False, True, False]


def test_long_lists_of_bad_rows_are_cut():
    with pytest.raises(UnreadableRowsError, match=r"rows 0, 1, 2, 3, 4, \.\.\.") as e:
        text_rows([None] * 100)
    assert len(e.value.rows) == 100


@pytest.mark.parametrize(
    "X, kind",
    [
        (["a", 3], "int"),
        (["a", ["b", "c"]], "list"),
        (pd.Series([1.5, 2.5]), "float"),
        (np.arange(3), "int"),
        (pl.Series([1, 2]), "int"),
        (["a", None, 2, "c"], "int"),
    ],
)
def test_non_strings_are_named_with_their_type_and_the_fix(X, kind):
    with pytest.raises(UnreadableRowsError, match=rf"{kind}.*\.astype\(str\)") as e:
        text_rows(X, missing="empty")
    assert e.value.rows and all(kind in why for why in e.value.rows.values())


def test_bytes_are_to_be_decoded():
    with pytest.raises(UnreadableRowsError, match=r"bytes: row 1.*text\.decode\(\)"):
        text_rows(["a", b"b"])


def test_missing_is_checked():
    with pytest.raises(ValueError, match="'error', 'empty', 'nan'"):
        text_rows(["a"], missing="drop")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a\ud800b", "a\ufffdb"),
        ("a\udfffb", "a\ufffdb"),
        ("end\ud800", "end\ufffd"),
        ("\udc80\ud800", "\ufffd\ufffd"),
        ("pair \ud83d\ude42", "pair 🙂"),
        ("\ufeffmark\ud800", "\ufeffmark\ufffd"),
    ],
)
def test_lone_surrogates_are_replaced_and_digested_so(text, expected):
    rows = text_rows([text, expected])
    assert rows.texts == [expected, expected]
    assert rows.digest(0) == rows.digest(1)


def test_digests_tell_texts_apart():
    rows = text_rows(["a", "b", "", "a ", "a\0"])
    digests = {rows.digest(i) for i in range(5)}
    assert len(digests) == 5 and {len(d) for d in digests} == {32}
    assert text_rows(pd.Series(["a"])).digest(0) == rows.digest(0)


def test_rows_are_named_by_position_and_beginning():
    rows = text_rows(["short", "word " * 40])
    assert rows.name(0) == "row 0 ('short')"
    assert rows.name(1).startswith("row 1 ('word word") and len(rows.name(1)) < 60
    assert len(rows) == 2
