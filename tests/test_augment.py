"""Augmented views: functions of pixels and a seed, that leave the process alone."""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import cloudpickle
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from sklearn_transfer.inputs.augment import (
    AREA,
    RATIO,
    FixedViews,
    FreshViews,
    alone_with_random_state,
    random_box,
    resolve_augment,
)
from sklearn_transfer.inputs.images import ImageRecipe, UnreadableRow, image_rows

RECIPE = ImageRecipe.for_size((24, 32))
CUSTOM = v2.Compose([v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4)])


def draw_everywhere(image: torch.Tensor) -> torch.Tensor:
    """A transform that draws from all three random states of the process."""
    shifts = torch.randint(64, ()), np.random.randint(64), random.randrange(64)
    return image + torch.as_tensor(int(sum(shifts)), dtype=torch.uint8)


AUGMENTS = {
    "flip": "flip",
    "standard": "standard",
    "transform": CUSTOM,
    "function": draw_everywhere,
}


@pytest.fixture
def pixels() -> np.ndarray:
    """(24, 32, 3) uint8, smooth and asymmetric."""
    coarse = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((32, 24), Image.Resampling.BICUBIC)
    return np.array(image)


# --- what augment= may be ----------------------------------------------------


def test_none_is_off():
    assert resolve_augment("none") is None


@pytest.mark.parametrize("wrong", ["Standard", "randaugment", ""])
def test_unknown_string_lists_what_is_possible(wrong):
    with pytest.raises(ValueError) as error:
        resolve_augment(wrong)
    for choice in ("'none'", "'flip'", "'standard'", "v2.RandAugment()", repr(wrong)):
        assert choice in str(error.value)


@pytest.mark.parametrize("wrong", [None, True, 3, ["flip"]])
def test_no_string_and_no_transform_lists_what_is_possible(wrong):
    with pytest.raises(TypeError, match=r"'none', 'flip'.*'standard'.*RandAugment"):
        resolve_augment(wrong)


def test_class_instead_of_transform_says_so():
    with pytest.raises(TypeError, match=r"augment=RandomHorizontalFlip\(\.\.\.\)"):
        resolve_augment(v2.RandomHorizontalFlip)


def test_transform_without_pickle_is_refused():
    lock = threading.Lock()
    with pytest.raises(ValueError, match="cannot be pickled") as error:
        resolve_augment(lambda image: (lock, image)[1])
    assert "augment=v2.RandAugment()" in str(error.value)


# --- views -------------------------------------------------------------------


@pytest.mark.parametrize("augment", AUGMENTS.values(), ids=AUGMENTS)
def test_view_is_a_function_of_pixels_and_seed(augment, pixels):
    view = resolve_augment(augment)
    before = pixels.copy()
    views = [view(pixels, seed) for seed in range(12)]
    # Whatever the process drew in between.
    torch.rand(3), np.random.random(3), random.random()
    again = [view(pixels, seed) for seed in reversed(range(12))][::-1]
    assert np.array_equal(views, again)
    assert len({v.tobytes() for v in views}) >= 2
    assert np.array_equal(pixels, before)
    for v in views:
        assert v.shape == pixels.shape and v.dtype == np.uint8
        assert v.flags.c_contiguous and v.flags.writeable
        assert not np.shares_memory(v, pixels)


@pytest.mark.parametrize("augment", AUGMENTS.values(), ids=AUGMENTS)
def test_seed_of_64_bits_and_read_only_pixels(augment, pixels):
    pixels.flags.writeable = False
    view = resolve_augment(augment)
    assert view(pixels, 2**64 - 1).shape == pixels.shape
    assert view(pixels[:, ::-1], 0).shape == pixels.shape


@pytest.mark.parametrize("augment", AUGMENTS.values(), ids=AUGMENTS)
def test_global_random_states_are_untouched(augment, pixels):
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    view = resolve_augment(augment)
    view(pixels, 5)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1][1])
    assert np.random.get_state()[2:] == before[1][2:]
    assert random.getstate() == before[2]


