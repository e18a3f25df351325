"""Image files: opened safely, digested by their bytes, read by Pillow in silence."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

# EPS would run Ghostscript on the file; the others are stubs without a decoder.
_UNREAD_FORMATS = frozenset({"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"})


_MAX_FILE_BYTES = 4 * 2**30


_YOUNG_SECONDS = 2.0


_MEMO_LIMIT = 2**18


class UnreadableRow(ValueError):
    """One sample cannot be read; the text is the reason, without the row's name."""


@contextmanager
def reasons() -> Iterator[None]:
    """Turn whatever reading a hostile file raises into UnreadableRow.

    Not MemoryError: with the pixel count bounded it tells of the machine, and a
    row must not become NaN because another process was hungry.
    """
    try:
        yield
    except (UnreadableRow, MemoryError):
        raise
    except Exception as error:
        text = str(error) or "no reason given"
        raise UnreadableRow(
            f"cannot be decoded ({type(error).__name__}: {text})"
        ) from error


def readable_suffixes() -> frozenset[str]:
    """Suffixes, such as ".jpg", of the files that Pillow decodes here."""
    from PIL import Image

    known = Image.registered_extensions().items()
    return frozenset(
        suffix
        for suffix, name in known
        if name in Image.OPEN and name not in _UNREAD_FORMATS
    )


def open_image(file: BinaryIO):
    """An image of Pillow, header read and size checked, pixels not decoded.

    Instead of ``Image.open``, which warns between one and two times
    MAX_IMAGE_PIXELS: ``warnings.catch_warnings`` is not safe in threads, and a
    filter set for good would change the user's own settings.
    """
    from PIL import Image

    prefix = file.read(16)
    if not prefix:
        raise UnreadableRow("is empty")
    notes, tried = [], set(_UNREAD_FORMATS)
    for register in (Image.preinit, Image.init):  # common formats, then all
        register()
        for name in [n for n in list(Image.OPEN) if n not in tried]:
            tried.add(name)
            factory, accept = Image.OPEN[name]
            try:
                accepted = accept(prefix) if accept else True
                if isinstance(accepted, str):
                    notes.append(accepted)  # for example, built without WebP
                if not accepted or isinstance(accepted, str):
                    continue
                file.seek(0)
                image = (_quiet_jpeg() if name == "JPEG" else factory)(file, "")
            except (SyntaxError, IndexError, TypeError, struct.error):
                continue  # not of this format after all, as Image.open has it
            _check_pixel_count(*image.size)
            _check_decoder(image)
            return image
    start = f"it begins with {prefix!r}"
    raise UnreadableRow(f"not an image that Pillow reads; {'; '.join([*notes, start])}")


@functools.cache
def _quiet_jpeg() -> type:
    """Pillow's JPEG reader, without the parts that warn of damaged metadata.

    Those are its look for further pictures (MPO), of which only the first counts,
    and its reading of EXIF for a resolution in dots per inch.
    """
    from PIL.Image import Exif
    from PIL.JpegImagePlugin import JpegImageFile

    class QuietJpeg(JpegImageFile):
        def getexif(self):
            return Exif()

    return QuietJpeg


def _check_pixel_count(width: int, height: int) -> None:
    from PIL import Image

    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > 2 * limit:
        raise UnreadableRow(
            f"its header claims {height} x {width} pixels, over Pillow's limit of "
            f"{2 * limit}. If you trust the file, raise the limit: "
            f"PIL.Image.MAX_IMAGE_PIXELS = {width * height}"
        )


def _check_decoder(image) -> None:
    """Refuse what Pillow decodes pixel by pixel in python, whatever the file holds.

    A file of 6 kB would keep every thread waiting for a minute.
    """
    if any(tile[0] == "fits_gzip" for tile in getattr(image, "tile", ())):
        raise UnreadableRow(
            "is a compressed FITS file, which is not read; uncompress it, for example "
            "with funpack"
        )


@contextmanager
def regular_file(path) -> Iterator[BinaryIO]:
    _stat_regular(path)
    # Non-blocking and looked at again, should a pipe have taken the file's place.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise UnreadableRow(_why_not_opened(path, error)) from error
    with os.fdopen(descriptor, "rb") as file:
        _stat_regular(descriptor)
        yield file


def read_regular(path) -> bytes:
    with regular_file(path) as file:
        return file.read(os.fstat(file.fileno()).st_size)


def _stat_regular(path) -> os.stat_result:
    """Stat of a regular, non-empty file; anything else is refused at once."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise UnreadableRow(_why_not_opened(path, error)) from error
    except ValueError as error:  # NUL, or surrogates that no file name can hold
        text = "holds a character that no path can hold"
        raise UnreadableRow(f"the path {text} ({error})") from error
    if stat.S_ISDIR(found.st_mode):
        raise UnreadableRow(
            "is a folder; load_image_folder(path) lists the images in one"
        )
    if not stat.S_ISREG(found.st_mode):
        # Opening a pipe or a device could wait, or never end.
        raise UnreadableRow("is not a regular file but a pipe, device or socket")
    if found.st_size == 0:
        raise UnreadableRow("is an empty file")
    if found.st_size > _MAX_FILE_BYTES:
        raise UnreadableRow(
            f"has {found.st_size} bytes, and more than {_MAX_FILE_BYTES} are not read"
        )
    return found


def _why_not_opened(path, error: OSError) -> str:
    text = os.fsdecode(path)
    # "https:/" too: pathlib has joined the slashes. Two letters: C:/ is a drive.
    if re.match(r"(?i)[a-z][a-z0-9+.-]+:/", text):
        return "is a URL, and nothing is fetched: download it and give the path"
    if isinstance(error, FileNotFoundError):
        inside = "" if os.path.isabs(text) else f" in {os.getcwd()!r}"
        return f"no such file{inside}"
    return f"cannot be opened ({error.strerror or error})"


# (device, inode, size, mtime_ns) -> sha256. No lock: each operation on the dict is
# atomic, and a lock might be held by another thread when the process forks.
_known_digests: dict[tuple[int, int, int, int], bytes] = {}


def sha256_of_path(path) -> bytes:
    """Sha256 of the file's bytes, remembered unless the file is young.

    A file younger than 2 s may be written again within the same tick of its
    time stamp, so its stamp says nothing yet.
    """
    identity = _identity(_stat_regular(path))
    if identity in _known_digests:
        return _known_digests[identity]
    started = time.time()
    with reasons(), regular_file(path) as file:
        before = os.fstat(file.fileno())
        data = hashlib.sha256()
        while chunk := file.read(2**20):
            data.update(chunk)
        after = os.fstat(file.fileno())
    is_young = started - before.st_mtime < _YOUNG_SECONDS
    if not is_young and _identity(before) == _identity(after):
        if len(_known_digests) >= _MEMO_LIMIT:
            _known_digests.clear()
        _known_digests[_identity(after)] = data.digest()
    return data.digest()


def _identity(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
