"""Hostile image files end in the vector of their pixels, or in an error naming them.

The network hands the pixels of the resized picture on, so that a vector is garbage
exactly where it differs from that of the array that Pillow decodes.
"""

from __future__ import annotations

import faulthandler
import io
import os
import struct
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sklearn_transfer import ImageFeaturizer, backbone_from_module
from sklearn_transfer.exceptions import UnreadableRowsError, UnreadableRowsWarning
from sklearn_transfer.inputs.files import _UNREAD_FORMATS
from sklearn_transfer.inputs.images import LARGE, image_rows
from tests.stress import hostile
from tests.stress.workers import Child

SIZE = 12
TOGETHER = 250
IN_A_CHILD = 1000
# Seconds that a batch may take before its child is ended, where it stands printed.
PATIENCE = 90.0
# Lower than Pillow's own while fuzzing: a claim of 150 million pixels is granted, and
# costs a second. The bombs below keep Pillow's.
FUZZED_PIXELS = 2**21
WRONG_SUFFIXES = (".png", ".jpg", ".tif", ".gif", ".txt", "")
# What a refused row may be told, and nothing else.
REASONS = (
    "cannot be decoded (",
    "not an image that Pillow reads; ",
    "its header claims ",
    "is empty",
    "is an empty file",
    "is a compressed FITS file",
    "its float32 pixels go from ",
    "its int32 pixels go from ",
    "its pixels hold NaN",
)


def pixels_of(side: int):
    """A network whose vector is the picture itself, in [0, 1]."""
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 3, 1, bias=False), torch.nn.Flatten()
    )
    torch.nn.init.dirac_(network[0].weight)
    plain = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    return backbone_from_module(network, image_size=side, name="pixels", **plain)


def featurizer(**given) -> ImageFeaturizer:
    plain = {"decode": "exact", "precision": "float32", "on_error": "nan"}
    found = ImageFeaturizer(pixels_of(SIZE), **{**plain, **given})
    return found.fit([np.zeros((2, 2), np.uint8)])


# --- what Pillow says of the same bytes -----------------------------------------


def decoded_by_pillow(file: hostile.Hostile) -> list[np.ndarray]:
    """The upright picture, as arrays that ImageFeaturizer takes; none if unreadable.

    Of a damaged EXIF block the orientation may be found or not: two pictures.
    """
    Image.init()
    formats = sorted(set(Image.OPEN) - _UNREAD_FORMATS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(file.data), formats=formats)
            image.load()
        except Exception:
            return []
        turns = [orientation(image)]
        if file.kind.startswith("exif") and turns == [1]:
            turns.append(hostile.TURN)
        return [as_array(image, turn) for turn in turns]


def orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:
        return 1


def as_array(image: Image.Image, orientation: int) -> np.ndarray:
    if image.mode.startswith("I;16"):
        found = np.asarray(image).astype(np.uint16)
    elif image.mode == "I":
        found = np.asarray(image) / 65535  # what 16-bit files hold
    elif image.mode == "F":
        found = np.asarray(image)
    elif image.mode in ("P", "PA", "RGBA", "RGBa"):
        found = np.asarray(image.convert("RGBA"))[:, :, :3]
    elif image.mode in ("L", "LA", "La", "1"):
        found = np.asarray(image.convert("LA" if image.mode == "La" else "L"))
        found = found[..., 0] if found.ndim == 3 else found
    else:
        found = np.asarray(image.convert("RGB"))
    return UPRIGHT.get(orientation, lambda pixels: pixels)(found)


UPRIGHT = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: np.swapaxes(pixels, 0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.swapaxes(np.rot90(pixels, 2), 0, 1),
    8: np.rot90,
}


# --- what the featurizer says of them --------------------------------------------


