"""Prefixes: each computed once, equal however they are kept, recomputed when lost."""

from __future__ import annotations

import copy
import json
import mmap
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sklearn_transfer.backbones.registry import (
    fingerprint,
    load_image_backbone,
    load_text_backbone,
)
from sklearn_transfer.backbones.stages import Tokens
from sklearn_transfer.backbones.tokenize import TokenIds
from sklearn_transfer.exceptions import UnreadableRowsError
from sklearn_transfer.inputs.images import image_rows
from sklearn_transfer.inputs.texts import text_rows
from sklearn_transfer.running import prefixes as module
from sklearn_transfer.running.batches import ImageBatches, TextBatches
from sklearn_transfer.running.boundary import Boundary
from sklearn_transfer.running.device import exact_float32, runner_for
from sklearn_transfer.running.memory import ShrinkingBatches
from sklearn_transfer.running.prefixes import open_prefixes, prefix_budget
from sklearn_transfer.store.keys import KeyMaker
from sklearn_transfer.store.rows import RowStore

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
PLENTY = 10**9
SMALL = "resnet18@random"  # at 64 pixels; its layer1 is 64 x 16 x 16
ROW = 64 * 16 * 16 * 4  # bytes of such a row
PARTS = [[5, 3, 12], [0], [7, 7, 1], list(range(13))]


@pytest.fixture
def store(tmp_path):
    store = RowStore(tmp_path / "cache")
    yield store
    store.close()


class Images:
    """Rows of X at boundaries of a network, with a count of what is done for them."""

    def __init__(self, X, backbone=SMALL, size=64, precision="float32"):
        self.net = load_image_backbone(backbone, size)
        self.runner = runner_for(self.net, CPU, precision)
        self.rows = image_rows(X)
        self.decoded: Counter = Counter()
        load = self.rows.load
        self.rows.load = lambda i, *a: self.decoded.update([i]) or load(i, *a)

    @property
    def digests(self):
        return [self.rows.digest(i) for i in range(len(self.rows))]

    def keys_at(self, k):
        shared = self.net.recipe, fingerprint(self.net), self.runner.precision
        maker = KeyMaker(*shared, f"stage {k}")
        return [maker.key(digest) for digest in self.digests]

    def batches(self):
        return ImageBatches(self.rows, self.digests, self.net.recipe, 8)

    def open(self, k, store, max_bytes=PLENTY, **more):
        keys, batches = more.pop("keys", None) or self.keys_at(k), self.batches()
        found, bad = open_prefixes(
            keys, batches, self.runner, k, store, max_bytes, **more
        )
        assert bad == {}
        return found


class Texts(Images):
    def __init__(self, X, folder, precision="float32"):
        self.net = load_text_backbone(str(folder), None, None)
        self.runner = runner_for(self.net, CPU, precision)
        self.rows = text_rows(X)

    def batches(self):
        return TextBatches(self.rows.texts, self.runner.net, None, tokens=64)


@pytest.fixture
def thirteen(images):
    """Twelve pictures and the first once more."""
    return [*images, images[0].copy()]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    from tests.test_backbones_transformers import save_model

    state = torch.get_rng_state()
    folder = save_model("bert", tmp_path_factory.mktemp("bert"))
    torch.set_rng_state(state)
    return folder


@pytest.fixture(scope="module")
def texts():
    """Of 2 to 32 tokens, some equal."""
    from tests.test_backbones_transformers import WORDS

    rng = np.random.default_rng(0)
    drawn = [" ".join(rng.choice(WORDS, n)) for n in rng.integers(1, 31, 30)]
    return ["", *drawn, drawn[3], drawn[0]]


def same(a, b) -> bool:
    """Equal to the last bit, and alike in memory."""
    return len(a) == len(b) and all(
        torch.equal(x, y) and x.stride() == y.stride()
        for x, y in zip(a, b, strict=True)
    )


# -- once ----------------------------------------------------------------------


