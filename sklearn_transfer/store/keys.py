"""What makes two rows the same row: a key over everything that shapes its values."""

from __future__ import annotations

import dataclasses
import hashlib

# Raise by one whenever the same content, recipe, fingerprint, dtype and boundary
# would give other features than before, or are encoded otherwise: a fix in the
# preprocessing, a new field with a new meaning. Old rows are then never found
# again, and leave as the least recently used do.
KEY_VERSION = 1


class KeyMaker:
    """Keys of many contents that share everything else.

    Parameters
    ----------
    recipe : object
        How content becomes the network's input: a frozen dataclass of plain
        values, whose representation enters the key.
    fingerprint : str
        Of the backbone: weights and architecture.
    dtype : str
        In which the network computes.
    boundary : str
        Which stage is stored, and how it is pooled.

    Raises
    ------
    ValueError
        If the recipe's representation does not tell its values.
    """

    def __init__(self, recipe: object, fingerprint: str, dtype: str, boundary: str):
        parts = (str(KEY_VERSION), _told(recipe), fingerprint, dtype, boundary)
        self._shared = hashlib.sha256(b"sklearn_transfer row")
        for part in parts:
            _append(self._shared, part.encode("utf-8", "surrogatepass"))

    def key(self, content: bytes) -> bytes:
        """The 32 bytes under which the row of this content is stored."""
        state = self._shared.copy()
        _append(state, content)
        return state.digest()


def row_key(
    content: bytes, *, recipe: object, fingerprint: str, dtype: str, boundary: str
) -> bytes:
    """The 32 bytes under which one row is stored; parameters as for KeyMaker."""
    return KeyMaker(recipe, fingerprint, dtype, boundary).key(content)


def _append(state, part: bytes) -> None:
    """Feed one part, its length first: ("ab", "c") must differ from ("a", "bc")."""
    state.update(len(part).to_bytes(8, "little"))
    state.update(part)


def _told(recipe: object) -> str:
    """The recipe's representation, if it depends on the values and nothing else."""
    text = repr(recipe)
    if " at 0x" in text:
        raise ValueError(
            f"The recipe {text} holds an object without a representation of its "
            "values, so its rows could not be found again. Use plain values: "
            "str, int, float, bool, None and tuples of these."
        )
    fields = dataclasses.fields(recipe) if dataclasses.is_dataclass(recipe) else ()
    hidden = [field.name for field in fields if not field.repr]
    if hidden:
        raise ValueError(
            f"The recipe {text} leaves out {', '.join(hidden)}, so that two "
            "recipes would share rows. Remove field(repr=False)."
        )
    return text
