"""Every container, element type and odd format gives the pixels one expects."""

from __future__ import annotations

import io
import os
import threading
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from sklearn_transfer.inputs import files as files_module
from sklearn_transfer.inputs import images as images_module
from sklearn_transfer.inputs import pixels as pixels_module
from sklearn_transfer.inputs import recipe as recipe_module
from sklearn_transfer.inputs.folders import load_image_folder
from sklearn_transfer.inputs.images import ImageRecipe, UnreadableRow, image_rows

RECIPE = ImageRecipe(resize=32, crop=(28, 24))
WHOLE = ImageRecipe.for_size((40, 60))


def picture(height=40, width=60, seed=0) -> Image.Image:
    """A smooth, asymmetric RGB picture."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, format, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def load(element, recipe=RECIPE, **options) -> np.ndarray:
    return image_rows([element], **options).load(0, recipe)


def reason(element, **options) -> str:
    rows = image_rows([element], **options)
    with pytest.raises(UnreadableRow) as by_load:
        rows.load(0, RECIPE)
    with pytest.raises(UnreadableRow):
        rows.size(0)
        rows.digest(0)
        rows.load(0, RECIPE)
    return str(by_load.value)


def old_file(path, data: bytes) -> Path:
    path = Path(path)
    path.write_bytes(data)
    os.utime(path, (1e9, 1e9))
    return path


# -- the same picture through every door ---------------------------------------


def same_elements(folder):
    image = picture()
    pixels = np.asarray(image)
    png = encoded(image, "PNG")
    path = old_file(folder / "picture.png", png)
    with_alpha = np.dstack([pixels, np.full(pixels.shape[:2], 9, np.uint8)])
    yield from (str(path), path, png, bytearray(png), memoryview(png), image, pixels)
    yield from (pixels.transpose(2, 0, 1), pixels[::-1][::-1], with_alpha)
    yield from (pixels.astype(np.int64), pixels.astype(np.uint16) * 257)
    yield from (pixels / 255, (pixels / 255).astype(np.float32))
    yield Image.fromarray(with_alpha)
    yield encoded(image, "WEBP", lossless=True)
    yield encoded(image, "TIFF")
    yield encoded(image, "BMP")


def test_every_element_type_gives_the_same_pixels(tmp_path):
    expected = load(picture())
    for element in same_elements(tmp_path):
        np.testing.assert_array_equal(load(element), expected)
        assert image_rows([element]).size(0) == (40, 60)


def test_torch_tensors_are_read_without_importing_torch():
    class Tensor:
        """Quacks like a torch tensor on another device."""

        def __init__(self, array):
            self.array, self.dtype = array, array.dtype

        def detach(self):
            return self

        def cpu(self):
            return self

        def numpy(self):
            return self.array

    pixels = np.asarray(picture())
    tensor = Tensor(pixels.transpose(2, 0, 1))
    np.testing.assert_array_equal(load(tensor), load(pixels))


def test_grey_is_repeated_over_channels():
    grey = picture().convert("L")
    pixels = np.asarray(grey)
    expected = load(grey.convert("RGB"))
    png = encoded(grey, "PNG")
    for same in (grey, pixels, pixels[..., None], pixels[None], png):
        np.testing.assert_array_equal(load(same), expected)


def test_loaded_pixels_are_contiguous_writable_uint8(tmp_path):
    for element in same_elements(tmp_path):
        out = load(element)
        assert out.shape == (28, 24, 3) and out.dtype == np.uint8
        assert out.flags.c_contiguous and out.flags.writeable


# -- odd formats ---------------------------------------------------------------


def test_transparency_is_dropped_not_composited():
    image = picture()
    clear = image.copy()
    clear.putalpha(0)
    np.testing.assert_array_equal(load(encoded(clear, "PNG")), load(image))
    grey_alpha = image.convert("L").convert("LA")
    np.testing.assert_array_equal(load(grey_alpha), load(image.convert("L")))


@pytest.mark.parametrize("transparency", [3, bytes(range(256)), None])
def test_palettes_are_looked_up_and_warn_nowhere(transparency):
    palette = picture().quantize(64)
    expected = load(palette.convert("RGB"))
    extra = {} if transparency is None else {"transparency": transparency}
    data = encoded(palette, "PNG", **extra)
    np.testing.assert_array_equal(load(data), expected)
    np.testing.assert_array_equal(load(Image.open(io.BytesIO(data))), expected)


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_is_converted(format):
    data = encoded(picture().convert("CMYK"), format)
    expected = load(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(load(data), expected)


def sixteen_bit_files():
    grey = np.asarray(picture().convert("L"))
    wide = grey.astype(np.uint16) * 257
    image = Image.fromarray(wide)
    assert image.mode == "I;16"
    yield "png", encoded(image, "PNG")
    yield "tiff", encoded(image, "TIFF")
    header = f"P5 {grey.shape[1]} {grey.shape[0]} 65535\n".encode()
    yield "pgm, big-endian", header + wide.astype(">u2").tobytes()
    yield "mode I", Image.fromarray(wide.astype(np.int32))
    yield "array", wide
    yield "big-endian array", wide.astype(">u2")
    big_endian = Image.frombytes("I;16B", image.size, wide.astype(">u2").tobytes())
    yield "mode I;16B", big_endian
    yield "mode F", Image.fromarray((grey / 255).astype(np.float32))


@pytest.mark.parametrize(
    "name, element", list(sixteen_bit_files()), ids=lambda v: str(v)[:9]
)
def test_sixteen_bits_are_scaled_not_clipped(name, element):
    np.testing.assert_array_equal(load(element), load(picture().convert("L")))


def test_one_bit_is_black_and_white():
    bits = np.asarray(picture().convert("L")) > 127
    expected = load(bits.astype(np.uint8) * 255)
    np.testing.assert_array_equal(load(bits), expected)
    image = Image.fromarray(bits)
    assert image.mode == "1"
    np.testing.assert_array_equal(load(image), expected)
    np.testing.assert_array_equal(load(encoded(image, "PNG")), expected)


@pytest.mark.parametrize("mode", ["HSV", "YCbCr", "LAB", "RGBX", "RGBa", "La", "PA"])
def test_other_modes_are_close_to_the_picture(mode):
    image = picture()
    through = {"RGBa": "RGBA", "La": "LA"}.get(mode, mode)
    if mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        odd = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    elif mode == "PA":
        odd = image.quantize(200).convert("PA")
    else:
        odd = image.convert(through).convert(mode)
    assert odd.mode == mode
    target = image.convert("L") if mode == "La" else image
    error = np.abs(load(odd).astype(int) - load(target).astype(int)).mean()
    assert error < 8


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_give_their_first_frame(format):
    frames = [picture(seed=s).quantize(32).convert("RGB") for s in range(3)]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(
        frames[0], format, save_all=True, append_images=frames[1:], **options
    )
    assert Image.open(io.BytesIO(data)).n_frames == 3
    error = np.abs(load(data).astype(int) - load(frames[0]).astype(int)).mean()
    assert error < 3


def test_tiny_and_thin_pictures_are_enlarged():
    one = load(np.full((1, 1, 3), 7, np.uint8), ImageRecipe.for_size(64))
    assert one.shape == (64, 64, 3) and (one == 7).all()
    thin = load(Image.new("RGB", (1, 20_000), (1, 2, 3)), ImageRecipe.for_size(64))
    assert (thin == [1, 2, 3]).all()


# -- EXIF ----------------------------------------------------------------------

_UNDO = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def oriented(image, orientation, format) -> bytes:
    """A file that a viewer shows as ``image``, stored turned."""
    stored = image if orientation == 1 else image.transpose(_UNDO[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 98, "subsampling": 0} if format == "JPEG" else {}
    if format == "WEBP":
        options = {"lossless": True}
    return encoded(stored, format, exif=exif, **options)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("resize, crop", [(32, (28, 24)), ((45, 33), (45, 29))])
def test_every_exif_orientation_is_the_upright_picture(
    format, orientation, resize, crop
):
    upright = picture(41, 60)
    recipe = ImageRecipe(resize=resize, crop=crop)
    expected = load(upright, recipe).astype(int)
    data = oriented(upright, orientation, format)
    rows = image_rows([data, Image.open(io.BytesIO(data))])
    for i in range(2):
        assert np.abs(rows.load(i, recipe) - expected).max() <= 6
        assert rows.size(i) == (41, 60)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_turned_pil_image_has_the_digest_of_its_upright_pixels(orientation):
    upright = picture()
    turned = Image.open(io.BytesIO(oriented(upright, orientation, "PNG")))
    rows = image_rows([turned, np.asarray(upright)])
    assert rows.digest(0) == rows.digest(1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_box_is_turned_with_its_picture(orientation):
    upright = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8))
    box = (1, 0, 4, 5)  # nowhere near the centre
    stored = upright if orientation == 1 else upright.transpose(_UNDO[orientation])
    part = stored.crop(recipe_module.turned_box(box, orientation, 6, 8))
    again = pixels_module.transposed(part, orientation)
    np.testing.assert_array_equal(np.asarray(again), np.asarray(upright.crop(box)))


def test_orientation_is_found_in_xmp_and_in_images_turned_by_hand():
    upright = picture()
    stored = upright.transpose(_UNDO[6])
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"></x:xmpmeta>'
    with_xmp = encoded(stored, "JPEG", quality=98, subsampling=0, xmp=xmp)
    assert image_rows([with_xmp]).size(0) == (40, 60)
    stored.getexif()[0x0112] = 6
    # Turned after resizing: some releases of Pillow round rows and columns otherwise.
    np.testing.assert_allclose(load(stored), load(upright), rtol=0, atol=1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_holds_under_draft_decoding(orientation):
    upright = picture(480, 640)
    recipe = ImageRecipe(resize=(32, 48), crop=(30, 40))
    out = load(oriented(upright, orientation, "JPEG"), recipe)
    assert np.abs(out.astype(int) - load(upright, recipe)).mean() < 2


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0II*\0garbage",
        b"Exif\0\0",
        b"Exif\0\0nonsense",
        b"Exif\0\0II*\0\x08\0\0\0\x05\0\x0f\x01\x02\0\xff\xff\xff\xff\x06",
    ],
)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_costs_neither_picture_nor_silence(format, exif):
    image = picture()
    damaged = encoded(image, format, exif=exif)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = load(damaged)
    assert not caught
    np.testing.assert_array_equal(out, load(encoded(image, format)))


@pytest.mark.parametrize("order, kind", [("<", 3), (">", 3), ("<", 4), (">", 4)])
def test_orientation_is_read_in_either_byte_order(order, kind):
    import struct

    magic = b"II*\0" if order == "<" else b"MM\0*"
    value = struct.pack(order + "L" if kind == 4 else order + "HH", *[6, 0][: 5 - kind])
    entry = struct.pack(order + "HHL", 0x0112, kind, 1) + value
    head = magic + struct.pack(order + "LH", 8, 1)
    exif = b"Exif\0\0" + head + entry + bytes(4)
    assert image_rows([encoded(picture(), "JPEG", exif=exif)]).size(0) == (60, 40)


# -- resizing ------------------------------------------------------------------


def two_steps(image, recipe) -> np.ndarray:
    full_h, full_w = recipe.resized(image.height, image.width)
    method = Image.Resampling[recipe.interpolation.upper()]
    whole = image.resize((full_w, full_h), method)
    top, left = (
        round((a - b) / 2) for a, b in zip((full_h, full_w), recipe.crop, strict=True)
    )
    box = (left, top, left + recipe.crop[1], top + recipe.crop[0])
    return np.asarray(whole.crop(box)).astype(int)


@pytest.mark.parametrize("decode", ["auto", "exact"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("shape", [(160, 213), (901, 600), (31, 47), (224, 230)])
@pytest.mark.parametrize("resize", [256, (230, 300)])
def test_one_step_equals_resize_then_crop(shape, interpolation, decode, resize):
    noisy = picture(*shape)
    noisy.putpixel((3, 3), (255, 255, 255))
    recipe = ImageRecipe(resize, (224, 224), interpolation)
    difference = np.abs(load(noisy, recipe, decode=decode) - two_steps(noisy, recipe))
    assert difference.mean() < 0.5
    assert difference.max() <= (2 if decode == "exact" else 12)


def test_reducing_first_stays_close_even_for_noise():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (601, 801, 3), dtype=np.uint8)
    recipe = ImageRecipe.for_size(100)  # 6 times smaller: halved or thirded first
    difference = np.abs(load(noise, recipe) - two_steps(Image.fromarray(noise), recipe))
    assert difference.mean() < 3


def test_aspect_is_kept_unless_the_weights_squash():
    square = Image.new("L", (200, 100))
    square.paste(255, (88, 40, 108, 60))  # sides of 20
    kept = load(square, ImageRecipe.for_size(50))[:, :, 0] > 127
    assert kept.any(0).sum() == kept.any(1).sum() == 10
    squashed = load(square, ImageRecipe(50, (50, 50), squash=True))[:, :, 0] > 127
    assert (squashed.any(0).sum(), squashed.any(1).sum()) == (5, 10)


def test_image_size_pair_covers_both_and_a_square_pair_is_the_int():
    assert ImageRecipe.for_size((40, 60)).resized(100, 100) == (60, 60)
    assert ImageRecipe.for_size((40, 60)).resized(100, 1000) == (40, 400)
    for shape in ((160, 213), (213, 160), (7, 1000)):
        one, two = ImageRecipe.for_size(224), ImageRecipe.for_size((224, 224))
        assert one.resized(*shape) == two.resized(*shape)
    assert ImageRecipe.for_size(224).resized(160, 213) == (224, int(224 * 213 / 160))


def test_pictures_of_the_right_size_come_back_untouched():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    np.testing.assert_array_equal(load(pixels, WHOLE), pixels)
    cut = load(pixels, ImageRecipe(resize=(40, 60), crop=(20, 30)))
    np.testing.assert_array_equal(cut, pixels[10:30, 15:45])


def test_recipes_are_plain_values_and_refuse_nonsense():
    plain = ImageRecipe(resize=224, crop=(224, 224))
    from_numpy = ImageRecipe(resize=np.int64(224), crop=[np.int32(224)] * 2)
    assert repr(from_numpy) == repr(plain) == repr(ImageRecipe.for_size(224))
    assert hash(from_numpy) == hash(plain)
    for wrong in (0, -3, True, 2.5, "224", (1, 2, 3), None):
        with pytest.raises(ValueError, match="image_size"):
            ImageRecipe.for_size(wrong)
    with pytest.raises(ValueError, match="larger than resize"):
        ImageRecipe(resize=200, crop=(224, 224))
    with pytest.raises(ValueError, match="bilinear"):
        ImageRecipe(resize=8, crop=(8, 8), interpolation="linear")


# -- draft decoding ------------------------------------------------------------


def decoded_sizes(monkeypatch) -> list:
    """Sizes at which pictures reach the resizing."""
    seen = []
    original = images_module.eight_bit

    def spy(image, value_range):
        seen.append(image.size)
        return original(image, value_range)

    monkeypatch.setattr(images_module, "eight_bit", spy)
    return seen


@pytest.mark.parametrize(
    "side, expected", [(255, 255), (256, 128), (511, 256), (512, 128), (1024, 128)]
)
def test_draft_starts_at_four_times_and_stays_above_twice(monkeypatch, side, expected):
    seen = decoded_sizes(monkeypatch)
    data = encoded(picture(side, 2 * side), "JPEG")
    load(data, ImageRecipe.for_size(64))
    load(data, ImageRecipe.for_size(64), decode="exact")
    assert min(seen[0]) == expected
    assert seen[1] == (2 * side, side)


@pytest.mark.parametrize("side", [256, 515, 1030])
def test_draft_decoding_changes_little(side):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (side, side + 77, 3), dtype=np.uint8)
    grain = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(1))
    rough = Image.blend(picture(side, side + 77), grain, 0.3)
    data = encoded(rough, "JPEG", quality=92)
    recipe = ImageRecipe.for_size(64)
    fast = load(data, recipe).astype(float)
    exact = load(data, recipe, decode="exact").astype(float)
    a, b = (fast - fast.mean()).ravel(), (exact - exact.mean()).ravel()
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.99


# -- values --------------------------------------------------------------------


def test_value_range_scales_all_numeric_arrays_alike():
    digit = np.arange(64).reshape(8, 8) % 17
    expected = np.rint(digit / 16 * 255).astype(np.uint8)
    recipe = ImageRecipe.for_size(8)
    for dtype in (np.uint8, np.int32, np.float16, np.float64, np.uint16):
        out = load(digit.astype(dtype), recipe, value_range=(0, 16))
        np.testing.assert_array_equal(out[:, :, 0], expected)
    signed = load(digit / 8 - 1, recipe, value_range=(-1, 1))
    np.testing.assert_array_equal(signed[:, :, 0], expected)


def test_nothing_is_scaled_by_its_own_range():
    dark = np.full((8, 8), 0.1)
    assert (load(dark) == 26).all()
    assert (load(np.full((8, 8), 3, np.int64)) == 3).all()
    assert (load(np.full((8, 8), 300, np.uint16)) == 1).all()
    assert (load(np.full((8, 8), 200, np.uint16)) == 1).all()  # 0.78, to the nearest
    assert (load(Image.fromarray(np.full((8, 8), 200, np.int32))) == 1).all()


@pytest.mark.parametrize(
    "array, line",
    [
        (np.full((8, 8), 16.0), r"value_range=\(0, 16\)"),
        (np.full((8, 8), 255.0), r"value_range=\(0, 255\)"),
        (np.full((8, 8), -0.5), r"value_range=\(-1, 1\)"),
        (np.full((8, 8), 4000), r"value_range=\(0, 4095\)"),
        (np.full((8, 8), -7.5), r"value_range=\(-8, -7\)"),
    ],
)
def test_values_out_of_range_print_the_line_to_write(array, line):
    with pytest.raises(UnreadableRow, match=line):
        load(array)


@pytest.mark.parametrize(
    "array, words",
    [
        (np.full((8, 8), np.nan), "NaN or infinite"),
        (np.full((8, 8), np.inf), "NaN or infinite"),
        (np.zeros((8, 8, 2)), "neither 1, 3 nor 4 channels"),
        (np.zeros((8, 8, 5)), "neither 1, 3 nor 4 channels"),
        (np.zeros((2, 3, 8, 8)), "is not an image"),
        (np.zeros(8), "is not an image"),
        (np.zeros((0, 8)), "holds no pixels"),
        (np.array([["a"]], dtype=object), "dtype object"),
        (np.zeros((8, 8), complex), "dtype complex128"),
        (np.array([["a"]]), "dtype <U1"),
        (17, "int is not an image"),
        ([[0, 1], [1, 0]], "numpy.asarray"),
        ({"path": "a"}, "dict is not an image"),
    ],
)
def test_arrays_that_are_no_image_say_what_came(array, words):
    rows = image_rows(["first.png", array])
    with pytest.raises(UnreadableRow, match=words):
        rows.load(1, RECIPE)
    with pytest.raises(UnreadableRow, match=words):
        rows.digest(1)


def test_channels_last_wins_where_both_layouts_fit():
    both = np.zeros((3, 5, 4), np.uint8)
    assert image_rows([both]).size(0) == (3, 5)
    assert image_rows([np.zeros((3, 5, 6), np.uint8)]).size(0) == (5, 6)


@pytest.mark.parametrize("wrong", [3, (1, 0), (0, 0), (0, np.inf), (0, 1, 2), "01"])
def test_value_range_must_be_two_rising_numbers(wrong):
    with pytest.raises(ValueError, match=r"value_range=\(0, 255\)"):
        image_rows([np.zeros((2, 2))], value_range=wrong)


def test_decode_and_image_shape_are_checked():
    with pytest.raises(ValueError, match="'auto' or 'exact'"):
        image_rows(["a.jpg"], decode="fast")
    with pytest.raises(ValueError, match="image_shape"):
        image_rows([np.zeros(4)], image_shape=(2, 0))


def test_flat_rows_take_image_shape():
    pixels = np.asarray(picture())
    flat = [pixels.ravel(), pixels.ravel()]
    np.testing.assert_array_equal(load(flat[0], image_shape=(40, 60, 3)), load(pixels))
    stacked = image_rows(np.stack(flat), image_shape=(40, 60, 3))
    np.testing.assert_array_equal(stacked.load(1, RECIPE), load(pixels))


# -- rows that cannot be read --------------------------------------------------


def test_empty_bytes_and_web_pages_are_no_images():
    assert reason(b"") == "is empty"
    assert "begins with b'<!DOCTYPE html><'" in reason(b"<!DOCTYPE html><html>")


def test_missing_values_are_called_missing():
    import pandas as pd

    for value in (None, np.nan, pd.NA, pd.NaT, np.float32("nan")):
        assert reason(value) == "missing"


def hostile_paths(folder):
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "folder").mkdir()
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("hello, this is no picture")
    os.mkfifo(folder / "pipe")
    yield folder / "loop", "symbolic links"
    yield folder / "folder", "load_image_folder"
    yield folder / "empty.png", "empty file"
    yield folder / "text.jpg", "begins with b'hello, this is n'"
    yield folder / "pipe", "pipe, device or socket"
    yield folder / "none.png", "no such file"
    yield folder / "text.jpg" / "below", "Not a directory"
    yield "/dev/zero", "pipe, device or socket"
    yield "/dev/stdin", "not|no such"
    yield "none.png", "no such file in"
    yield "", "no such file"
    yield "a\0b.png", "no path can hold"
    yield "a\ud800.png", "no path can hold"
    yield "x" * 5000, "cannot be opened"


def test_hostile_paths_are_refused_at_once(tmp_path):
    import re

    for path, words in hostile_paths(tmp_path):
        assert re.search(words, reason(path)), path


def test_a_pipe_that_takes_a_files_place_is_refused(tmp_path, monkeypatch):
    path = old_file(tmp_path / "a.png", encoded(picture(), "PNG"))
    original = files_module._stat_regular

    def then_swap(target):
        found = original(target)
        if target == path:
            path.unlink()
            os.mkfifo(path)
        return found

    monkeypatch.setattr(files_module, "_stat_regular", then_swap)
    with pytest.raises(UnreadableRow, match="pipe, device or socket"):
        image_rows([path]).load(0, RECIPE)


@pytest.mark.parametrize(
    "url",
    [
        "http://a.b/c.png",
        "https://a.b/c.png",
        "s3://bucket/c.png",
        Path("https://a.b/c.png"),
    ],
)
def test_urls_are_not_fetched(url):
    assert "download it" in reason(url)


def test_paths_with_undecodable_names_are_read(tmp_path):
    raw = os.fsencode(tmp_path) + b"/\xff.png"
    with open(raw, "wb") as file:
        file.write(encoded(picture(), "PNG"))
    np.testing.assert_array_equal(load(os.fsdecode(raw)), load(picture()))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_truncated_files_are_unreadable(format):
    data = encoded(picture(200, 300), format)
    assert reason(data[: len(data) // 2])


def test_postscript_does_not_run_a_program():
    assert "not an image" in reason(encoded(picture(), "EPS"))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "ICO"])
def test_flipped_bytes_never_raise_anything_else(format, recwarn):
    warnings.simplefilter("ignore")  # Pillow's own remarks on damaged metadata
    clean = np.frombuffer(encoded(picture(), format), np.uint8)
    rng = np.random.default_rng(0)
    for _ in range(60):
        bad = clean.copy()
        places = rng.integers(0, len(bad), 6)
        places[:3] %= 64  # half of them in the header
        bad[places] = rng.integers(0, 256, 6)
        try:
            assert load(bad.tobytes()).shape == (28, 24, 3)
        except UnreadableRow as error:
            assert str(error)


def test_pixel_limit_of_pillow_is_respected_in_silence(monkeypatch):
    data = encoded(picture(), "PNG")  # 2400 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1300)
    load(data)  # between once and twice the limit: no warning, pytest -W error
    image_rows([data]).size(0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1100)
    assert "PIL.Image.MAX_IMAGE_PIXELS = 2400" in reason(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    load(data)


def test_size_decodes_no_pixels(monkeypatch):
    data = encoded(picture(), "PNG")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    assert image_rows([data]).size(0) == (40, 60)


def test_pil_images_that_cannot_decode_are_unreadable():
    data = encoded(picture(200, 300), "PNG")
    assert "cannot be decoded" in reason_of_load(Image.open(io.BytesIO(data[:900])))
    closed = Image.open(io.BytesIO(data))
    closed.close()
    assert "cannot be decoded" in reason_of_load(closed)


def reason_of_load(element) -> str:
    with pytest.raises(UnreadableRow) as caught:
        load(element)
    return str(caught.value)


# -- names and digests ---------------------------------------------------------


def test_rows_are_named_by_position_and_path():
    rows = image_rows(["a/b.jpg", Path("c.jpg"), b"..."])
    assert rows.name(0) == "row 0 ('a/b.jpg')"
    assert rows.name(1) == "row 1 ('c.jpg')"
    assert rows.name(2) == "row 2"
    assert image_rows(["a\ud800"]).name(0).encode()


def test_digests_agree_for_equal_contents_only(tmp_path):
    image = picture()
    png = encoded(image, "PNG")
    path = old_file(tmp_path / "a.png", png)
    other = old_file(tmp_path / "b.png", png)
    files = image_rows([path, str(other), png, memoryview(png)])
    assert len({files.digest(i) for i in range(4)}) == 1
    pixels = np.asarray(image)
    arrays = image_rows([image, pixels, pixels / 255, pixels.transpose(2, 0, 1)])
    assert len({arrays.digest(i) for i in range(4)}) == 1
    changed = pixels.copy()
    changed[0, 0, 0] ^= 1
    reshaped = pixels.reshape(60, 40, 3)
    distinct = image_rows([png, pixels, changed, reshaped])
    assert len({distinct.digest(i) for i in range(4)}) == 4
    assert len(distinct.digest(0)) == 32


def test_options_that_change_a_files_pixels_change_its_digest():
    png = encoded(picture(), "PNG")
    plain = image_rows([png]).digest(0)
    assert plain != image_rows([png], decode="exact").digest(0)
    assert plain != image_rows([png], value_range=(0, 16)).digest(0)


def test_digest_of_an_old_file_is_remembered(tmp_path, monkeypatch):
    path = old_file(tmp_path / "a.png", encoded(picture(), "PNG"))
    first = image_rows([path]).digest(0)
    monkeypatch.setattr(files_module, "regular_file", None)
    assert image_rows([path]).digest(0) == first


def test_digest_of_a_young_file_is_not_remembered(tmp_path):
    path = tmp_path / "a.png"
    one, two = (encoded(picture(seed=s), "BMP") for s in (0, 1))
    assert len(one) == len(two)
    stamp = time.time()
    digests = []
    for data in (one, two):
        path.write_bytes(data)  # same inode, size and time stamp
        os.utime(path, (stamp, stamp))
        digests.append(image_rows([path]).digest(0))
    assert digests == [image_rows([d]).digest(0) for d in (one, two)]
    assert digests[0] != digests[1]


def test_a_rewritten_file_has_a_new_digest(tmp_path):
    path = old_file(tmp_path / "a.png", encoded(picture(), "BMP"))
    before = image_rows([path]).digest(0)
    path.write_bytes(encoded(picture(seed=1), "BMP"))
    os.utime(path, (1e9 + 1, 1e9 + 1))
    assert image_rows([path]).digest(0) != before


def test_the_memo_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "_MEMO_LIMIT", 3)
    monkeypatch.setattr(files_module, "_known_digests", {})
    for i in range(8):
        path = old_file(tmp_path / f"{i}.png", encoded(picture(seed=i), "PNG"))
        image_rows([path]).digest(0)
        assert 1 <= len(files_module._known_digests) <= 3


def test_bytes_decoded_are_the_bytes_digested(tmp_path):
    path = old_file(tmp_path / "a.png", encoded(picture(), "PNG"))
    rows = image_rows([path])
    digest = rows.digest(0)
    np.testing.assert_array_equal(rows.load(0, RECIPE, digest), load(picture()))
    path.write_bytes(encoded(picture(seed=1), "PNG"))
    with pytest.raises(UnreadableRow, match="changed while it was being read"):
        rows.load(0, RECIPE, digest)


def test_one_lazy_pil_image_may_be_read_from_many_threads():
    lazy = Image.open(io.BytesIO(encoded(picture(400, 600), "PNG")))
    rows = image_rows([lazy] * 8)
    start, out = threading.Barrier(8), [None] * 8

    def work(i):
        start.wait()
        out[i] = rows.load(i, RECIPE)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for pixels in out:
        np.testing.assert_array_equal(pixels, load(picture(400, 600)))


# -- folders -------------------------------------------------------------------


def test_folders_become_sorted_paths_and_labels(tmp_path):
    files = ["bee/2.png", "bee/deep/1.JPG", "ant/b.webp", "ant/a.tiff"]
    skipped = [
        "ant/.hidden.png",
        "ant/notes.txt",
        ".git/x.png",
        "ant/.d/x.png",
        "x.png",
    ]
    for name in files + skipped + ["ant/page.pdf", "ant/figure.eps"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    paths, labels = load_image_folder(tmp_path)
    found = [Path(p).relative_to(tmp_path).as_posix() for p in paths]
    assert found == ["ant/a.tiff", "ant/b.webp", "bee/2.png", "bee/deep/1.JPG"]
    assert labels.tolist() == ["ant", "ant", "bee", "bee"]
    assert load_image_folder(str(tmp_path))[0].tolist() == paths.tolist()


def test_folders_without_classes_or_images_say_so(tmp_path):
    with pytest.raises(ValueError, match="one folder a class"):
        load_image_folder(tmp_path)
    (tmp_path / "ant").mkdir()
    with pytest.raises(ValueError, match="No image below"):
        load_image_folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_image_folder(tmp_path / "none")


def test_splits_are_not_taken_for_classes(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "ant").mkdir(parents=True)
        (tmp_path / split / "ant" / "1.png").touch()
    with pytest.raises(ValueError, match=r"load_image_folder\('.*train'\)"):
        load_image_folder(tmp_path)
    assert load_image_folder(tmp_path / "train")[1].tolist() == ["ant"]


@pytest.mark.parametrize(
    ("options", "is_alone"),
    [
        ({"format": "PNG"}, True),
        ({"format": "JPEG", "progressive": True}, True),
        # Decoded at an eighth of its size, and never held whole.
        ({"format": "JPEG"}, False),
    ],
    ids=str,
)
def test_pictures_that_are_held_whole_are_decoded_one_at_a_time(
    options, is_alone, monkeypatch
):
    took = []

    class Lock:
        @contextmanager
        def held(self):
            took.append("lock")
            yield
            took.append("release")

    monkeypatch.setattr(images_module, "_large_lock", Lock())
    monkeypatch.setattr(images_module, "LARGE", 400 * 300)
    fit = images_module.ImageRows._fit
    monkeypatch.setattr(
        images_module.ImageRows, "_fit", lambda *a: took.append("fit") or fit(*a)
    )
    data = encoded(picture(400, 600), **options)
    assert load(data).shape == (28, 24, 3)
    assert took == (["lock", "fit", "release"] if is_alone else ["fit"])
    took.clear()
    load(encoded(picture(300, 400), **options))
    assert took == ["fit"]