def test_global_random_states_are_put_back_after_a_failure(pixels):
    def fails(image):
        draw_everywhere(image)
        raise RuntimeError("on purpose")

    before = torch.get_rng_state(), np.random.get_state()[2], random.getstate()
    with pytest.raises(RuntimeError) as error:
        resolve_augment(fails)(pixels, 0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[2], random.getstate()) == before[1:]
    assert "augment=fails on a uint8 tensor of shape (3, 24, 32)" in str(
        error.value.__notes__
    )


def test_gpus_are_not_seeded(pixels, monkeypatch):
    def refuse(*args):
        raise AssertionError("a GPU's random state was seeded")

    for seeder in ("manual_seed", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, seeder, refuse)
    assert resolve_augment(CUSTOM)(pixels, 0).shape == pixels.shape


@pytest.mark.parametrize("augment", AUGMENTS.values(), ids=AUGMENTS)
def test_threads_make_the_same_views(augment, pixels):
    view = resolve_augment(augment)
    expected = [view(pixels, seed) for seed in range(64)]
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda seed: view(pixels, seed), range(64)))
    finally:
        sys.setswitchinterval(switch)
    assert np.array_equal(found, expected)


def test_transform_waits_while_another_thread_draws(pixels):
    view = resolve_augment(draw_everywhere)
    alone = view(pixels, 1)
    torch.manual_seed(0)
    expected = torch.rand(4)
    with ThreadPoolExecutor(1) as pool:
        torch.manual_seed(0)
        with alone_with_random_state():
            future = pool.submit(view, pixels, 1)
            found = torch.rand(4)
            with pytest.raises(TimeoutError):
                future.result(timeout=0.1)
        assert np.array_equal(future.result(), alone)
    assert torch.equal(found, expected)
    assert view.uses_global_random_state
    assert not resolve_augment("standard").uses_global_random_state


def test_flip_is_the_image_or_its_mirror(pixels):
    flip = resolve_augment("flip")
    mirrored = 0
    for seed in range(400):
        view = flip(pixels, seed)
        is_mirrored = np.array_equal(view, pixels[:, ::-1])
        assert is_mirrored or np.array_equal(view, pixels)
        mirrored += is_mirrored
    assert 160 < mirrored < 240  # 4 standard deviations around 200


def test_standard_is_a_resized_part_and_its_mirror():
    # Columns and rows count upwards, so a view tells the box it was cut from.
    height, width = 120, 160
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    pixels = np.stack([columns, rows, rows], 2)
    standard = resolve_augment("standard")
    n_mirrored, areas = 0, []
    for seed in range(200):
        view = standard(pixels, seed).astype(float)
        across, down = view[60, :, 0], view[:, 80, 1]
        if across[0] > across[-1]:
            n_mirrored, across = n_mirrored + 1, across[::-1]
        w = (across[-20] - across[20]) / (width - 40) * width
        h = (down[-20] - down[20]) / (height - 40) * height
        areas.append(w * h / (height * width))
        assert RATIO[0] * 0.9 < w / h < RATIO[1] * 1.1
    assert 0.3 < min(areas) < 0.45 and 0.85 < max(areas) < 1.1
    assert 70 < n_mirrored < 130