class Judged:
    """What came of hostile files, each against what Pillow makes of it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.ends = Counter()
        self.wrong: list[str] = []
        self.told = Counter()  # where warnings came from that a user would see

    def judge(self, numbers: range) -> None:
        files = [hostile.image(i) for i in numbers]
        rows = [self._handed_over(i, files[i - numbers[0]].data) for i in numbers]
        vectors, reasons = self._read(rows)
        expected = self._expected([decoded_by_pillow(file) for file in files])
        for i, file, vector, wanted in zip(
            numbers, files, vectors, expected, strict=True
        ):
            end, why = verdict(vector, wanted, reasons.get(i - numbers[0]))
            self.ends[end] += 1
            if end == "wrong":
                self.wrong.append(f"image({i}), {file.kind}: {why}")

    def _handed_over(self, i: int, data: bytes):
        """Bytes, or every third time a file with any suffix."""
        if i % 3:
            return data
        path = self.folder / f"{i}{WRONG_SUFFIXES[i // 3 % len(WRONG_SUFFIXES)]}"
        path.write_bytes(data)
        return str(path) if i % 2 else path

    def _read(self, rows) -> tuple[np.ndarray, dict[int, str]]:
        """Vectors, NaN for refused rows, and why those were refused."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            vectors = featurizer().transform(rows)
        told = [w for w in caught if w.category is not UnreadableRowsWarning]
        self.told.update(Path(w.filename).parent.name for w in told)
        refused = np.flatnonzero(np.isnan(vectors).any(axis=1)).tolist()
        assert len(caught) - len(told) == bool(refused)
        reasons = self._reasons(rows)
        assert sorted(reasons) == refused
        return vectors, reasons

    def _reasons(self, rows) -> dict[int, str]:
        """Why rows are refused; what is already known comes from the cache."""
        reasons: dict[int, str] = {}
        # Files that cannot even be read are told of before any is decoded.
        for _ in range(2):
            left = [i for i in range(len(rows)) if i not in reasons]
            if not left:
                break
            try:
                featurizer(on_error="raise").transform([rows[i] for i in left])
            except UnreadableRowsError as error:
                assert f"row {min(error.rows)}" in str(error)
                reasons |= {left[i]: why for i, why in error.rows.items()}
        return reasons

    def _expected(self, pictures: list[list[np.ndarray]]) -> list[np.ndarray]:
        """The vectors that each file may have, (n, d) each."""
        lengths = [len(arrays) for arrays in pictures]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnreadableRowsWarning)
            vectors = featurizer(cache=None).transform(list(chain(*pictures)))
        return np.split(vectors, np.cumsum(lengths)[:-1])


def verdict(vector, expected, reason: str | None) -> tuple[str, str]:
    """How one file ended, and what is wrong with that."""
    is_refused = bool(np.isnan(vector).any())
    if is_refused != (reason is not None):
        return "wrong", f"NaN: {is_refused}, and told: {reason}"
    is_readable = len(expected) > 0 and not np.isnan(expected[0]).any()
    if is_refused:
        if is_readable:
            return "wrong", f"Pillow reads it, and told was: {reason}"
        return ("refused" if reason.startswith(REASONS) else "wrong"), reason
    if not is_readable:
        return "wrong", "a vector, and Pillow cannot decode it"
    # In grey levels: a turned picture is resized before it is turned.
    away = 255 * np.abs(vector - expected).max(axis=1).min()
    return ("vector" if away <= 1.01 else "wrong"), f"{away:.0f} levels away"


@contextmanager
def silent_libraries():
    """Keep what libtiff and others print from the tests' output; gives the old way."""
    with os.fdopen(os.dup(2), "w") as spoken, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        yield spoken


def fuzz(first: int, count: int, folder: str) -> dict:
    """The ends of ``count`` images; runs in a child, which it may take down."""
    Image.MAX_IMAGE_PIXELS = FUZZED_PIXELS
    judged, last = Judged(Path(folder)), first + count
    with silent_libraries() as stderr:
        Judged(Path(folder)).judge(range(first, first + 40))  # all is loaded
        before = hostile.peak_megabytes()
        for start in range(first, last, TOGETHER):
            faulthandler.dump_traceback_later(PATIENCE, exit=True, file=stderr)
            judged.judge(range(start, min(start + TOGETHER, last)))
        faulthandler.cancel_dump_traceback_later()
    grown = hostile.peak_megabytes() - before
    return {**vars(judged), "megabytes": grown}


