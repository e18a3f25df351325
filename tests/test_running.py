"""Encoding without networks: claims, order, errors; and the fused copy with one."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import nn

from sklearn_transfer.backbones.stages import StagedBackbone, Tokens, pool
from sklearn_transfer.inputs.images import ImageRecipe, image_rows
from sklearn_transfer.running.batches import ImageBatches, TextBatches
from sklearn_transfer.running.device import (
    Runner,
    inference_mode,
    measure,
    resolve_device,
    resolve_precision,
)
from sklearn_transfer.running.encode import encode
from sklearn_transfer.running.memory import ShrinkingBatches, is_out_of_memory
from sklearn_transfer.running.parallel import run_batches
from sklearn_transfer.running.request import Request
from sklearn_transfer.store.rows import RowStore

REQUEST = Request("recipe", "print", "float32", "auto", (1, 2), (2, 3))


class Numbers:
    """Batches of three, whose rows are numbers; negative ones cannot be read."""

    def __init__(self, values):
        self.values, self.bad, self.seen = values, {}, []

    def order(self, rows):
        return sorted(rows, reverse=True)

    def batches(self, rows):
        batch = []
        for row in rows:
            if self.values[row] < 0:
                self.bad[row] = "negative"
                continue
            batch.append(row)
            if len(batch) == 3:
                yield batch, [self.values[r] for r in batch]
                batch = []
        if batch:
            yield batch, [self.values[r] for r in batch]


def run_numbers(values, store, wanted=(2,), fail_at=None, workers=1):
    """Features, bad rows and the values that went through the network."""
    keys = REQUEST.keys([bytes([v % 256]) * 32 for v in values])
    batches, seen = Numbers(values), []

    def run(batch):
        if fail_at in batch:
            raise KeyboardInterrupt
        seen.extend(batch)
        return np.array([[v, v, v, v + 1, v + 2] for v in batch], np.float32)

    def open_network():
        return batches, lambda feed: run_batches(run, feed, workers)

    out, bad = encode(keys, REQUEST, wanted, store, open_network)
    return out, bad, seen


@pytest.mark.parametrize("kept", [True, False])
def test_rows_come_back_in_order_and_equal_ones_are_run_once(tmp_path, kept):
    store = RowStore(tmp_path) if kept else None
    values = [5, 1, 5, 2, 9, 1]
    out, bad, seen = run_numbers(values, store)
    assert out[:, 1].tolist() == [v + 1 for v in values] and not bad
    assert sorted(seen) == [1, 2, 5, 9]
    again = run_numbers(values, store, wanted=(2, 1))
    assert again[0][:, 3].tolist() == values
    assert len(again[2]) == (0 if kept else 4)


def test_several_workers_give_the_same_in_the_same_order():
    values = list(range(50))
    one, _, _ = run_numbers(values, None)
    three, _, seen = run_numbers(values, None, workers=3)
    np.testing.assert_array_equal(three, one)
    assert sorted(seen) == values


def test_a_worker_runs_on_one_thread_and_leaves_the_others_theirs():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        batches = [([i], i) for i in range(4)]
        run = lambda _: np.array([torch.get_num_threads()])  # noqa: E731
        counts = [int(n[0]) for _, n in run_batches(run, batches, workers=2)]
        assert counts == [1] * 4
        assert torch.get_num_threads() == 2
        assert [int(n[0]) for _, n in run_batches(run, batches[:1], 2)] == [2]
    finally:
        torch.set_num_threads(before)


def test_an_error_in_a_worker_arrives_and_stops_the_others():
    def run(i):
        if i == 3:
            raise ValueError("three")
        return np.zeros(1)

    with pytest.raises(ValueError, match="three"):
        list(run_batches(run, (([i], i) for i in range(1000)), workers=2))
    names = [thread.name for thread in threading.enumerate()]
    assert not any(name.startswith("sklearn_transfer") for name in names)


def test_bad_rows_are_nan_and_every_place_of_theirs_is_named(tmp_path):
    out, bad, _ = run_numbers([1, -2, 3, -2], RowStore(tmp_path))
    assert bad == {1: "negative", 3: "negative"}
    assert np.isnan(out[[1, 3]]).all() and not np.isnan(out[[0, 2]]).any()


def test_an_interrupt_keeps_what_was_done_and_frees_the_rest(tmp_path):
    store, values = RowStore(tmp_path), list(range(10))
    with pytest.raises(KeyboardInterrupt):
        run_numbers(values, store, fail_at=2)  # order is 9 .. 0, in threes
    assert store.info().rows == 6
    _, _, seen = run_numbers(values, store)
    assert sorted(seen) == [0, 1, 2, 3]


def test_rows_that_are_stored_and_never_found_are_encoded_anew(tmp_path, monkeypatch):
    values = [4, 7]
    expected, _, _ = run_numbers(values, RowStore(tmp_path))
    store = RowStore(tmp_path)  # which remembers nothing of its own
    monkeypatch.setattr(store, "get_many", lambda keys, kind="row": {})
    found, bad, seen = run_numbers(values, store)
    np.testing.assert_array_equal(found, expected)
    assert sorted(seen) == values and not bad


def test_rows_without_a_key_are_nan_and_open_no_network():
    def open_network():
        raise AssertionError("nothing is missing")

    out, bad = encode([None, None], REQUEST, (1,), None, open_network)
    assert np.isnan(out).all() and out.shape == (2, 2) and bad == {}


def test_out_of_memory_halves_the_batch_and_stays_there():
    tried = []

    def run(batch):
        tried.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch.numpy()

    shrinking = ShrinkingBatches(run)
    x = torch.arange(14).reshape(14, 1)
    np.testing.assert_array_equal(shrinking(x), x.numpy())
    assert tried == [14, 7, 3, 3, 3, 3, 2]
    tried.clear()
    shrinking(x[:3])
    assert tried == [3]


def test_one_sample_too_many_is_an_error_that_names_it():
    def run(batch):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(MemoryError, match=r"\(3, 8, 8\).*image_size"):
        ShrinkingBatches(run)(torch.zeros(4, 3, 8, 8))


def test_other_errors_are_not_taken_for_want_of_memory():
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert is_out_of_memory(RuntimeError("could not create a primitive"))  # oneDNN
    unsupported = "could not create a primitive descriptor for a convolution"
    assert not is_out_of_memory(RuntimeError(unsupported))

    def run(batch):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        ShrinkingBatches(run)(torch.zeros(4, 1))


class Words:
    """A text backbone's tokenizer: a token a word."""

    def tokenize(self, texts):
        return [np.ones(len(text.split()), np.int32) for text in texts], 0

    def collate(self, ids):
        return [len(row) for row in ids]


