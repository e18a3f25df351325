"""Stores that are damaged, full or not to be had; files that hide programs."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import sqlite3
import stat
import subprocess
import warnings
from collections import Counter
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from sklearn_transfer.exceptions import CacheWarning, WeightsError
from sklearn_transfer.store import index
from sklearn_transfer.store.rows import RowStore

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX files")

N_ROWS, N_MAPS = 200, 40
KEYS = {
    "row": [sha256(b"row %d" % i).digest() for i in range(N_ROWS)],
    "prefix": [sha256(b"map %d" % i).digest() for i in range(N_MAPS)],
}


def vectors() -> dict[str, np.ndarray]:
    """Features that lie in the index, and activations that lie in segments."""
    rng = np.random.default_rng(0)
    return {
        "row": rng.normal(size=(N_ROWS, 128)).astype(np.float32),
        "prefix": rng.normal(size=(N_MAPS, 8, 8, 16)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def truth() -> dict[str, np.ndarray]:
    return vectors()


@pytest.fixture(scope="module", params=["closed", "as kill -9 leaves it"])
def template(request, truth, tmp_path_factory) -> Path:
    """A folder with rows of both kinds; after a kill half of them are in the log."""
    folder = tmp_path_factory.mktemp("template")
    store = RowStore(folder / "live")
    for kind, rows in truth.items():
        for part in np.array_split(np.arange(len(rows)), 4):
            store.put({KEYS[kind][i]: rows[i] for i in part}, kind)
            other = RowStore(folder / "live")  # another writing process's segment
            other.put({KEYS[kind][i]: rows[i] for i in part}, kind)
            other.close()
    if request.param == "closed":
        store.close()
    shutil.copytree(folder / "live", folder / "still")
    store.close()
    has_log = any(path.stat().st_size for path in folder.glob("still/v*/*-wal"))
    assert has_log == (request.param != "closed")
    return folder / "still"


def files_of(folder: Path) -> list[Path]:
    """The index, its log and the segments, in an order that does not change."""
    wanted = [p for p in folder.glob("v*/*.sqlite*") if p.stat().st_size]
    return sorted(wanted) + sorted(folder.glob("v*/segments/*"))


# -- what may happen to a file ---------------------------------------------------


def truncate(path: Path, rng: random.Random, folder: Path) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def overwrite(path: Path, rng: random.Random, folder: Path) -> None:
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data))
    noise = rng.choice([rng.randbytes(rng.choice([1, 100, 5000])), bytes(16384)])
    data[start : start + len(noise)] = noise
    path.write_bytes(data)


def flip(path: Path, rng: random.Random, folder: Path) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 8, 64])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def exchange(path: Path, rng: random.Random, folder: Path) -> None:
    """Another file's content, as after a repair of the file system."""
    other = rng.choice(files_of(folder))
    path.write_bytes(other.read_bytes())


def remove(path: Path, rng: random.Random, folder: Path) -> None:
    path.unlink()


def grow(path: Path, rng: random.Random, folder: Path) -> None:
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 40_000)))


def renumber(path: Path, rng: random.Random, folder: Path) -> None:
    """The index of another version, or of another program."""
    connection = sqlite3.connect(next(folder.rglob("*.sqlite")))
    number = rng.choice([0, index.FORMAT_VERSION + 1, -1, 2**31 - 1])
    connection.execute(f"PRAGMA user_version = {number}")
    if rng.random() < 0.5:
        table = rng.choice(["rows", "payloads", "claims", "counters"])
        with suppress(sqlite3.OperationalError):  # renamed before
            connection.execute(f"ALTER TABLE {table} RENAME TO {table}_before")
    connection.commit()
    connection.close()


DAMAGES = [truncate, overwrite, flip, exchange, remove, grow, renumber]


def look(store: RowStore, truth) -> Counter:
    """How many rows are found, and how many of them are wrong."""
    seen = Counter()
    for kind, keys in KEYS.items():
        place = dict(zip(keys, truth[kind], strict=True))
        for key, row in store.get_many(keys, kind).items():
            right = row.dtype == np.float32 and np.array_equal(row, place[key])
            seen["right" if right else "wrong"] += 1
    return seen