def test_boxes_follow_torchvisions_rule():
    """Same distribution as RandomResizedCrop.get_params, and inside the image."""
    height, width, n = 90, 120, 6000
    rng = np.random.default_rng(0)
    ours = np.array([random_box(height, width, rng) for _ in range(n)])
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    crop = v2.RandomResizedCrop(8, scale=AREA, ratio=RATIO, antialias=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        params = [crop.make_params([image]) for _ in range(n)]
    theirs = np.array(
        [[p[k] for k in ("left", "top", "width", "height")] for p in params]
    )
    left, top, w, h = ours.T
    assert (left >= 0).all() and (top >= 0).all()
    assert (left + w <= width).all() and (top + h <= height).all()
    # The ratio's mean tells a uniform logarithm from a uniform ratio.
    ours, theirs = (np.column_stack([b, b[:, 2] / b[:, 3]]) for b in (ours, theirs))
    error = 5 * theirs.std(0) / (n / 2) ** 0.5
    assert (abs(ours.mean(0) - theirs.mean(0)) < error).all()
    spread = abs(ours.std(0) / theirs.std(0) - 1)
    assert (spread < 0.08).all()


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ((10, 100), (43, 0, 13, 10)),
        ((100, 10), (0, 43, 10, 13)),
        ((1, 1), (0, 0, 1, 1)),
    ],
)
def test_narrow_images_give_their_centre(shape, box):
    assert random_box(*shape, np.random.default_rng(0)) == box
    pixels = np.zeros((*shape, 3), np.uint8)
    assert resolve_augment("standard")(pixels, 0).shape == pixels.shape


def test_transform_may_write_into_its_image_and_gives_tv_tensors(pixels):
    from torchvision import tv_tensors

    def darken(image):
        return tv_tensors.Image(image.zero_())

    before = pixels.copy()
    view = resolve_augment(darken)(pixels, 0)
    assert type(view) is np.ndarray and not view.any()
    assert np.array_equal(pixels, before)


@pytest.mark.parametrize(
    ("transform", "came", "fix"),
    [
        (v2.RandomResizedCrop(16, antialias=True), "(3, 16, 16)", "size=(24, 32)"),
        (v2.ToDtype(torch.float32, scale=True), "torch.float32", "Remove ToDtype"),
        (v2.ToPILImage(), "a Image", "Remove ToPILImage"),
        (lambda image: None, "a NoneType", "(3, 24, 32)"),
    ],
    ids=["shape", "dtype", "image", "nothing"],
)
def test_wrong_results_say_what_came_and_what_is_needed(transform, came, fix, pixels):
    with pytest.raises(ValueError) as error:
        resolve_augment(transform)(pixels, 0)
    assert came in str(error.value) and fix in str(error.value)
    assert "uint8" in str(error.value)
    # It is the transform's fault, and must not be listed as a bad row.
    assert not isinstance(error.value, UnreadableRow)


# --- identities --------------------------------------------------------------


def identity_of(augment) -> bytes:
    return resolve_augment(augment).identity


class Shift:
    def __init__(self, by):
        self.by = by

    def __call__(self, image):
        return image + torch.as_tensor(self.by, dtype=torch.uint8)


def test_equal_transforms_share_their_identity_and_others_do_not():
    transforms = [
        lambda: "flip",
        lambda: "standard",
        lambda: v2.RandAugment(),
        lambda: v2.RandAugment(num_ops=3),
        lambda: v2.Compose([v2.ColorJitter(0.4), v2.RandomHorizontalFlip()]),
        lambda: v2.Compose([v2.ColorJitter(0.5), v2.RandomHorizontalFlip()]),
        lambda: Shift(1),
        lambda: Shift(2),
        lambda: draw_everywhere,
    ]
    identities = [identity_of(make()) for make in transforms]
    assert identities == [identity_of(make()) for make in transforms]
    assert len(set(identities)) == len(transforms)


def test_using_a_transform_keeps_its_identity(pixels):
    view = resolve_augment(CUSTOM)
    view(pixels, 0)
    assert identity_of(CUSTOM) == view.identity