def test_each_distinct_row_is_computed_once_whatever_asks_again(thirteen, store):
    X = Images(thirteen)
    first = X.open(2, store)
    assert sum(X.decoded.values()) == 12  # thirteen rows, two of them equal
    assert (first.n_kept, first.n_recomputed, first.n_rows) == (13, 0, 13)
    assert store.info().prefix_rows == store.info().misses == 12
    # Another order, a part of the rows, another object: all are there.
    again = Images([thirteen[i] for i in (12, 4, 4, 9)])
    found = again.open(2, store)
    assert not again.decoded and found.n_kept == 4
    ours, theirs = list(found.batches([[0, 1, 3]])), list(first.batches([[0, 4, 9]]))
    assert same(ours, theirs)
    assert store.info().hits == 3 and store.info().prefix_rows == 12


CHILD = """
import sys
from tests.test_prefixes import *
torch.set_num_threads(1)
rng = np.random.default_rng(0)
X = Images(list(rng.integers(0, 256, (48, 64, 64, 3), dtype=np.uint8)))
X.keys_at(2), X.runner
print("ready", flush=True)
sys.stdin.readline()
found = X.open(2, RowStore(sys.argv[1]))
(batch,) = found.batches([range(48)])
print(json.dumps([sum(X.decoded.values()), found.n_kept, float(batch.double().sum())]))
"""


def test_two_processes_share_the_work_of_a_cold_start(tmp_path):
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for _ in range(2)
    ]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    told = [json.loads(child.communicate(timeout=100)[0]) for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert sum(decoded for decoded, _, _ in told) == 48
    assert [kept for _, kept, _ in told] == [48, 48]
    assert told[0][2] == told[1][2]
    assert RowStore(tmp_path).info().misses == 48


def test_an_interrupted_opening_keeps_what_it_did(thirteen, store, monkeypatch):
    X, n_done = Images(thirteen), 4
    load = X.rows.load

    def interrupted(i, *more):
        if i >= n_done:
            raise KeyboardInterrupt
        return load(i, *more)

    monkeypatch.setattr(module, "images_a_pass", lambda runner: 4)
    with monkeypatch.context() as patch:
        patch.setattr(X.rows, "load", interrupted)
        with pytest.raises(KeyboardInterrupt):
            X.open(2, store)
    X.decoded.clear()
    assert X.open(2, store).n_kept == 13
    assert set(X.decoded) <= set(range(12))
    assert store.info().misses == 12


# -- equal ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "k"), [(SMALL, 1), (SMALL, 2), (SMALL, 4), ("resnet50@random", 3)]
)
def test_stored_held_and_recomputed_are_equal_bit_for_bit(
    thirteen, store, backbone, k, monkeypatch
):
    X = Images(thirteen, backbone)
    whole = list(X.open(k, None, 0).batches(PARTS))
    n_bytes = np.prod(X.runner.row_shape(k)) * 4
    before = torch.get_num_threads()
    try:
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            for kept_in, max_bytes in (
                (None, 5 * n_bytes),
                (None, PLENTY),
                (store, 4 * n_bytes),
                (store, PLENTY),
                (store, PLENTY),
                (None, 0),
            ):
                found = X.open(k, kept_in, max_bytes)
                assert same(list(found.batches(PARTS)), whole)
                assert same(list(found.batches(PARTS[::-1])), whole[::-1])
    finally:
        torch.set_num_threads(before)


def test_a_prefix_is_what_the_network_gives(thirteen, store):
    X = Images(thirteen)
    pixels = torch.from_numpy(
        np.stack([X.rows.load(i, X.net.recipe, X.digests[i]) for i in PARTS[0]])
    )
    x = X.net.prepare(pixels, CPU, torch.float32)
    for k in range(X.net.n_stages):
        (h,) = X.open(k, store).batches(PARTS[:1])
        with torch.no_grad():
            expected = X.net.until(x, k)
        assert h.dtype == torch.float32
        torch.testing.assert_close(h, expected, rtol=1e-4, atol=1e-4)


def test_every_pass_over_images_has_one_size_and_one_thread(
    thirteen, store, monkeypatch
):
    """On which the last bits depend, more for other networks and machines."""
    X, passes = Images(thirteen), set()
    until = type(X.runner).until

    def noted(self, batch, k):
        passes.add((len(batch), torch.get_num_threads()))
        return until(self, batch, k)

    monkeypatch.setattr(type(X.runner), "until", noted)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        list(X.open(2, store, 3 * ROW).batches(PARTS))
        X.open(2, store, 4 * ROW)
    finally:
        torch.set_num_threads(before)
    assert passes == {(16, 1)}


