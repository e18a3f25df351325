"""The benchmarks' own arithmetic: what they would say if it were wrong."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import benchmarks
from benchmarks.__main__ import NAMES
from benchmarks._common import Figure, in_turns, speedup, spread, table_row
from benchmarks.memory import SIZE, write_distinct
from benchmarks.texts import with_repeats
from sklearn_transfer.inputs.images import image_rows

FOLDER = Path(benchmarks.__file__).parent
# They make weights and defaults, take hours, and are no table of figures.
MADE_BY_HAND = {"train_embedded", "defaults"}


@pytest.mark.parametrize("name", NAMES)
def test_each_names_its_peer_and_runs_the_same_way(name):
    module = import_module(f"benchmarks.{name}")
    assert "Peer" in module.__doc__
    parameters = inspect.signature(module.main).parameters
    assert list(parameters) == ["quick", "data"]
    assert parameters["quick"].default is False


def test_the_command_runs_every_benchmark():
    scripts = {p.stem for p in FOLDER.glob("*.py") if not p.stem.startswith("_")}
    assert scripts - MADE_BY_HAND == set(NAMES)


@pytest.mark.parametrize(
    ("value", "bounds", "met"),
    [
        (3.0, {"at_least": 3}, True),
        (2.9, {"at_least": 3}, False),
        (2.9, {"at_least": 1, "aim": 3}, True),
        (1.2, {"at_least": 1, "at_most": 1.1}, False),
        (-5.0, {"at_most": 0.05}, True),
        (math.nan, {"at_least": 0}, False),
        (math.nan, {"at_most": 0}, False),
        (1.0, {"aim": 3}, None),
    ],
)
def test_bounds_decide_and_the_aim_does_not(value, bounds, met):
    assert Figure("", "", "", value, **bounds).met is met


def test_a_missed_bound_stands_out_in_the_table():
    row = table_row(Figure("speed", "1 s", "2 s", 2.0, "x", at_least=3, aim=5))
    assert row == "| speed | 1 s | 2 s | 2 x | ≥ 3 | 5 | **no** |"


def test_both_sides_warm_up_and_then_take_turns():
    calls = []
    functions = {"ours": lambda: calls.append("o"), "peer": lambda: calls.append("p")}
    seconds = in_turns(functions, repeats=2)
    assert "".join(calls) == "op" + "opop"
    assert [len(values) for values in seconds.values()] == [2, 2]


def test_the_ratio_is_within_rounds_so_that_a_slow_machine_slows_both():
    # The machine was ten times slower in the last two rounds.
    seconds = {"ours": [1.0, 10.0, 10.0], "loop": [4.0, 40.0, 4.0]}
    figure = speedup("", seconds, "loop", 20, "rows")
    assert figure.value == 4.0
    assert (figure.ours, figure.peer) == ("2.0 rows/s", "5.0 rows/s (loop)")


def test_fewer_rows_are_spread_over_sorted_classes():
    assert spread(10, 5) == [0, 2, 4, 6, 8]
    assert spread(10, None) == spread(10, 99) == list(range(10))


def test_files_of_one_picture_differ_in_bytes_alone(image_files, tmp_path):
    paths = write_distinct(image_files[:1], tmp_path, 3)
    rows = image_rows(paths)
    assert len({rows.digest(i) for i in range(3)}) == 3
    first, *others = (np.asarray(Image.open(path)) for path in paths)
    assert first.shape == (SIZE[1], SIZE[0], 3)
    assert all(np.array_equal(first, other) for other in others)


def test_repeats_are_as_many_as_said():
    rows = with_repeats([str(i) for i in range(200)], 100)
    assert len(rows) == 100
    assert len(set(rows)) == 5


def test_without_data_the_command_says_what_to_write(tmp_path):
    command = [sys.executable, "-m", "benchmarks.grid_search", "--data"]
    done = subprocess.run(
        [*command, str(tmp_path / "none")],
        cwd=FOLDER.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "none" in done.stderr
    assert "--data FOLDER" in done.stderr
