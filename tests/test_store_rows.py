"""The store: claimed once, never believed when wrong, never in the user's way."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sklearn_transfer.exceptions import CacheWarning
from sklearn_transfer.store import index, rows
from sklearn_transfer.store.database import on_network
from sklearn_transfer.store.rows import LARGE, RowStore

ROOT = Path(__file__).parents[1]
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and locks")


def key(n: int) -> bytes:
    return sha256(str(n).encode()).digest()


def vector(n: int, size: int = 64) -> np.ndarray:
    return np.full(size, n, np.float32)


def big(n: int) -> np.ndarray:
    return vector(n, LARGE)  # four times the size that goes to segments


# The same in a child process; argv[1] is the folder.
PRELUDE = """
import os, sys, warnings
import numpy as np
from hashlib import sha256
from sklearn_transfer.store.rows import RowStore, LARGE
key = lambda n: sha256(str(n).encode()).digest()
vector = lambda n, size=64: np.full(size, n, np.float32)
store = RowStore(sys.argv[1])
"""


def start(code: str, folder: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code, str(folder), *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def run(code: str, folder: Path) -> str:
    child = start(code, folder)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    return out


@pytest.fixture
def store(tmp_path):
    store = RowStore(tmp_path / "cache")
    yield store
    store.close()


# -- rows ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        np.arange(512, dtype=np.float32),
        np.arange(24, dtype=np.float64).reshape(2, 3, 4),
        np.arange(24, dtype=">i4").reshape(4, 6)[:, ::2],
        np.arange(6, dtype=np.uint16).reshape(2, 3).T,
        np.float16(3.5),
        np.array([True, False]),
        np.array([1 + 2j]),
        np.zeros((0, 384), np.float32),
        np.arange(LARGE + 1, dtype=np.uint8),
        np.arange(64 * 14 * 14 * 8, dtype=np.float32).reshape(8, 64, 14, 14),
        np.arange(2 * LARGE, dtype=np.float32).reshape(2, LARGE).T,
    ],
    ids=lambda row: f"{row.dtype}{row.shape}",
)
def test_a_row_comes_back_as_it_was(store, row):
    store.put({key(0): row, key(1): vector(1)})
    (found,) = store.get_many([key(0)]).values()
    assert found.dtype == row.dtype
    assert found.shape == row.shape
    np.testing.assert_array_equal(found, row)


def test_only_what_is_asked_for_and_there_is_found(store):
    store.put({key(n): vector(n) for n in range(1200)})
    found = store.get_many([key(n) for n in (*range(600, 1300), 600)])
    assert set(found) == {key(n) for n in range(600, 1200)}
    assert all(found[key(n)][0] == n for n in range(600, 1200))


def test_kinds_do_not_mix(store):
    store.put({key(0): vector(0)})
    store.put({key(1): big(1)}, kind="prefix")
    assert set(store.get_many([key(0), key(1)])) == {key(0)}
    assert set(store.get_many([key(0), key(1)], kind="prefix")) == {key(1)}
    assert store.info() == (1, 256, 0, 2, 1, big(1).nbytes)


def test_what_is_no_array_of_numbers_is_refused(store):
    for wrong in (np.array(["a"]), np.array([None])):
        with pytest.raises(ValueError, match="arrays of numbers"):
            store.put({key(0): wrong})


def test_a_second_object_finds_the_rows(store, tmp_path):
    store.put({key(0): vector(0), key(1): big(1)})
    other = RowStore(tmp_path / "cache")
    assert set(other.get_many([key(0), key(1), key(2)])) == {key(0), key(1)}
    other.close()


def test_nothing_is_made_before_the_first_use(tmp_path):
    store = RowStore(tmp_path / "cache")
    assert store.info() == (0, 0, 0, 0, 0, 0)
    store.clear()
    assert not (tmp_path / "cache").exists()


@posix
def test_folders_and_files_are_private(tmp_path):
    before = os.umask(0)
    try:
        store = RowStore(tmp_path / "cache")
        store.put({key(0): vector(0), key(1): big(1)})
        paths = [tmp_path / "cache", *(tmp_path / "cache").rglob("*")]
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in paths}
        folders = {path.name for path in paths if path.is_dir()}
        store.close()
    finally:
        os.umask(before)
    assert {modes[name] for name in folders} == {0o700}
    assert {modes[name] for name in set(modes) - folders} == {0o600}
    assert any(name.endswith("-wal") for name in modes)


# -- claims --------------------------------------------------------------------


def test_a_key_is_mine_or_stored_or_taken(store):
    store.put({key(0): vector(0)})
    assert store.claim([key(1), key(1)]) == ([key(1)], [], [])
    asked = [key(n) for n in range(3)]
    assert store.claim(asked) == ([key(2)], [key(0)], [key(1)])


def test_put_and_release_end_a_claim(store):
    store.claim([key(0), key(1), key(2)])
    assert not store.wait([key(0), key(1), key(2)], timeout=0)
    store.put({key(0): vector(0)})
    assert store.wait([key(0), key(1)], timeout=20)
    store.release([key(1)])
    assert store.wait([key(1), key(2)], timeout=20)
    asked = [key(n) for n in range(3)]
    assert store.claim(asked) == ([key(1)], [key(0)], [key(2)])


def in_a_thread(function, *arguments):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result(timeout=60)


def owners_of_claims(tmp_path: Path) -> list:
    return execute(tmp_path, "SELECT owner FROM claims")


def test_a_call_holds_its_claims_until_it_ends(store, tmp_path):
    with store.claiming() as call:
        assert store.claim([key(0), key(1)], call) == ([key(0), key(1)], [], [])
        assert in_a_thread(store.claim, [key(0)]) == ([], [], [key(0)])
        assert not in_a_thread(lambda: store.wait([key(0)], timeout=0))
        seen = run("print(*map(len, store.claim([key(0)])))", tmp_path / "cache")
        assert seen.split() == ["0", "0", "1"]
        store.release([key(1)], call)
        assert in_a_thread(store.claim, [key(1)]) == ([key(1)], [], [])
    assert in_a_thread(store.claim, [key(0)]) == ([key(0)], [], [])
    # Not the call's, so they outlive it.
    with store.claiming():
        pass
    assert in_a_thread(store.claim, [key(0), key(1)]) == ([], [], [key(0), key(1)])


def interrupt_after(store, monkeypatch):
    """Make the next write end as if Ctrl-C came right after its commit."""
    write = store._database.write

    def interrupted(work):
        monkeypatch.setattr(store._database, "write", write)
        write(work)
        raise KeyboardInterrupt

    monkeypatch.setattr(store._database, "write", interrupted)


def test_an_interrupt_as_a_claim_is_made_leaves_no_claim(store, tmp_path, monkeypatch):
    store.get_many([key(0)])
    with pytest.raises(KeyboardInterrupt), store.claiming() as call:
        interrupt_after(store, monkeypatch)
        store.claim([key(0)], call)
    assert owners_of_claims(tmp_path) == []
    assert in_a_thread(store.claim, [key(0)]) == ([key(0)], [], [])


def test_a_second_interrupt_as_claims_are_given_up_bars_nobody_here(
    store, tmp_path, monkeypatch
):
    def again(work):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), store.claiming() as call:
        store.claim([key(0), key(1)], call)
        monkeypatch.setattr(store._database, "write", again)
    monkeypatch.undo()
    assert len(owners_of_claims(tmp_path)) == 2
    assert in_a_thread(lambda: store.wait([key(0)], timeout=0))
    other = RowStore(tmp_path / "cache")
    assert in_a_thread(other.claim, [key(0)]) == ([key(0)], [], [])
    other.close()
    with store.claiming():  # the end of the next call tells other processes
        pass
    assert owners_of_claims(tmp_path) == []


def test_a_thread_does_not_wait_for_itself(store):
    with store.claiming() as outer:
        store.claim([key(0)], outer)
        with store.claiming() as inner:
            assert store.wait([key(0)], timeout=0)
            assert store.claim([key(0)], inner) == ([key(0)], [], [])
            store.put({key(0): vector(0)})
        store.put({key(0): vector(0)})
    assert store.info().rows == 1


def test_the_end_of_an_inner_call_leaves_the_outer_ones_claims(store):
    with store.claiming() as outer:
        store.claim([key(0)], outer)
        with store.claiming() as inner:
            store.claim([key(1)], inner)
        asked = [key(0), key(1)]
        assert in_a_thread(store.claim, asked) == ([key(1)], [], [key(0)])


@posix
def test_a_forked_child_ends_no_call_of_its_parent(tmp_path):
    code = """