def test_what_the_runner_gives_is_no_inference_tensor(thirteen):
    X = Images(thirteen)
    h = X.runner.until(torch.zeros(1, 64, 64, 3, dtype=torch.uint8), 2)
    deeper = X.runner.between(h, 2, 3)
    rows = X.runner.rows_of(deeper, 3)
    again = X.runner.batch_of(rows, 3)
    assert torch.equal(again, deeper)
    for tensor in (h, deeper, again):
        assert not (tensor.is_inference() or tensor.requires_grad)


def test_over_the_budget_rows_are_recomputed_and_counted(thirteen, store):
    X = Images(thirteen)
    found = X.open(2, store, 5 * ROW + ROW // 2)
    # The first five distinct rows, and the thirteenth, which equals the first.
    assert (found.n_kept, found.n_recomputed) == (6, 7)
    assert store.info().prefix_rows == 5
    assert sorted(X.decoded) == [0, 1, 2, 3, 4]  # no other is computed now
    X.decoded.clear()
    (batch,) = found.batches([[9, 0, 12, 6]])
    assert X.decoded == {9: 1, 6: 1}
    (expected,) = X.open(2, None, PLENTY).batches([[9, 0, 12, 6]])
    assert torch.equal(batch, expected)
    # What is stored already comes before what is not.
    other = Images(thirteen[3:10])
    found = other.open(2, store, 4 * ROW)
    assert found.n_kept == 4 and len(other.decoded) == 2


def test_a_budget_of_nothing_stores_nothing(thirteen, store):
    found = Images(thirteen).open(2, store, 0)
    assert (found.n_kept, found.n_recomputed) == (0, 13)
    assert store.info().prefix_rows == 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_boundary_zero_gives_the_input_and_stores_nothing(thirteen, store, precision):
    X = Images(thirteen, precision=precision)
    found = X.open(0, store)
    assert (found.n_kept, found.n_recomputed) == (0, 13)
    batches = list(found.batches(PARTS))
    assert [tuple(b.shape) for b in batches][:2] == [(3, 3, 64, 64), (1, 3, 64, 64)]
    assert batches[0].dtype == X.runner.dtype
    pixels = torch.from_numpy(X.rows.load(5, X.net.recipe, X.digests[5]))[None]
    expected = X.net.prepare(pixels, CPU, X.runner.dtype)
    assert torch.equal(batches[0][:1], expected)
    assert store.info().prefix_rows == 0


def test_bfloat16_comes_back_as_it_was(thirteen, store):
    X = Images(thirteen, precision="bfloat16")
    (stored,) = X.open(2, store).batches([range(13)])
    (computed,) = X.open(2, None, 0).batches([range(13)])
    assert stored.dtype == torch.bfloat16
    assert store.info().prefix_bytes == 12 * ROW // 2
    assert torch.equal(stored, computed)


def test_rows_without_a_key_are_seen_anew_at_every_use(thirteen, store):
    X = Images(thirteen)
    keys = X.keys_at(2)
    keys[4] = None
    found = X.open(2, store, keys=keys)
    assert (found.n_kept, found.n_recomputed) == (12, 1)
    X.decoded.clear()
    for _ in range(2):
        list(found.batches([[3, 4, 5]]))
    assert X.decoded == {4: 2}


# -- texts ---------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_ragged_prefixes_of_texts_resume(texts, bert, store, precision, k):
    X = Texts(texts, bert, precision)
    net, part = X.runner.net, [8, 0, 31, 2, 17, 2]
    ids, _ = net.tokenize([texts[i] for i in part])
    with torch.no_grad():
        expected = net(net.collate(ids))
    for max_bytes in (PLENTY, 20_000, 0):
        found = X.open(k, store, max_bytes)
        assert found.lengths.tolist() == [len(row) for row in net.tokenize(texts)[0]]
        (h,) = found.batches([part])
        assert isinstance(h, Tokens) and h.hidden.dtype == X.runner.dtype
        assert h.mask.sum(1).tolist() == found.lengths[part].tolist()
        assert h.hidden.shape[1] % 16 == 0
        with torch.no_grad():
            vectors = net.after(h, k)
        if precision == "float32":
            torch.testing.assert_close(vectors, expected, rtol=1e-5, atol=1e-5)
        else:
            cosine = torch.cosine_similarity(vectors, expected)
            assert cosine.min() > 0.9999
        assert (h.hidden[h.mask == 0] == 0).all()
    # Ragged: what is stored are the texts' own tokens.
    distinct = dict(zip(texts, found.lengths, strict=True))
    itemsize = 4 if precision == "float32" else 2
    assert store.info().prefix_bytes == sum(distinct.values()) * 32 * itemsize


def test_stored_texts_are_not_tokenised_again(texts, bert, store, monkeypatch):
    X = Texts(texts, bert)
    first = X.open(2, store)
    monkeypatch.setattr(type(X.net), "tokenize", lambda *_: {}["nothing is missing"])
    again = Texts(texts, bert).open(2, store)
    assert again.n_kept == len(texts)
    np.testing.assert_array_equal(again.lengths, first.lengths)


def test_boundary_zero_of_texts_gives_token_ids(texts, bert):
    found = Texts(texts, bert).open(0, None)
    (batch,) = found.batches([[3, 0, 3]])
    assert isinstance(batch, TokenIds)
    assert batch.attention_mask.sum(1).tolist() == found.lengths[[3, 0, 3]].tolist()
    assert found.n_recomputed == len(texts)


def test_a_deeper_boundary_of_texts_starts_from_a_stored_one(
    texts, bert, store, monkeypatch
):
    X = Texts(texts, bert)
    (expected,) = X.open(3, None).batches([range(33)])
    X.open(1, store)
    starts = []
    between = type(X.runner).between
    monkeypatch.setattr(type(X.runner), "until", lambda *_: {}["nothing is begun anew"])
    monkeypatch.setattr(
        type(X.runner),
        "between",
        lambda self, h, a, b: starts.append(a) or between(self, h, a, b),
    )
    (h,) = X.open(3, store, keys_at=X.keys_at).batches([range(33)])
    assert set(starts) == {1}
    torch.testing.assert_close(h.hidden, expected.hidden, rtol=1e-5, atol=1e-5)


# -- from what is stored, and what is not any more ------------------------------


def test_a_deeper_boundary_from_a_stored_one_decodes_nothing(thirteen, store):
    X = Images(thirteen)
    whole = list(X.open(4, None).batches(PARTS))
    X.open(1, store)
    X.open(2, store, 3 * ROW, keys_at=X.keys_at)  # the nearest that has a row is taken
    X.decoded.clear()
    found = X.open(4, store, keys_at=X.keys_at)
    assert found.n_kept == 13 and not X.decoded
    assert same(list(found.batches(PARTS)), whole)
    assert not X.decoded


def test_a_stored_start_that_gets_lost_is_decoded(thirteen, store, monkeypatch):
    X = Images(thirteen)
    X.open(1, store)
    gone = X.keys_at(1)[2]
    get_many = store.get_many

    def forgetful(keys, kind):
        return {key: row for key, row in get_many(keys, kind).items() if key != gone}

    monkeypatch.setattr(store, "get_many", forgetful)
    X.decoded.clear()
    assert X.open(3, store, keys_at=X.keys_at).n_kept == 13
    assert X.decoded == {2: 1}


def test_what_the_store_lost_before_it_was_read_back_is_recomputed(
    thirteen, store, monkeypatch
):
    X = Images(thirteen)
    whole = list(X.open(2, None).batches(PARTS))
    read_back = module._Kept.read_back

    def after_an_eviction(kept):
        store.clear()
        read_back(kept)

    monkeypatch.setattr(module._Kept, "read_back", after_an_eviction)
    found = X.open(2, store)
    assert (found.n_kept, found.n_recomputed) == (0, 13)
    assert same(list(found.batches(PARTS)), whole)


def test_rows_in_use_outlive_their_eviction(thirteen, store):
    X = Images(thirteen)
    found = X.open(2, store)
    before = list(found.batches(PARTS))
    store.clear()
    X.decoded.clear()
    assert same(list(found.batches(PARTS)), before) and not X.decoded


def test_a_store_that_is_too_small_is_not_filled_beyond_what_it_keeps(
    thirteen, tmp_path
):
    store = RowStore(tmp_path / "small", max_bytes=6 * ROW)
    found = Images(thirteen).open(2, store)
    assert 1 < found.n_kept <= 6  # and no warning that rows had to leave
    assert store.info().prefix_rows in (found.n_kept, found.n_kept - 1)
    store.close()


def test_a_folder_that_fails_leaves_rows_in_memory(thirteen, tmp_path):
    (tmp_path / "file").write_text("in the folder's place")
    X = Images(thirteen)
    with pytest.warns(UserWarning, match="cannot be used"):
        found = X.open(2, RowStore(tmp_path / "file"))
    assert found.n_kept == 13
    X.decoded.clear()
    list(found.batches(PARTS))
    assert not X.decoded


def in_a_file(array: np.ndarray) -> bool:
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(getattr(array, "obj", array), mmap.mmap)


def test_stored_rows_are_read_from_files_and_not_held(thirteen, texts, bert, store):
    for X, k in ((Images(thirteen), 4), (Texts(texts, bert), 1)):  # small rows too
        for _ in range(2):  # the run that writes, and one that finds
            rows = X.open(k, store)._rows
            assert all(map(in_a_file, rows))
            assert not any(row.flags.writeable for row in rows)
    held = Images(thirteen).open(4, None)._rows
    assert not any(map(in_a_file, held))


# -- use -----------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["stored", "mixed", "computed"])
def test_a_tail_trains_from_them(thirteen, store, kept):
    X = Images(thirteen)
    max_bytes = {"stored": PLENTY, "mixed": 6 * ROW, "computed": 0}[kept]
    tail = copy.deepcopy(X.net).requires_grad_(True)
    for h in X.open(2, store, max_bytes).batches(PARTS):
        assert not (h.is_inference() or h.requires_grad)
        tail.after(h, 2).sum().backward()
        h += 1  # nobody else's: neither the map nor the next batch is touched
    assert all(p.grad is not None for p in tail.stages[2].parameters())
    (again,) = X.open(2, store, max_bytes).batches(PARTS[:1])
    (fresh,) = X.open(2, None, 0).batches(PARTS[:1])
    assert torch.equal(again, fresh)


def test_a_row_that_cannot_be_read_is_named_and_the_others_are_kept(images, store):
    X = Images([*images[:3], b"no image", images[4], b"no image"])
    keys = X.keys_at(2)
    found, bad = open_prefixes(keys, X.batches(), X.runner, 2, store, PLENTY)
    assert sorted(bad) == [3, 5] and (found.n_kept, found.n_recomputed) == (4, 0)
    unread, bad = open_prefixes(keys, X.batches(), X.runner, 2, store, 0)
    assert bad == {} and unread.n_recomputed == 6
    with pytest.raises(UnreadableRowsError, match=r"row 3:(.|\n)*Drop") as caught:
        list(unread.batches([[0, 1], [4, 3]]))
    assert list(caught.value.rows) == [3]


def test_an_abandoned_pass_leaves_no_thread(thirteen, store):
    X = Images(thirteen)
    running = X.open(2, store, 3 * ROW).batches(PARTS)
    next(running)
    running.close()
    names = [thread.name for thread in threading.enumerate()]
    assert not any(name.startswith("sklearn_transfer") for name in names)


def test_parts_are_taken_as_they_are_needed(thirteen, store):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield [0, 11]

    running = Images(thirteen).open(2, store, 3 * ROW).batches(endless())
    for _ in range(5):
        next(running)
    running.close()
    assert len(taken) < 10


def test_memory_that_is_short_lowers_the_batch(thirteen, monkeypatch):
    X = Images(thirteen)
    (whole,) = X.open(2, None).batches([range(13)])
    until, sizes = type(X.runner).until, []

    def short(self, batch, k):
        sizes.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return until(self, batch, k)

    monkeypatch.setattr(type(X.runner), "until", short)
    for max_bytes in (PLENTY, 0):
        (h,) = X.open(2, None, max_bytes).batches([range(13)])
        torch.testing.assert_close(h, whole, rtol=1e-4, atol=1e-5)
    assert max(sizes) > 3 and sizes.count(3) >= 8  # filled up to three as well


class TooLarge(np.ndarray):
    """A row of which memory has no room for a copy."""

    def copy(self, *args):
        raise MemoryError


def test_rows_that_memory_cannot_hold_are_computed_at_every_use(thirteen, monkeypatch):
    X = Images(thirteen)
    whole = list(X.open(2, None).batches(PARTS))
    rows_of = Boundary.rows_of

    def one_too_large(self, h):
        rows = rows_of(self, h)  # of all pictures: a pass takes sixteen
        rows[4] = rows[4].view(TooLarge)
        return rows

    monkeypatch.setattr(Boundary, "rows_of", one_too_large)
    found = X.open(2, None)
    # Four before it are held, and none after it; the first stands in two rows.
    assert (found.n_kept, found.n_recomputed) == (5, 8)
    assert same(list(found.batches(PARTS)), whole)


def test_results_that_are_lists_or_tensors_are_joined_in_order():
    x = torch.arange(5)[:, None]
    assert ShrinkingBatches(lambda batch: batch.tolist(), 2)(x) == x.tolist()
    assert torch.equal(ShrinkingBatches(lambda batch: batch + 1, 2)(x), x + 1)
    assert ShrinkingBatches(lambda rows: [r * 2 for r in rows], 2)([1, 2, 3]) == [
        2,
        4,
        6,
    ]


def test_a_file_that_changed_since_its_digest_is_an_error(store, images, tmp_path):
    path = tmp_path / "a.png"
    images[0].save(path)
    X = Images([str(path), images[1]])
    found = X.open(2, store, 0)
    Image.new("RGB", (70, 70)).save(path)  # another picture under the same name
    with pytest.raises(UnreadableRowsError, match="changed"):
        list(found.batches([[1, 0]]))


# -- budgets and precision -------------------------------------------------------


def test_the_budget_of_prefixes(tmp_path, monkeypatch):
    store = RowStore(tmp_path, max_bytes=1000)
    assert prefix_budget("auto", store) == 500
    assert prefix_budget(np.int64(7), store) == 7
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert prefix_budget("auto", None) == memory // 8
    monkeypatch.setenv("SKLEARN_TRANSFER_PREFIX_BYTES", "123")
    assert prefix_budget("auto", store) == prefix_budget("auto", None) == 123
    assert prefix_budget(0, store) == 0
    monkeypatch.setenv("SKLEARN_TRANSFER_PREFIX_BYTES", "2GB")
    with pytest.raises(ValueError, match=r"SKLEARN_TRANSFER_PREFIX_BYTES.*digits"):
        prefix_budget("auto", store)
    store.close()


def test_exact_float32_leaves_the_other_precision_alone():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with exact_float32("float32", torch.device("cuda")):
            assert matmul.fp32_precision == "ieee" and torch.is_grad_enabled()
        with exact_float32("bfloat16", torch.device("cuda")):
            assert matmul.fp32_precision == "tf32"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_on_a_gpu_stored_and_computed_agree(thirteen, texts, bert, store, precision):
    cuda = torch.device("cuda")
    for X, k in ((Images(thirteen), 2), (Texts(texts, bert), 2)):
        X.runner = runner_for(X.net, cuda, precision)
        part = [[5, 3, 12, 3], list(range(13))]
        whole = list(X.open(k, store).batches(part))
        for kept_in, max_bytes in ((None, PLENTY), (None, 3 * ROW // 8), (None, 0)):
            found = list(X.open(k, kept_in, max_bytes).batches(part))
            for a, b in zip(found, whole, strict=True):
                a, b = (h.hidden if isinstance(h, Tokens) else h for h in (a, b))
                assert a.device.type == "cuda" and a.dtype == X.runner.dtype
                cosine = torch.cosine_similarity(
                    a.flatten(1).double(), b.flatten(1).double()
                )
                assert cosine.min() > (0.9999 if precision == "bfloat16" else 0.999999)
