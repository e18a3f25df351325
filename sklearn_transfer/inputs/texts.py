"""Texts: what came as X, as python strings with digests."""

from __future__ import annotations

import hashlib

import numpy as np

from sklearn_transfer.exceptions import UnreadableRowsError
from sklearn_transfer.inputs.containers import Rows, as_rows, is_missing

_MISSING = ("error", "empty", "nan")
_SHOWN_ROWS = 5


class TextRows:
    """Texts in row order.

    Attributes
    ----------
    texts : list of str
        Well-formed unicode; "" where a text is missing.
    missing : ndarray of bool, shape (n,)
        Rows to be answered with NaN; all False unless ``missing="nan"``.
    """

    def __init__(self, texts: list[str], missing: np.ndarray):
        self.texts = texts
        self.missing = missing

    def __len__(self) -> int:
        return len(self.texts)

    def name(self, i: int) -> str:
        """How row ``i`` is called in messages."""
        text = self.texts[i]
        return f"row {i} ({text if len(text) <= 40 else text[:39] + '…'!r})"

    def digest(self, i: int) -> bytes:
        """Sha256 of text ``i``, 32 bytes."""
        return hashlib.sha256(b"text\0" + self.texts[i].encode()).digest()


def text_rows(X, missing: str = "error", reader: str | None = None) -> TextRows:
    """Read X as texts.

    Parameters
    ----------
    X : list, array, Series or DataFrame of one column
        Of strings. ``""`` is a text; None, NaN and NA are missing.
    missing : {"error", "empty", "nan"}, default="error"
        What a missing text does: raise, count as "", or be marked so that its
        features become NaN.
    reader : str, default=None
        The estimator that messages speak of, as for `as_rows`.

    Raises
    ------
    UnreadableRowsError
        If a text is missing under ``missing="error"``, or is no string.
    """
    if missing not in _MISSING:
        raise ValueError(
            f"missing={missing!r} is not one of {', '.join(map(repr, _MISSING))}."
        )
    rows = as_rows(X, what="text", reader=reader)
    absent = np.fromiter((is_missing(row) for row in rows), bool, len(rows))
    _refuse_non_strings(rows, absent)
    if missing == "error" and absent.any():
        bad = np.flatnonzero(absent).tolist()
        raise UnreadableRowsError(
            f"{len(bad)} of {len(rows)} texts are missing: {_listed(bad)}. Write "
            'missing="empty" to read them as ""'
            + (', or missing="nan" for NaN features.' if reader is None else "."),
            dict.fromkeys(bad, "missing"),
        )
    texts = [
        "" if gone else _well_formed(row)
        for row, gone in zip(rows, absent, strict=True)
    ]
    return TextRows(texts, absent if missing == "nan" else np.zeros_like(absent))


def _refuse_non_strings(rows: Rows, absent: np.ndarray) -> None:
    bad = {
        i: f"a {type(row).__name__}, not a string"
        for i, (row, gone) in enumerate(zip(rows, absent, strict=True))
        if not gone and not isinstance(row, str)
    }
    if bad:
        types = sorted({type(rows[i]).__name__ for i in bad})
        fix = (
            "[text.decode() for text in X]"
            if types == ["bytes"]
            else "pandas.Series(X).astype(str)"
        )
        raise UnreadableRowsError(
            f"{len(bad)} of {len(rows)} texts are not strings but "
            f"{' and '.join(types)}: {_listed(list(bad))}. Convert them, for example "
            f"{fix}.",
            bad,
        )


def _listed(positions: list[int]) -> str:
    shown = ", ".join(map(str, positions[:_SHOWN_ROWS]))
    more = ", ..." if len(positions) > _SHOWN_ROWS else ""
    return f"row{'s' if len(positions) > 1 else ''} {shown}{more}"


def _well_formed(text: str) -> str:
    """Python's own str, each lone surrogate replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        # Tokenizers raise an opaque TypeError for these. Pairs of surrogates, as
        # some JSON readers leave them, make the character that they stand for.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return str(text)