with store.claiming() as call:
    store.claim([key(0)], call)
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0
        print("ok")
if not child:
    os._exit(0 if store.claim([key(0)])[2] else 1)
"""
    assert run(code, tmp_path / "cache") == "ok\n"


def test_a_call_of_a_store_that_is_off_ends_quietly(tmp_path):
    (tmp_path / "cache").write_text("mine")
    store = RowStore(tmp_path / "cache")
    with pytest.warns(CacheWarning, match="cache=None"), store.claiming() as call:
        assert store.claim([key(0)], call) == ([key(0)], [], [])
    with store.claiming():
        pass


def test_a_transaction_that_an_interrupt_left_open_is_no_damage(store):
    store.put({key(0): vector(0)})
    store._database.connect().execute("BEGIN IMMEDIATE")
    store.put({key(1): vector(1)})
    assert set(store.get_many([key(0), key(1)])) == {key(0), key(1)}


@posix
def test_four_processes_claim_each_key_once(tmp_path):
    code = """
order = np.random.default_rng(int(sys.argv[2])).permutation(600)
print("ready", flush=True)
sys.stdin.readline()
mine = []
for part in order.reshape(-1, 20):
    mine += store.claim([key(n) for n in part.tolist()])[0]
print(b"".join(mine).hex(), flush=True)
sys.stdin.readline()
"""
    children = [start(code, tmp_path / "cache", str(seed)) for seed in range(4)]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    claimed = Counter()
    for child in children:
        mine = bytes.fromhex(child.stdout.readline())
        claimed.update(mine[i : i + 32] for i in range(0, len(mine), 32))
    for child in children:  # alive until here: a dead one's claims would lapse
        child.communicate("end\n", timeout=30)
        assert child.returncode == 0
    assert claimed == Counter([key(n) for n in range(600)])


@posix
def test_a_dead_process_has_no_claims(store, tmp_path):
    code = """