@pytest.mark.filterwarnings("always::sklearn_transfer.exceptions.CacheWarning")
def test_a_damaged_store_is_never_believed(
    template, truth, amount, outcome, tmp_path, request
):
    n, seen, n_warned = amount(1000, least=42), Counter(), 0
    for i in range(n):
        rng = random.Random(i)
        damage = DAMAGES[i % len(DAMAGES)]
        folder = tmp_path / str(i)
        shutil.copytree(template, folder)
        for _ in range(rng.choice([1, 1, 3])):
            path = rng.choice(files_of(folder))
            if path.stat().st_size:
                damage(path, rng, folder)
        store = RowStore(folder)
        what = f"{damage.__name__}, trial {i}"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = look(store, truth)
            assert not found["wrong"] and not store.broken, what
            # Work goes on with it: what is missing can be stored again.
            for kind, keys in KEYS.items():
                rows = dict(zip(keys, truth[kind], strict=True))
                stored = store.get_many(keys, kind)
                missing = [key for key in keys if key not in stored]
                mine, _, _ = store.claim(missing)
                assert set(mine) == set(missing), what
                store.put({key: rows[key] for key in mine}, kind)
            assert look(store, truth) == {"right": N_ROWS + N_MAPS}, what
        store.close()
        assert all(w.category is CacheWarning for w in caught), what
        assert len(caught) <= 1, what
        n_warned += len(caught)
        seen += found
        shutil.rmtree(folder)
    outcome(
        "Truncated, garbled, exchanged, missing and version-changed files: no wrong "
        "vector, at most one warning, and the cache fills again",
        f"{n:,} stores, {request.node.callspec.id}",
        f"0 wrong of {seen['right']:,} vectors found; {n_warned} rebuilt",
    )


def test_a_flipped_bit_in_a_vector_is_noticed(amount, outcome, truth, tmp_path):
    """In every vector that was hit, and in no other."""
    n = amount(2000, least=120)
    store, rng, n_found = RowStore(tmp_path), random.Random(0), 0
    for start in range(0, n, 40):
        store.clear()
        for kind, keys in KEYS.items():
            store.put(dict(zip(keys, truth[kind], strict=True)), kind)
        hit = {kind: set() for kind in KEYS}
        for i in range(start, min(start + 40, n)):
            kind = ("row", "prefix")[i % 2]
            hit[kind].add(flip_one_bit(tmp_path, kind, rng, hit[kind]))
        for kind, keys in KEYS.items():
            found = store.get_many(keys, kind)
            assert set(keys) - set(found) == hit[kind]
            n_found += len(hit[kind])
    store.close()
    assert n_found == n
    outcome(
        "A flipped bit in a stored vector is detected by its checksum",
        f"{n:,} single bits, half in the index and half in segments",
        "all detected, no other vector lost",
    )


def flip_one_bit(folder: Path, kind: str, rng: random.Random, hit: set) -> bytes:
    """Flip a bit of one stored vector that was not hit yet; its key."""
    key = rng.choice([k for k in KEYS[kind] if k not in hit])
    connection = sqlite3.connect(next(folder.rglob("rows.sqlite")))
    with connection:
        ((row, nbytes, segment, start),) = connection.execute(
            "SELECT id, nbytes, segment, start FROM rows WHERE key = ?", (key,)
        )
        place, bit = rng.randrange(nbytes), 1 << rng.randrange(8)
        if segment is None:
            ((payload,),) = connection.execute(
                "SELECT payload FROM payloads WHERE id = ?", (row,)
            )
            changed = bytearray(payload)
            changed[place] ^= bit
            connection.execute(
                "UPDATE payloads SET payload = ? WHERE id = ?", (bytes(changed), row)
            )
    connection.close()
    if segment is not None:
        with next(folder.rglob(segment)).open("r+b") as file:
            file.seek(start + place)
            byte = file.read(1)[0]
            file.seek(start + place)
            file.write(bytes([byte ^ bit]))
    return key


# -- full disks and folders that cannot be used ----------------------------------