def test_each_file_ends_in_its_vector_or_in_an_error(amount, outcome, tmp_path):
    count, ends, megabytes = amount(10_000), Counter(), []
    for first in range(0, count, IN_A_CHILD):
        n = min(IN_A_CHILD, count - first)
        found, _ = Child(fuzz, first, n, str(tmp_path)).result()
        assert not found["wrong"], "\n".join(found["wrong"][:20])
        assert set(found["told"]) <= {"PIL"}  # its own remarks on a damaged TIFF
        ends += found["ends"]
        megabytes.append(found["megabytes"])
    assert ends["vector"] + ends["refused"] == count
    assert min(ends["vector"], ends["refused"]) > count / 4
    assert max(megabytes) < 400
    outcome(
        "A hostile image file ends in the vector of what Pillow decodes, or in an "
        "error that names its row",
        count,
        f"{ends['vector']:,} vectors, {ends['refused']:,} refused by name, no crash, "
        f"no hang, no other vector; {max(megabytes):.0f} MB of memory",
    )


@pytest.mark.parametrize(("kind", "n_values"), [(2, 1), (3, 103), (235, 1)])
def test_an_orientation_that_is_no_single_number_is_none(kind, n_values):
    entry = struct.pack("<HHLHH", 0x0112, kind, n_values, hostile.TURN, 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<LH", 8, 1) + entry + bytes(4)
    data = hostile.encoded(Image.new("RGB", (4, 9)), "JPEG", exif=exif)
    assert image_rows([data]).size(0) == (9, 4)


# --- bombs ----------------------------------------------------------------------

# Held at most while a picture is decoded: 4 bytes a pixel, twice where a mode has to
# be converted. Pillow grants 179 million of them.
BYTES_A_PIXEL = 9.5
GRANTED_SIDE = 13_377
# In grey, palette and 16 bits; each is the most that its mode costs.
MODES = ({"colour": 0, "bits": 1}, {"colour": 3, "bits": 8}, {"colour": 0, "bits": 16})


def read_bombs(n_granted: int, side: int) -> dict:
    """What became of bombs, in how many seconds and megabytes; runs in a child."""
    torch.set_num_threads(4)  # as many pictures are decoded at once
    reader = featurizer(cache=None)
    reader.transform([hostile.png(30, 30), hostile.png(31, 30)])  # all is loaded
    before = hostile.peak_megabytes()
    told, seconds = {}, []
    for name, data in hostile.refused_bombs().items():
        started = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            reader.transform([data])
        seconds.append(time.perf_counter() - started)
        told[name] = [str(warning.message) for warning in caught]
    refused = hostile.peak_megabytes() - before
    granted = [
        hostile.png(side, side - i, **MODES[i % len(MODES)]) for i in range(n_granted)
    ]
    assert (reader.transform(granted) == 0).all()  # they are black
    grown = hostile.peak_megabytes() - before
    return {"told": told, "seconds": max(seconds), "refused": refused, "granted": grown}


def test_bombs_are_refused_or_read_in_bounded_memory(amount, outcome):
    n, side = 6, amount(GRANTED_SIDE, 6400)
    assert side**2 > LARGE  # so many that one is decoded at a time
    found, warned = Child(read_bombs, n, side).result()
    assert not warned
    for name, messages in found["told"].items():
        assert len(messages) == 1, (name, messages)
        assert "row 0: " in messages[0], (name, messages)
        assert any(reason in messages[0] for reason in BOMB_REASONS), (name, messages)
    assert found["seconds"] < 10 and found["refused"] < 50
    assert found["granted"] < BYTES_A_PIXEL * side**2 / 2**20 + 60
    outcome(
        "A decompression bomb is refused, or read in bounded memory",
        f"{len(found['told'])} to refuse, {n} of {side**2 / 1e6:.0f} million pixels",
        f"refused in {found['refused']:.0f} MB; read by four threads in "
        f"{found['granted']:.0f} MB",
    )


BOMB_REASONS = (
    "its header claims ",
    "DecompressionBombError",
    "Decompressed data too large",
    "is a compressed FITS file",
)