store.claim([key(0), key(1)])
print("claimed", flush=True)
sys.stdin.readline()
"""
    child = start(code, tmp_path / "cache")
    assert child.stdout.readline() == "claimed\n"
    assert store.claim([key(0)]) == ([], [], [key(0)])
    assert not store.wait([key(0)], timeout=0)
    assert len(list(tmp_path.glob("cache/v*/owners/*"))) == 2
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert store.wait([key(0)], timeout=20)
    assert store.claim([key(0)]) == ([key(0)], [], [])
    fresh = RowStore(tmp_path / "cache")  # sweeps at its first use
    assert fresh.claim([key(0), key(1)]) == ([key(1)], [], [key(0)])
    assert len(list(tmp_path.glob("cache/v*/owners/*"))) == 2
    fresh.close()


@posix
def test_looking_at_other_stores_gives_up_no_claim(store, tmp_path):
    # Record locks are lost when the process closes any descriptor of the file.
    store.claim([key(0)])
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "cache")
    other = RowStore(link)
    assert other.claim([key(0)]) == ([], [], [key(0)])
    other.close()
    seen = run("print(*map(len, store.claim([key(0)])))", tmp_path / "cache")
    assert seen.split() == ["0", "0", "1"]


def test_threads_compute_each_row_once(store):
    computed = Counter()
    errors = []

    def work(seed):
        try:
            todo = [
                key(n) for n in np.random.default_rng(seed).permutation(200).tolist()
            ]
            while todo:
                mine, _, taken = store.claim(todo[:20])
                computed.update(mine)
                store.put({k: np.frombuffer(k, np.uint8) for k in mine})
                if taken:
                    store.wait(taken, timeout=20)
                found = store.get_many(todo)
                todo = [k for k in todo if k not in found]
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert computed == Counter([key(n) for n in range(200)])


@posix
def test_a_forked_child_is_a_process_of_its_own(tmp_path):
    code = """
store.put({key(0): vector(0), key(9): vector(9, LARGE)})
store.claim([key(1)])
down, up = os.pipe(), os.pipe()
child = os.fork()
if not child:
    seen = store.get_many([key(0), key(9)])
    assert seen[key(0)][0] == 0 and seen[key(9)][0] == 9
    assert store.claim([key(1), key(2)]) == ([key(2)], [], [key(1)])
    store.put({key(3): vector(3), key(4): vector(4, LARGE)})
    os.write(up[1], b"x")
    os.read(down[0], 1)
    os._exit(0)