def test_other_processes_find_the_same_identity():
    """Of copies, as workers get them, and of transforms that are made there."""
    notebook = {"__name__": "__main__"}
    exec("def part(x):\n    return x\ndef whole(x):\n    return part(x)", notebook)
    part, whole = notebook["part"], notebook["whole"]
    sent = [CUSTOM, v2.RandAugment(), v2.Lambda(part), whole]
    sent.append(v2.RandomResizedCrop(24, antialias=True))  # holds a tensor
    code = """
        import pickle, sys
        from torchvision.transforms import v2
        from sklearn_transfer.inputs.augment import resolve_augment
        made = v2.Compose([v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4)])
        for transform in [*pickle.load(sys.stdin.buffer), made]:
            print(resolve_augment(transform).identity.hex())
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        input=cloudpickle.dumps(sent),
        check=True,
        capture_output=True,
    )
    expected = [identity_of(transform).hex() for transform in [*sent, CUSTOM]]
    assert out.stdout.decode().split() == expected


def test_redefined_function_is_another_transform():
    """As in a notebook, where the name stays and the body changes."""
    identities = set()
    for shift in (1, 2):
        namespace = {"__name__": "__main__"}
        exec(f"def shifted(image):\n    return image + {shift}", namespace)
        identities.add(identity_of(namespace["shifted"]))
    assert len(identities) == 2


def test_edited_module_is_another_transform(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "my_transforms_of_test_augment.py"
    file.write_text("def shifted(image):\n    return image + 1\n")
    import my_transforms_of_test_augment as module

    before = identity_of(module.shifted)
    assert identity_of(module.shifted) == before
    file.write_text("def shifted(image):\n    return image + 2\n")
    assert identity_of(module.shifted) != before
    del sys.modules[module.__name__]


# --- fixed views -------------------------------------------------------------


@pytest.fixture
def rows(images):
    return image_rows(images[:3])


def views_of(rows, augment="standard", n_views=4) -> FixedViews:
    return FixedViews(rows, resolve_augment(augment), n_views)


def test_fixed_views_count_view_after_view(image_files):
    views = views_of(image_rows(image_files[:3]))
    assert len(views) == 12
    for i in range(12):
        assert views.row_of(i) == i % 3
        assert views.name(i) == f"row {i % 3} ({image_files[i % 3]!r})"
        assert views.size(i) == ((90, 72) if i % 3 == 0 or i % 3 == 2 else (72, 90))


def test_fixed_view_is_the_augmented_row(rows):
    flip = views_of(rows, "flip", n_views=8)
    mirrored = []
    for i in range(len(flip)):
        plain = rows.load(i % 3, RECIPE)
        view = flip.load(i, RECIPE, flip.digest(i))
        mirrored.append(np.array_equal(view, plain[:, ::-1]))
        assert mirrored[-1] or np.array_equal(view, plain)
    mirrored = np.reshape(mirrored, (8, 3))
    # Each row in its own rhythm: neither the row nor the view decides alone.
    assert (mirrored.min(0) < mirrored.max(0)).all()
    assert (mirrored.min(1) < mirrored.max(1)).any()


def test_digests_tell_content_augmentation_and_view(rows, images):
    other = image_rows(images[3:6])
    digests = [
        views.digest(i)
        for views in (
            views_of(rows),
            views_of(rows, "flip"),
            views_of(rows, CUSTOM),
            views_of(other),
        )
        for i in range(12)
    ]
    digests += [rows.digest(i) for i in range(3)]
    assert len(set(digests)) == 4 * 12 + 3
    assert {len(digest) for digest in digests} == {32}


@pytest.mark.parametrize("augment", ["standard", CUSTOM], ids=["named", "transform"])
def test_views_are_shared_by_folds_orders_and_counts(augment, images):
    """Content, augmentation and number of the view decide, and nothing else."""
    few = views_of(image_rows(images[:3]), augment, n_views=2)
    many = views_of(image_rows([*images[5:8], *images[:3][::-1]]), augment, n_views=5)
    for view in range(2):
        for row in range(3):
            i, j = view * 3 + row, view * 6 + 5 - row
            assert few.digest(i) == many.digest(j)
            found = many.load(j, RECIPE, many.digest(j))
            assert np.array_equal(few.load(i, RECIPE), found)


def test_views_of_a_row_differ(rows):
    views = views_of(rows, n_views=6)
    for row in range(3):
        found = {views.load(v * 3 + row, RECIPE).tobytes() for v in range(6)}
        assert len(found) == 6


def test_content_is_digested_once_for_all_views(rows, monkeypatch):
    asked, digest = [], type(rows).digest
    monkeypatch.setattr(
        type(rows), "digest", lambda self, i: asked.append(i) or digest(self, i)
    )
    views = views_of(rows)
    for i in range(12):
        views.load(i, RECIPE, views.digest(i))
    assert asked == [0, 1, 2]


def reason(call) -> str:
    with pytest.raises(UnreadableRow) as error:
        call()
    return str(error.value)


@pytest.mark.parametrize(
    "bad", [b"not an image", None, "missing.png", np.zeros((2, 2, 2, 2))]
)
@pytest.mark.parametrize("kind", ["fixed", "fresh"])
def test_unreadable_row_gives_the_same_reason(bad, kind, images):
    rows = image_rows([images[0], bad])
    standard = resolve_augment("standard")
    views = FixedViews(rows, standard, 2) if kind == "fixed" else None
    i, views = (3, views) if views else (1, FreshViews(rows, standard, 0))
    assert reason(lambda: views.load(i, RECIPE)) == reason(lambda: rows.load(1, RECIPE))
    assert views.load(0, RECIPE).shape == (24, 32, 3)
    if not isinstance(bad, bytes):  # whose digest needs no decoding
        assert reason(lambda: views.digest(i)) == reason(lambda: rows.digest(1))


@pytest.mark.parametrize("kind", ["fixed", "fresh"])
def test_file_that_changes_is_a_bad_row(kind, image_files, images):
    rows = image_rows(image_files[:2])
    standard = resolve_augment("standard")
    views = (
        FixedViews(rows, standard, 2)
        if kind == "fixed"
        else FreshViews(rows, standard, 0)
    )
    digest = views.digest(1)
    images[5].save(image_files[1])
    assert "changed" in reason(lambda: views.load(1, RECIPE, digest))


def test_digest_of_another_row_is_refused(rows):
    views = views_of(rows)
    assert "changed" in reason(lambda: views.load(0, RECIPE, views.digest(3)))


@pytest.mark.parametrize("n_views", [0, -1, 1.5, True, "4"])
def test_wrong_number_of_views(rows, n_views):
    with pytest.raises(ValueError, match="n_views=4"):
        views_of(rows, n_views=n_views)


def test_number_of_views_from_numpy(rows):
    assert len(views_of(rows, n_views=np.int64(2))) == 6


# --- fresh views -------------------------------------------------------------


def loaded(views, epoch: int) -> list[bytes]:
    views.set_epoch(epoch)
    return [views.load(i, RECIPE).tobytes() for i in range(len(views))]


@pytest.mark.parametrize("augment", ["standard", CUSTOM], ids=["named", "transform"])
def test_fresh_views_depend_on_seed_epoch_and_row(augment, images):
    rows = image_rows([images[0]] * 3)
    augment = resolve_augment(augment)
    runs = [FreshViews(rows, augment, seed) for seed in (0, 0, 1)]
    first = [loaded(runs[0], epoch) for epoch in range(3)]
    assert [loaded(runs[1], epoch) for epoch in reversed(range(3))] == first[::-1]
    other = [loaded(runs[2], epoch) for epoch in range(3)]
    every = [view for run in (first, other) for epoch in run for view in epoch]
    assert len(set(every)) == 2 * 3 * 3


def test_fresh_views_start_at_epoch_0(rows):
    views = FreshViews(rows, resolve_augment("standard"), np.int64(7))
    start = [views.load(np.int64(i), RECIPE).tobytes() for i in range(3)]
    assert start == loaded(views, 0)


def test_fresh_views_pass_on_what_rows_say(image_files):
    rows = image_rows(image_files[:2])
    views = FreshViews(rows, resolve_augment("flip"), 0)
    assert len(views) == 2
    for i in range(2):
        assert views.name(i) == rows.name(i)
        assert views.size(i) == rows.size(i)
        assert views.digest(i) == rows.digest(i)
        assert views.load(i, RECIPE, rows.digest(i)).shape == (24, 32, 3)
