"""Keys: the same row has the same key everywhere, and no other row has it."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from sklearn_transfer.store import keys
from sklearn_transfer.store.keys import KeyMaker, row_key

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Recipe:
    size: int = 224
    mean: tuple[float, ...] = (0.485, 0.456)
    prompt: str = ""


SHARED = {
    "recipe": Recipe(),
    "fingerprint": "f00d",
    "dtype": "float32",
    "boundary": "taps avg (5,)",
}


def test_every_ingredient_changes_the_key():
    variants = [
        SHARED,
        SHARED | {"recipe": Recipe(size=160)},
        SHARED | {"recipe": Recipe(prompt="query: ")},
        SHARED | {"fingerprint": "f00e"},
        SHARED | {"dtype": "bfloat16"},
        SHARED | {"boundary": "taps avg (4,)"},
    ]
    made = [
        row_key(content, **shared)
        for shared, content in itertools.product(variants, (b"", b"cat", b"dog"))
    ]
    assert len(set(made)) == len(made)
    assert {len(key) for key in made} == {32}


def test_parts_do_not_run_into_each_other():
    shared = SHARED | {"fingerprint": "ab", "dtype": "c"}
    shifted = SHARED | {"fingerprint": "a", "dtype": "bc"}
    assert row_key(b"x", **shared) != row_key(b"x", **shifted)
    assert row_key(b"x", **SHARED) != row_key(
        b"", **SHARED | {"boundary": SHARED["boundary"] + "x"}
    )


def test_one_maker_gives_what_single_keys_are():
    maker = KeyMaker(**SHARED)
    contents = [b"a", b"b", b"a"]
    assert [maker.key(c) for c in contents] == [row_key(c, **SHARED) for c in contents]


def test_another_process_makes_the_same_key():
    code = (
        "from sklearn_transfer.store.keys import row_key\n"
        "print(row_key(b'x', recipe=(1, 'a', 0.1), fingerprint='f', dtype='d',"
        " boundary='b').hex())"
    )
    there = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    here = row_key(b"x", recipe=(1, "a", 0.1), fingerprint="f", dtype="d", boundary="b")
    assert there.stdout.strip() == here.hex()


def test_the_key_version_enters(monkeypatch):
    before = row_key(b"x", **SHARED)
    monkeypatch.setattr(keys, "KEY_VERSION", keys.KEY_VERSION + 1)
    assert row_key(b"x", **SHARED) != before


def test_text_that_no_encoding_takes_still_has_a_key():
    lone = replace(SHARED["recipe"], prompt="\ud800")
    assert row_key(b"x", **SHARED | {"recipe": lone, "boundary": "\ud800"})


def test_a_recipe_that_does_not_tell_its_values_is_refused():
    @dataclass(frozen=True)
    class Forgetful:
        size: int = field(default=1, repr=False)

    with pytest.raises(ValueError, match="size"):
        row_key(b"x", **SHARED | {"recipe": Forgetful()})
    with pytest.raises(ValueError, match="plain values"):
        row_key(b"x", **SHARED | {"recipe": object()})