os.read(up[0], 1)
assert store.claim([key(1), key(2)]) == ([], [], [key(1), key(2)])
store.put({key(5): vector(5, LARGE)})
os.write(down[1], b"x")
assert os.waitpid(child, 0)[1] == 0
assert store.claim([key(1), key(2)]) == ([key(2)], [], [key(1)])
seen = store.get_many([key(n) for n in (0, 3, 4, 5)])
assert sorted(row[0] for row in seen.values()) == [0, 3, 4, 5]
print("ok")
"""
    assert run(code, tmp_path / "cache") == "ok\n"


@posix
def test_a_fork_waits_for_no_lock_of_another_thread(tmp_path):
    code = """
import threading
stop = threading.Event()
def write(n=0):
    while not stop.is_set():
        n += 1
        store.put({key(n): vector(n)})
thread = threading.Thread(target=write)
thread.start()
warnings.simplefilter("ignore", DeprecationWarning)
for n in range(20):
    child = os.fork()
    if not child:
        store.put({key(-n): vector(-n)})
        os._exit(0 if store.get_many([key(-n)]) else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
thread.join()
assert len(store.get_many([key(-n) for n in range(20)])) == 20
print("ok")
"""
    assert run(code, tmp_path / "cache") == "ok\n"


# -- killed, damaged, cleared --------------------------------------------------


@posix
def test_kill_while_writing_loses_nothing_committed_and_invents_nothing(tmp_path):
    code = """
for n in range(10**6):
    store.put({key(4 * n + i): vector(4 * n + i, 64 if i % 2 else LARGE)
               for i in range(4)})
    print(4 * n + 4, flush=True)
"""
    child = start(code, tmp_path / "cache")
    for _ in range(25):
        committed = int(child.stdout.readline())
    child.send_signal(signal.SIGKILL)
    child.communicate()
    store = RowStore(tmp_path / "cache")
    found = store.get_many([key(n) for n in range(committed + 400)])
    assert {key(n) for n in range(committed)} <= set(found)
    for n in range(committed + 400):
        if key(n) in found:
            wanted = vector(n, 64 if n % 2 else LARGE)
            np.testing.assert_array_equal(found[key(n)], wanted)
    store.close()


def test_what_a_dead_writer_left_is_swept(store, tmp_path):
    store.put({key(0): big(0)})
    segments = tmp_path / "cache" / f"v{index.FORMAT_VERSION}" / "segments"
    left = segments / f"999999999-{'0' * 16}-1.rows"
    left.write_bytes(bytes(100))
    other = RowStore(tmp_path / "cache")
    assert set(other.get_many([key(0)])) == {key(0)}
    other.close()
    assert not left.exists()


def execute(tmp_path: Path, statement: str, *values) -> list:
    """Run a statement behind the back of a closed store."""
    path = tmp_path / "cache" / f"v{index.FORMAT_VERSION}" / "rows.sqlite"
    connection = sqlite3.connect(path)
    with connection:
        result = connection.execute(statement, values).fetchall()
    connection.close()
    return result


def test_a_flipped_bit_in_a_small_row_is_noticed(store, tmp_path):
    store.put({key(n): vector(n) for n in range(3)})
    store.close()
    ((row, payload),) = execute(
        tmp_path, "SELECT id, payload FROM payloads JOIN rows USING (id) WHERE key = ?",
        key(1),
    )  # fmt: skip
    flipped = bytes([payload[0] ^ 1]) + payload[1:]
    execute(tmp_path, "UPDATE payloads SET payload = ? WHERE id = ?", flipped, row)
    assert set(store.get_many([key(n) for n in range(3)])) == {key(0), key(2)}
    assert store.claim([key(1)]) == ([key(1)], [], [])
    store.put({key(1): vector(1)})
    assert store.get_many([key(1)])[key(1)][0] == 1


def test_a_flipped_bit_in_a_large_row_is_noticed(store, tmp_path):
    store.put({key(n): big(n) for n in range(3)})
    ((name, start),) = execute(
        tmp_path, "SELECT segment, start FROM rows WHERE key = ?", key(1)
    )
    with open(next(tmp_path.rglob(name)), "r+b") as file:
        file.seek(start + 5)
        byte = file.read(1)[0]
        file.seek(start + 5)
        file.write(bytes([byte ^ 1]))
    assert set(store.get_many([key(n) for n in range(3)])) == {key(0), key(2)}
    assert store.claim([key(1)]) == ([key(1)], [], [])


@pytest.mark.parametrize(
    "change",
    [
        "key = x'00' || substr(key, 2)",
        "dtype = '<i4'",
        "shape = '8,8'",
        "shape = x'ff'",
        "dtype = 'nonsense'",
        "segment = '../../secret', start = 0",
        "segment = 7",
    ],
)
def test_a_record_that_was_changed_is_not_believed(store, tmp_path, change):
    store.put({key(0): vector(0)})
    store.close()
    execute(tmp_path, f"UPDATE rows SET {change}")
    moved = b"\0" + key(0)[1:]
    assert store.get_many([key(0), moved]) == {}


def test_a_missing_or_shortened_segment_is_only_missing_rows(store, tmp_path):
    store.put({key(0): vector(0), key(1): big(1), key(2): big(2)})
    store.close()
    (segment,) = tmp_path.rglob("*.rows")
    os.truncate(segment, segment.stat().st_size - 1)
    fresh = RowStore(tmp_path / "cache")
    assert set(fresh.get_many([key(n) for n in range(3)])) == {key(0), key(1)}
    fresh.close()
    segment.unlink()
    assert set(store.get_many([key(n) for n in range(3)])) == {key(0)}


def garble_header(path):
    with open(path, "r+b") as file:
        file.write(os.urandom(100))


def garble_pages(path):
    with open(path, "r+b") as file:
        file.seek(16384)
        file.write(b"\xff" * (path.stat().st_size - 16384))


def truncate(path):
    os.truncate(path, path.stat().st_size // 2 + 7)


def drop_table(path):
    connection = sqlite3.connect(path)
    connection.execute("DROP TABLE payloads")
    connection.close()


def other_number(path):
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 77")
    connection.close()


@pytest.mark.parametrize(
    "damage", [garble_header, garble_pages, truncate, drop_table, other_number]
)
def test_a_damaged_index_is_rebuilt_with_one_warning(store, tmp_path, damage):
    keys = [key(n) for n in range(100)]
    store.put({key(n): vector(n) for n in range(99)} | {key(99): big(99)})
    store.close()
    damage(next(tmp_path.rglob("rows.sqlite")))
    fresh = RowStore(tmp_path / "cache")
    with pytest.warns(CacheWarning, match="was damaged") as caught:
        assert fresh.get_many(keys) == {}
    assert len(caught) == 1
    assert not list(tmp_path.rglob("*.rows"))
    fresh.put({key(0): vector(0), key(1): big(1)})
    assert set(fresh.get_many(keys)) == {key(0), key(1)}
    # Who had it open all the time goes on with the new one, without a word.
    assert set(store.get_many(keys)) == {key(0), key(1)}
    fresh.close()


def test_an_index_replaced_under_an_open_store_is_noticed(store, tmp_path):
    store.put({key(0): vector(0)})
    store.claim([key(4)])
    other = RowStore(tmp_path / "cache")
    other.put({key(1): vector(1)})
    shutil.rmtree(tmp_path / "cache")
    store.put({key(2): vector(2), key(3): big(3)})
    found = other.get_many([key(n) for n in range(4)])
    assert set(found) == {key(2), key(3)}
    assert not store.broken and not other.broken
    # Claims hold in the new folder as they did in the old.
    store.claim([key(5)])
    seen = run("print(*map(len, store.claim([key(5)])))", tmp_path / "cache")
    assert seen.split() == ["0", "0", "1"]
    other.close()


def test_another_format_is_ignored_and_left_alone(store, tmp_path, monkeypatch):
    store.put({key(0): vector(0)})
    monkeypatch.setattr(index, "FORMAT_VERSION", index.FORMAT_VERSION + 1)
    newer = RowStore(tmp_path / "cache")
    assert newer.get_many([key(0)]) == {}
    newer.put({key(0): vector(7)})
    newer.close()
    assert store.get_many([key(0)])[key(0)][0] == 0


def test_counters_add_up_over_processes(store, tmp_path):
    store.put({key(0): vector(0)})
    store.count(hits=3)
    run("store.put({key(1): vector(1)}); store.count(hits=4)", tmp_path / "cache")
    assert store.info()[:4] == (2, 512, 7, 2)


def size_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.*"))


def test_clear_empties_and_others_go_on(store, tmp_path):
    other = RowStore(tmp_path / "cache")
    other.put({key(n): vector(n, 4096) for n in range(50)} | {key(99): big(99)})
    other.claim([key(100)])
    view = other.get_many([key(99)])[key(99)]
    before = size_on_disk(tmp_path)
    store.clear()
    assert store.info() == (0, 0, 0, 0, 0, 0)
    assert size_on_disk(tmp_path) < before / 4
    assert not list(tmp_path.rglob("*.rows"))
    assert view[0] == 99
    assert store.claim([key(100)]) == ([], [], [key(100)])
    assert other.get_many([key(0), key(99)]) == {}
    other.put({key(0): vector(0), key(99): big(98)})
    assert store.get_many([key(0), key(99)])[key(99)][0] == 98
    other.close()


# -- the budget ----------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=1e9)
    monkeypatch.setattr(
        rows,
        "time",
        SimpleNamespace(time=lambda: now.seconds, monotonic=rows.time.monotonic),
    )
    return now


@pytest.mark.parametrize("make", [vector, big], ids=["small", "large"])
def test_eviction_keeps_the_recently_used_within_the_budget(tmp_path, clock, make):
    one = make(0).nbytes
    store = RowStore(tmp_path / "cache", max_bytes=20 * one)
    for n in range(20):
        clock.seconds += 100
        store.put({key(n): make(n)})
    assert store.info().rows == 20
    clock.seconds += 100
    store.get_many([key(0), key(3)])
    clock.seconds += 100
    store.put({key(20): make(20)})
    held = set(store.get_many([key(n) for n in range(21)]))
    assert {key(0), key(3), key(20)} <= held
    assert not {key(1), key(2)} & held
    assert store.info().bytes == len(held) * one <= 18 * one
    segments = sum(path.stat().st_size for path in tmp_path.rglob("*.rows"))
    assert segments <= 20 * one
    clock.seconds += 1000  # all of them were looked at a moment ago
    for n in range(100, 160):
        clock.seconds += 100
        store.put({key(n): make(n)})
        assert store.info().bytes <= 20 * one
    assert key(159) in store.get_many([key(159)])
    store.close()


def test_a_row_larger_than_the_budget_is_no_trouble(tmp_path):
    store = RowStore(tmp_path / "cache", max_bytes=1000)
    with pytest.warns(CacheWarning, match="budget of 1,000 bytes"):
        store.put({key(0): vector(0), key(1): big(1)})
    assert store.info().bytes <= 1000
    store.put({key(2): vector(2)})
    assert key(2) in store.get_many([key(2)])
    store.close()


def test_rows_that_are_looked_at_survive_their_eviction(tmp_path):
    store = RowStore(tmp_path / "cache", max_bytes=4 * big(0).nbytes)
    store.put({key(0): big(0)})
    view = store.get_many([key(0)])[key(0)]
    with pytest.warns(CacheWarning, match="is full"):
        for n in range(1, 10):
            store.put({key(n): big(n)})
    assert store.get_many([key(0)]) == {}
    np.testing.assert_array_equal(view, big(0))
    store.close()


@pytest.mark.parametrize("make", [vector, big], ids=["small", "large"])
def test_a_budget_too_small_for_the_work_is_told_once(tmp_path, clock, make):
    store = RowStore(tmp_path / "cache", max_bytes=20 * make(0).nbytes)
    store.put({key(n): make(n) for n in range(20)})
    clock.seconds += 601
    store.put({key(20): make(20)})  # what leaves has long not been used
    clock.seconds += 590
    message = r"SKLEARN_TRANSFER_CACHE_BYTES=\d+ .* or name a folder"
    with pytest.warns(CacheWarning, match=message) as caught:
        for start in (30, 60):
            store.put({key(start + n): make(n) for n in range(20)})
    assert len(caught) == 1
    told = str(caught[0].message)
    assert str(store.folder) in told and f"{store.max_bytes:,} bytes" in told
    assert caught[0].filename == __file__
    store.close()


def test_the_last_use_is_noted_once_a_minute(store, tmp_path, clock):
    store.put({key(0): vector(0)})
    started = clock.seconds
    for step, noted in ((30, 0), (50, 80), (30, 80), (31, 141)):
        clock.seconds += step
        store.get_many([key(0)])
        assert execute(tmp_path, "SELECT used FROM rows") == [(started + noted,)]


# -- folders that cannot be used -----------------------------------------------


def test_a_file_in_the_folders_place_turns_the_store_off(tmp_path):
    (tmp_path / "cache").write_text("mine")
    store = RowStore(tmp_path / "cache")
    with pytest.warns(CacheWarning, match="cache=None") as caught:
        assert store.get_many([key(0)]) == {}
    assert len(caught) == 1 and str(tmp_path / "cache") in str(caught[0].message)
    store.put({key(0): vector(0), key(1): big(1)})
    assert store.get_many([key(0)]) == {}
    assert store.claim([key(0), key(1)]) == ([key(0), key(1)], [], [])
    assert store.wait([key(0)], timeout=20)
    store.release([key(0)])
    store.count(hits=1)
    store.clear()
    assert store.info() == (0, 0, 0, 0, 0, 0)
    assert (tmp_path / "cache").read_text() == "mine"
    again = RowStore(tmp_path / "cache")  # the process was told already
    assert again.claim([key(0)]) == ([key(0)], [], [])


@posix
@pytest.mark.parametrize("size", ["64", "LARGE"], ids=["small", "large"])
def test_a_full_disk_turns_the_store_off(store, tmp_path, size):
    # A limit on the size of files fails as a full disk does: in the middle of a
    # write, in the index as in a segment.
    code = f"""
import resource
store.claim([key(0), key(10**9)])
resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for n in range(5000):
        store.put({{key(n): vector(n, {size})}})
        if n > 50 and store.broken:
            break
print(store.broken, [type(w.message).__name__ for w in caught])
print(store.get_many([key(0)]), len(store.claim([key(0)])[0]), flush=True)
sys.stdin.readline()
"""
    child = start(code, tmp_path / "cache")
    assert child.stdout.readline() == "True ['CacheWarning']\n"
    assert child.stdout.readline() == "{} 1\n"
    # Still alive, but nobody waits for what it had claimed.
    assert store.claim([key(10**9)]) == ([key(10**9)], [], [])
    found = store.get_many([key(n) for n in range(5000)])
    assert found
    for n in range(5000):
        assert key(n) not in found or (found[key(n)] == n).all()
    child.communicate("end\n", timeout=30)


def test_the_folder_taken_away_by_its_maker_is_no_news(tmp_path):
    def gone():
        raise rows.FolderGone("over")

    store = RowStore(tmp_path / "cache", prepare=gone)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.claim([key(0)]) == ([key(0)], [], [])
    assert store.broken


def test_network_file_systems_are_known(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/vda / ext4 rw 0 0\nhost:/home /home nfs4 rw 0 0\n"
        "tmpfs /home/me/fast tmpfs rw 0 0\n"
        "//host/my\\040share /mnt/a\\040b cifs rw 0 0\n"
    )
    on = {
        path: on_network(Path(path), str(mounts))
        for path in (
            "/var/rows.sqlite",
            "/home/me/rows.sqlite",
            "/home/me/fast/rows.sqlite",
            "/mnt/a b/rows.sqlite",
        )
    }
    assert list(on.values()) == [False, True, False, True]


def test_without_a_write_ahead_log_it_works_too(tmp_path, monkeypatch):
    monkeypatch.setattr("sklearn_transfer.store.database.on_network", lambda path: True)
    one, two = RowStore(tmp_path / "cache"), RowStore(tmp_path / "cache")
    one.claim([key(0)])
    assert two.claim([key(0), key(1)]) == ([key(1)], [], [key(0)])
    one.put({key(0): vector(0)})
    assert key(0) in two.get_many([key(0)])
    assert not list(tmp_path.rglob("*-wal"))
    one.close()
    two.close()


def test_importing_the_store_loads_no_heavy_package():
    code = (
        "import sys, sklearn_transfer.store.session\n"
        "print(*{'torch', 'sklearn', 'scipy', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == ""