def test_text_batches_are_of_like_length_within_the_budget():
    lengths = np.random.default_rng(0).integers(1, 200, 300)
    texts = [" ".join(["word"] * n) for n in lengths]
    feed = TextBatches(texts, Words(), None, tokens=1000)
    batches = list(feed.batches(feed.order(range(300))))
    assert sorted(row for rows, _ in batches for row in rows) == list(range(300))
    widths = [max(batch) for _, batch in batches]
    assert widths == sorted(widths, reverse=True)  # longest first
    assert all(len(rows) * max(batch) <= 1000 for rows, batch in batches)
    # Full, so that a call costs few passes: no batch could take its successor's first.
    for rows, batch in batches[:-1]:
        assert (len(rows) + 1) * max(batch) > 1000


def test_text_batches_of_a_given_size():
    feed = TextBatches(["a", "b b", "c"], Words(), 2, tokens=1)
    assert [rows for rows, _ in feed.batches(feed.order([0, 1, 2]))] == [[1, 0], [2]]


def test_parts_of_texts_come_as_given_and_are_tokenised_once():
    class Counting(Words):
        seen: list[str] = []

        def tokenize(self, texts):
            self.seen.extend(texts)
            return super().tokenize(texts)[0], sum(len(text) > 3 for text in texts)

    feed = TextBatches(["a", "b b b", "c c"], Counting(), None, tokens=100)
    parts = feed.inputs(iter([[2, 0, 2], [], [1, 2]]))
    assert list(parts) == [[2, 1, 2], None, [3, 2]]
    assert sorted(Counting.seen) == ["a", "b b b", "c c"] and feed.n_truncated == 1
    assert feed.order([0, 1, 2]) == [1, 2, 0] and feed.n_truncated == 1


def test_parts_of_images_come_as_given(images):
    rows = image_rows(images)
    digests = [rows.digest(i) for i in range(len(images))]
    feed = ImageBatches(rows, digests, ImageRecipe.for_size(16), size=2)
    ((_, every),) = ImageBatches(rows, digests, feed.recipe, size=12).batches(range(12))
    parts = [[3, 11, 3], [], [0], list(range(12))]
    found = list(feed.inputs(iter(parts)))
    assert found[1] is None
    for part, pixels in zip(parts, found, strict=True):
        assert pixels is None or torch.equal(pixels, every[part])


def test_image_batches_keep_the_order_and_set_bad_rows_aside(images):
    X = [*images, b"not an image", images[0]]
    rows = image_rows(X)
    digests = [rows.digest(i) for i in range(len(X))]
    feed = ImageBatches(rows, digests, ImageRecipe.for_size(16), size=5)
    batches = list(feed.batches(iter(range(len(X)))))
    assert [row for part, _ in batches for row in part] == [*range(12), 13]
    assert [pixels.shape for _, pixels in batches][:2] == [(5, 16, 16, 3)] * 2
    assert list(feed.bad) == [12]
    assert torch.equal(batches[0][1][0], batches[-1][1][-1])


def test_an_abandoned_image_feed_leaves_no_thread(images):
    rows = image_rows(images)
    digests = [rows.digest(i) for i in range(len(images))]
    feed = ImageBatches(rows, digests, ImageRecipe.for_size(16), size=2)
    running = feed.batches(range(len(images)))
    next(running)
    running.close()
    names = [thread.name for thread in threading.enumerate()]
    assert not any(name.startswith("sklearn_transfer") for name in names)


