"""Long runs hold on to nothing, and processes do not crowd each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
THREADS = {"OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"}
pytestmark = pytest.mark.skipif(os.name != "posix", reason="counts POSIX files")


def slope(x: np.ndarray, y: np.ndarray) -> float:
    """The median over all pairs of points, which no single jump moves."""
    i, j = np.triu_indices(len(x), 1)
    return float(np.median((y[j] - y[i]) / (x[j] - x[i])))


@pytest.mark.parametrize(
    "what, full, least, growth",
    [("fit", 200, 24, 12e6), ("transform", 10_000, 600, 3e6)],
    ids=["fit", "transform"],
)
@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
def test_memory_threads_and_files_stay_flat(
    what, full, least, growth, cached, amount, outcome, start, tmp_path
):
    """``growth`` bytes at most over all: one kept network a fit would be 36 MB."""
    from tests.stress import workers

    n, cache = amount(full, least=least), str(tmp_path / "cache") if cached else None
    looks, told = start(workers.repeat, what, cache, n, 12).result()
    assert told == []
    done, memory, threads, files = np.array(looks, float).T
    assert threads.max() == threads[0] and files.max() == files[0]
    per_call = slope(done, memory)
    assert per_call * n < growth
    outcome(
        "200 fits and 10,000 transforms in one process: memory, threads and file "
        "handles stay flat",
        f"{n:,} {what}s, {'with a cache' if cached else 'without one'}",
        f"{per_call:+,.0f} bytes a call (median slope), {threads[-1]:.0f} threads, "
        f"{files[-1]:.0f} files throughout",
    )


def test_a_search_on_two_processes(outcome, tmp_path):
    """As a user runs it: nothing limits the threads of his own process."""
    environment = {k: v for k, v in os.environ.items() if k not in THREADS}
    done = subprocess.run(
        [sys.executable, "-m", "tests.stress.workers", "compare", str(tmp_path)],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    counts = list(told["workers"].values())
    assert counts and max(counts) * 2 <= max(told["here"], 2)
    assert told["alone"] == told["together"] and told["gap"] <= 1e-3
    outcome(
        "No more threads than cores under n_jobs=2: torch's threads are limited in "
        "workers",
        f"a search on {len(counts)} workers, {told['here']} threads in their parent",
        f"{max(counts)} thread a worker",
    )
    outcome(
        "n_jobs=2 makes the choices of n_jobs=1, with probabilities within 1e-3",
        "a search over depth and batch size, 2 folds",
        f"the same choice, probabilities within {told['gap']:.1g}",
    )