@contextmanager
def mounted(folder: Path, options: str):
    """A file system of its own in memory, unmounted afterwards."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if done.returncode:
        pytest.skip(f"mounting a small disk is not allowed here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def full_from_the_start(tmp_path):
    with mounted(tmp_path / "disk", "size=64k") as disk:
        (disk / "filler").write_bytes(bytes(64 * 1024 - 4096 * 2))
        yield disk / "cache"


@contextmanager
def full_after_a_while(tmp_path):
    with mounted(tmp_path / "disk", "size=600k") as disk:
        yield disk / "cache"


@contextmanager
def no_room_for_names(tmp_path):
    with mounted(tmp_path / "disk", "size=4m,nr_inodes=4") as disk:
        yield disk / "cache"


@contextmanager
def read_only(tmp_path):
    with mounted(tmp_path / "disk", "ro") as disk:
        yield disk / "cache"


@contextmanager
def a_limit_on_files(tmp_path):
    yield tmp_path / "cache"


@contextmanager
def a_file_in_its_place(tmp_path):
    (tmp_path / "cache").write_text("mine")
    yield tmp_path / "cache"


@contextmanager
def below_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    yield tmp_path / "file" / "cache"


FOLDERS = [
    full_from_the_start,
    full_after_a_while,
    no_room_for_names,
    read_only,
    a_limit_on_files,
    a_file_in_its_place,
    below_a_file,
]


@posix
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.__name__)
def test_work_goes_on_without_a_cache(folder, outcome, start, tmp_path):
    from tests.stress import workers

    limit = 150_000 if folder is a_limit_on_files else None
    with folder(tmp_path) as cache:
        results, told = start(workers.work_without_room, str(cache), limit).result()
    assert len(told) == 1 and "cache=None" in told[0], told
    assert told[0].startswith("CacheWarning: The cache folder")
    for name, (found, truth) in results.items():
        np.testing.assert_allclose(found, truth, rtol=1e-4, atol=1e-5, err_msg=name)
    outcome(
        "A full disk or an unusable cache folder: work goes on without the cache, one "
        "warning",
        folder.__name__.replace("_", " "),
        f"1 warning; {len(results)} results as without a cache",
    )


# -- private, and no programs ----------------------------------------------------


@posix
@pytest.mark.parametrize("cache", ["session", "folder"])
def test_files_are_private_and_hold_no_pickle(cache, outcome, start, tmp_path):
    from tests.stress import workers

    temporary = tmp_path / "temporary"
    temporary.mkdir()
    named = cache if cache == "session" else str(temporary / "cache")
    (modes, unpickled), told = start(
        workers.leave_files, named, str(temporary)
    ).result()
    assert told == [] or all("was damaged" in line for line in told)
    folders = [m for m in modes.values() if stat.S_ISDIR(m)]
    files = [m for m in modes.values() if stat.S_ISREG(m)]
    assert len(folders) >= 4 and len(files) >= 6  # index, log, segments, owners, locks
    assert {stat.S_IMODE(m) for m in folders} == {0o700}
    assert {stat.S_IMODE(m) for m in files} == {0o600}
    assert unpickled == []
    outcome(
        "Folders are made with 0700 and files with 0600, whatever the umask",
        f"{len(modes)} files and folders of a {cache} cache",
        "all private",
    )
    outcome(
        "A feature cache holds no pickles, and reading one unpickles nothing",
        f"a {cache} cache written and read",
        "0 pickles loaded or found",
    )


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        return open, (str(self.witness), "w")


def test_crafted_records_run_nothing(truth, outcome, tmp_path):
    """By someone who may write to the cache, and makes the checksums right."""
    witness = tmp_path / "ran"
    program = pickle.dumps(Payload(witness))
    program += bytes(-len(program) % 8)
    dtypes = ["|O", "O", "<f4,O", "|V8", "<U2", "<M8[ns]", "i4,(", "<f4", "|u1"]
    cache, keys = tmp_path / "cache", KEYS["row"][: len(dtypes)]
    store = RowStore(cache)
    store.put(dict(zip(keys, truth["row"], strict=False)))
    store.close()
    connection = sqlite3.connect(next(cache.rglob("rows.sqlite")))
    with connection:
        for key, dtype in zip(keys, dtypes, strict=True):
            kind = np.dtype(dtype) if dtype not in ("i4,(",) else np.dtype("i4")
            n = len(program) // kind.itemsize
            shape, payload = str(n), program[: n * kind.itemsize]
            connection.execute(
                "UPDATE rows SET dtype = ?, shape = ?, checksum = ? WHERE key = ?",
                (dtype, shape, index.checksum(key, dtype, shape, payload), key),
            )
            connection.execute(
                "UPDATE payloads SET payload = ? WHERE id ="
                " (SELECT id FROM rows WHERE key = ?)",
                (payload, key),
            )
    connection.close()
    found = store.get_many(keys)
    store.close()
    assert set(found) == set(keys[-2:])  # plain numbers, which do no harm
    assert all(row.dtype.kind in "biufc" for row in found.values())
    assert not witness.exists()
    outcome(
        "A feature cache holds no pickles, and reading one unpickles nothing",
        f"{len(dtypes)} crafted records with right checksums",
        "only arrays of numbers come back",
    )


def programs(witness: Path) -> dict[str, bytes]:
    """Weight files that run code where they are unpickled."""
    import io

    import torch

    evil, tensor = Payload(witness), {"conv1.weight": torch.zeros(2)}
    contents = {"beside": {**tensor, "x": evil}, "instead": evil}
    contents |= {"nested": {"state_dict": tensor, "optimizer": [evil]}}
    contents |= {"key": {evil.__reduce__(): torch.zeros(1), "x": evil}}
    found = {}
    for name, content in contents.items():
        for form in ("zip", "legacy"):
            file = io.BytesIO()
            zipped = form == "zip"
            torch.save(content, file, _use_new_zipfile_serialization=zipped)
            found[f"{name}, {form}"] = file.getvalue()
        for protocol in (0, 2, 5):
            found[f"{name}, pickle {protocol}"] = pickle.dumps(content, protocol)
    return found


BACKBONES = ["embedded", "resnet18", "torchvision:mobilenet_v2", "timm:resnet10t"]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_weight_file_that_is_a_program_is_refused(backbone, outcome, tmp_path):
    from sklearn_transfer import ImageClassifier, ImageFeaturizer

    if backbone.startswith("timm"):
        pytest.importorskip("timm")
    witness, X = tmp_path / "ran", np.zeros((4, 64, 64, 3), np.uint8)
    files = programs(witness)
    suffixes = [".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".pth.tar"]
    for i, (name, content) in enumerate(files.items()):
        path = tmp_path / f"weights-{i}{suffixes[i % len(suffixes)]}"
        path.write_bytes(content)
        estimator = (ImageFeaturizer, ImageClassifier)[i % 2](f"{backbone}@{path}")
        with pytest.raises(WeightsError, match=path.name):
            estimator.fit(X, [0, 1, 0, 1])
        assert not witness.exists(), name
    outcome(
        "Weight files that are pickles with a payload are refused, and it does not run",
        f"{len(files)} files for {backbone}",
        "all refused, none ran",
    )


def test_a_downloaded_checkpoint_that_is_a_program_is_refused(
    amount, outcome, tmp_path, monkeypatch
):
    """Under the name and with the digest that torchvision's own has."""
    import torch
    from torchvision.models import ResNet18_Weights

    from sklearn_transfer import ImageFeaturizer

    url = ResNet18_Weights.IMAGENET1K_V1.url
    witness = tmp_path / "ran"
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    files, X = list(programs(witness).values()), np.zeros((2, 64, 64, 3), np.uint8)
    files = files[:: -(-len(files) // amount(len(files), least=4))]
    for content in files:
        path = tmp_path / "checkpoints" / url.rpartition("/")[2]
        path.write_bytes(content)
        with pytest.raises(WeightsError, match="sha256"):
            ImageFeaturizer("resnet18").fit(X)
        # Even where somebody could forge the digest.
        with monkeypatch.context() as patch:
            name = "sklearn_transfer.backbones.weights._check_digest"
            patch.setattr(name, lambda *_: None)
            with pytest.raises(WeightsError):
                ImageFeaturizer("resnet18").fit(X)
        assert not witness.exists()
    outcome(
        "Weight files that are pickles with a payload are refused, and it does not run",
        f"{len(files)} files in torchvision's place, and again with a forged digest",
        "all refused, none ran",
    )