class Branching(nn.Module):
    """A convolution whose output feeds a BatchNorm and goes on beside it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        h = self.conv(x)
        return self.norm(h) + h


def backbone(first: nn.Module) -> StagedBackbone:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for module in first.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 2)
    readout = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    recipe = ImageRecipe.for_size(16)
    return StagedBackbone(
        {"only": first}, readout, layouts=["nchw"], recipe=recipe, name="test"
    )


def test_fusing_folds_batchnorm_and_keeps_the_result():
    block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    plain = backbone(block)
    runner = Runner(plain, torch.device("cpu"), "float32")
    assert not any(isinstance(m, nn.BatchNorm2d) for m in runner.net.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
    pixels = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    x = plain.prepare(pixels, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(
        torch.from_numpy(runner.taps(pixels, "auto", [1])), plain(x).detach()
    )


def test_a_convolution_used_twice_is_left_alone():
    runner = Runner(backbone(Branching()), torch.device("cpu"), "float32")
    assert any(isinstance(m, nn.BatchNorm2d) for m in runner.net.modules())


def test_nothing_is_fused_across_a_boundary():
    """What is tapped after the convolution is what the convolution gives."""
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    nn.init.constant_(norm.running_var, 9)
    readout = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    plain = StagedBackbone(
        {"conv": conv, "norm": norm},
        readout,
        layouts=["nchw"] * 2,
        recipe=ImageRecipe.for_size(16),
        name="test",
    )
    runner = Runner(plain, torch.device("cpu"), "float32")
    x = plain.example()
    for ours, expected in zip(
        runner.net.taps(x, "auto", [1, 2]), plain.taps(x, "auto", [1, 2]), strict=True
    ):
        torch.testing.assert_close(ours.detach(), expected.detach())


def test_batchnorm_of_timm_is_fused_with_its_activation_kept():
    from_timm = pytest.importorskip("timm") and pytest.importorskip(
        "sklearn_transfer.backbones.from_timm"
    )
    plain = from_timm.load("test_efficientnet", "random", 64)
    runner = Runner(plain, torch.device("cpu"), "float32")
    assert not any(isinstance(m, nn.BatchNorm2d) for m in runner.net.modules())
    x = plain.example()
    with torch.inference_mode():
        torch.testing.assert_close(runner.net(x), plain(x), rtol=1e-3, atol=1e-4)


def test_float32_leaves_the_precision_of_matrix_products_as_it_was():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with inference_mode("float32", torch.device("cuda")):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_measured_once_for_each_tap():
    net = backbone(nn.Conv2d(3, 4, 3))
    assert measure(net, "auto", [1]).widths == (4,)
    assert measure(net, "flatten", [1]).widths == (4 * 14 * 14,)


def test_devices_and_precisions_that_are_not_there():
    for name in ("gpu0", "meta"):
        with pytest.raises(ValueError, match="is not a device"):
            resolve_device(name)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"0 CUDA devices.*device='auto'"):
            resolve_device("cuda")
    assert resolve_precision("float32", torch.device("cpu")) == "float32"


def test_pooling_of_texts_respects_the_mask():
    hidden = torch.arange(12.0).reshape(2, 3, 2)
    h = Tokens(hidden, torch.tensor([[1, 1, 0], [1, 1, 1]]))
    assert pool(h, "avg", "tokens").tolist() == [[1, 2], [8, 9]]
    assert pool(h, "max", "tokens").tolist() == [[2, 3], [10, 11]]
    assert pool(h, "last", "tokens").tolist() == [[2, 3], [10, 11]]
    assert pool(h, "cls", "tokens").tolist() == [[0, 1], [6, 7]]
    with pytest.raises(ValueError, match="flatten"):
        pool(h, "flatten", "tokens")


def test_pooling_of_image_tokens_leaves_the_class_token_out():
    h = torch.tensor([[[100.0], [1.0], [3.0]]])
    assert pool(h, "avg", "tokens", n_prefix=1).tolist() == [[2.0]]
    assert pool(h, "cls", "tokens", n_prefix=1).tolist() == [[100.0]]
    assert pool(h, "flatten", "tokens", n_prefix=1).tolist() == [[1.0, 3.0]]


def test_rows_read_lately_are_not_read_again_until_the_store_is_cleared(
    tmp_path, monkeypatch
):
    store, values = RowStore(tmp_path), [3, 1, 2]
    first, _, _ = run_numbers(values, store)
    with monkeypatch.context() as patch:
        patch.setattr(store, "get_many", lambda keys: {}[keys])
        again, _, seen = run_numbers(values, store)
    np.testing.assert_array_equal(again, first)
    assert seen == [] and store.info().hits == 3
    store.clear()
    assert sorted(run_numbers(values, store)[2]) == [1, 2, 3]


def test_columns_that_are_no_run_are_taken_in_their_order(tmp_path):
    request = Request("recipe", "print", "float32", "auto", (1, 2, 3), (1, 2, 1))
    key = request.keys([b"x" * 32])
    row = np.array([[10, 20, 30, 40]], np.float32)

    def open_network():
        return Numbers([5]), lambda feed: (([0], row) for _ in feed)

    out, _ = encode(key, request, (3, 1), None, open_network)
    assert out.tolist() == [[40, 10]]
