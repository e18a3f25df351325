"""Several processes, some of them killed: what is stored is right, and shared."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from sklearn_transfer.running.encode import WRITE_ROWS
from sklearn_transfer.store.session import cache_info

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs kill -9 and fork")

KILL_ROWS = 768
# Rows in one killed process that may be lost: those that waited to be written, and
# a batch on its way through the network.
UNFINISHED = WRITE_ROWS + 2 * 32


def size_of(folder: Path) -> int:
    """Bytes of all files; one may vanish between two looks."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(path, name)).st_size
            except FileNotFoundError:
                continue
    return total


def kill_while_it_grows(start, kind, cache, seed, rng, encoded) -> bool:
    """Kill a writer once the store has grown by some bytes; False if it was done."""
    from tests.stress import workers

    row_bytes = {"row": 1500, "prefix": 8 * 8 * 32 * 4}[kind]
    before = size_of(cache)
    enough = before + int(rng.uniform(0.02, 0.8) * KILL_ROWS * row_bytes)
    child = start(workers.write, kind, str(cache), KILL_ROWS, seed, encoded)
    while size_of(cache) < enough and child.process.is_alive():
        time.sleep(0.0005)
    child.kill()
    return child.process.exitcode == -9


def test_kill_9_of_a_writer_while_another_reads(amount, outcome, start, tmp_path):
    from tests.stress import workers

    n_kills, rng = amount(50, least=4), np.random.default_rng(0)
    ours, theirs = workers.CONTEXT.Pipe()
    reader = start(workers.read, theirs)
    n_killed, seed, recomputed = 0, 0, []
    while n_killed < n_kills:
        seed += 1
        assert seed < 3 * n_kills + 10, "writers end before they are killed"
        kind = ("row", "prefix")[seed % 2]
        cache = tmp_path / f"cache-{seed // 6}"
        ours.send((kind, str(cache), KILL_ROWS, seed))
        assert ours.poll(workers.PATIENCE)
        truth = ours.recv()
        held = cache_info(cache)
        encoded = workers.CONTEXT.Value("q", 0)
        was_killed = kill_while_it_grows(start, kind, cache, seed, rng, encoded)
        (before, after, rows), told = start(
            workers.finish, kind, str(cache), KILL_ROWS, seed
        ).result()
        ours.send("stop")
        wrong, broken = ours.recv()
        assert not wrong and not broken and told == []
        assert workers.agree(kind, rows, truth)
        survived = sum(before[i] - held[i] for i in (0, 4))
        assert sum(after[i] - held[i] for i in (0, 4)) == KILL_ROWS
        # What survived was not computed again, and what did not was not much.
        assert after.misses - before.misses == KILL_ROWS - survived
        assert encoded.value - survived <= UNFINISHED
        if was_killed and survived < KILL_ROWS:
            n_killed += 1
            recomputed.append(encoded.value - survived)
    ours.send(None)
    n_read, told = reader.result()
    assert told == [] and n_read > 20 * n_kills
    outcome(
        "Kill -9 of a process that writes rows or prefixes, while another reads: the "
        "store opens, no wrong vector is returned, at most the unfinished batch is "
        "computed again",
        f"{n_killed} kills, {n_read:,} vectors read meanwhile",
        f"0 wrong; {np.median(recomputed):.0f} rows computed again a kill, at most "
        f"{max(recomputed)}",
    )


def test_eight_processes_share_one_cache(amount, outcome, start, tmp_path):
    from tests.stress import workers

    n, n_processes = amount(20_000, least=800), 8
    barrier = workers.CONTEXT.Barrier(n_processes)
    encoded = workers.CONTEXT.Value("q", 0)
    cache = str(tmp_path / "cache")
    children = [
        start(workers.take_part, cache, n, seed, barrier, encoded)
        for seed in range(n_processes)
    ]
    truth = workers.featurizer(None, layers="last").fit_transform(
        workers.pictures(n, 0)
    )
    for child in children:
        (features, broken), told = child.result()
        assert told == [] and not broken
        np.testing.assert_allclose(features, truth, rtol=1e-4, atol=1e-6)
    info = cache_info(cache)
    assert info.rows == n <= encoded.value
    assert max(encoded.value, info.misses) <= 1.01 * n
    outcome(
        "8 processes share a persistent cache: no lock error reaches the user, at most "
        "1 % of the rows are encoded twice",
        f"{n:,} rows, asked for in 8 orders",
        f"0 errors, 0 warnings; {encoded.value - n} rows encoded twice",
    )


@pytest.mark.parametrize("modality", ["images", "texts"])
def test_the_same_in_every_process_cold_and_warm(
    modality, amount, outcome, start, tmp_path
):
    from tests.stress import workers

    n = amount(20, least=2)
    cache = str(tmp_path / "cache")
    caches = [cache, cache, None, *(str(tmp_path / str(i)) for i in range(n))]
    found = []
    for where in caches:  # one after the other: the second finds the first's rows
        (proba, left_alone), told = start(
            workers.predict_proba, modality, where
        ).result()
        assert told == [] and left_alone
        found.append(proba)
    assert np.ptp(found[0][:, 0]) > 0.01  # no constant
    for proba in found[1:]:
        np.testing.assert_array_equal(proba, found[0])
    outcome(
        "Same seed, machine and number of threads: the same result to the last bit, in "
        "another process, with a cold, a warm or no store; global random states stay",
        f"{len(caches)} fits on {modality}, a process each",
        "all equal",
    )
