"""A column of paths that lead nowhere good ends in an error within a second each."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sklearn_transfer import ImageClassifier, ImageFeaturizer
from sklearn_transfer.exceptions import UnreadableRowsError
from tests.stress.workers import Child

SECONDS = 1.0
PROMISE = (
    "A path that is no readable file ends within a second in an error that names row "
    "and path; nothing is fetched"
)
FIXED = {
    "/dev/zero": "pipe, device or socket",
    "/dev/random": "pipe, device or socket",
    "/dev/full": "pipe, device or socket",
    "/dev/tty": "pipe, device or socket|cannot be opened|no such file",
    "/dev/ptmx": "pipe, device or socket|no such file",
    "/proc/self/mem": "empty file",
    "/proc/self/maps": "empty file",
    "/proc/self/fd": "is a folder",
    "/proc/kmsg": "empty file|no such file|cannot be opened",
    "/proc/kcore": "are not read|no such file|cannot be opened|empty file",
    "/sys/kernel/uevent_seqnum": "not an image|no such file|empty file",
    "/": "is a folder",
    ".": "is a folder",
    "": "no such file|is a folder",  # Path("") is "."
    "none.png": "no such file in",
    "~/none.png": "no such file in",
    "a\0b.png": "no path can hold",
    "a\ud800b.png": "no path can hold",
    "x" * 300 + ".png": "cannot be opened",
    "x/" * 3000: "cannot be opened|no such file",
    "https://example.org/a.png": "is a URL.*download it and give the path",
    "http://localhost:1/a.png": "is a URL.*download it and give the path",
    "ftp://example.org/a.png": "is a URL.*download it and give the path",
    "s3://bucket/a.png": "is a URL.*download it and give the path",
    "gs://bucket/a.png": "is a URL.*download it and give the path",
    "file:///etc/hostname": "is a URL.*download it and give the path",
    "data:image/png;base64,iVBORw0KGgo=": "no such file",
}


@contextlib.contextmanager
def traps(folder: Path):
    """Paths in ``folder`` that must be refused, with words of the reason."""
    (folder / "folder.png").mkdir()
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "there").symlink_to(folder / "back")
    (folder / "back").symlink_to(folder / "there")
    (folder / "dangling.png").symlink_to(folder / "nothing")
    (folder / "to-zero.png").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.png")
    (folder / "to-pipe.png").symlink_to(folder / "pipe.png")
    (folder / "empty.png").touch()
    (folder / "web-page.jpg").write_text("<!DOCTYPE html><html>not found</html>")
    (folder / "line\nbreak.png").write_text("no picture")
    (folder / "file").write_text("no folder")
    with open(folder / "sparse.png", "wb") as sparse:
        sparse.truncate(5 * 2**30)
    with open(folder / "zeros.png", "wb") as zeros:
        zeros.truncate(2**24)
    deep = folder
    for _ in range(40):
        deep = deep / "d"
    deep.mkdir(parents=True)
    (folder / "long-chain").symlink_to(folder / "chain0")
    for i in range(60):
        (folder / f"chain{i}").symlink_to(folder / f"chain{i + 1}")
    with socket.socket(socket.AF_UNIX) as listening, _somewhere(folder):
        listening.bind("socket.png")
        listening.listen()
        yield {
            "folder.png": r"load_image_folder\(path\)",
            "loop": "symbolic links",
            "there": "symbolic links",
            "long-chain": "symbolic links",
            "dangling.png": "no such file",
            "to-zero.png": "pipe, device or socket",
            "pipe.png": "pipe, device or socket",
            "to-pipe.png": "pipe, device or socket",
            "socket.png": "pipe, device or socket",
            "empty.png": "empty file",
            "web-page.jpg": "begins with b'<!DOCTYPE html><'",
            "line\nbreak.png": "begins with b'no picture'",
            "file/below.png": "cannot be opened",
            "sparse.png": "are not read",
            "zeros.png": "not an image",
            "d/" * 40: "is a folder",
        }


@contextlib.contextmanager
def _somewhere(folder: Path):
    """In that folder: the name of a socket has to be short."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def loaded(folder: str) -> tuple[ImageFeaturizer, Path]:
    """A featurizer that has read a picture, and that picture."""
    good = Path(folder, "good.png")
    Image.new("RGB", (8, 8)).save(good)
    reader = ImageFeaturizer("embedded@random", image_size=16, cache=None)
    reader.fit_transform([good])
    return reader, good


def told_of(model, X, y=None) -> tuple[str, dict[int, str], float]:
    """The error, its rows, and the seconds until it came."""
    started = time.perf_counter()
    try:
        model.transform(X) if y is None else model.fit(X, y)
    except UnreadableRowsError as error:
        return str(error), error.rows, time.perf_counter() - started
    return "", {}, time.perf_counter() - started


def open_each(folder: str, form: str) -> list:
    """What is said of each path; runs in a child."""
    reader, good = loaded(folder)
    found = []
    with traps(Path(folder)) as made:
        expected = FIXED | {f"{folder}/{name}": words for name, words in made.items()}
        for path, words in expected.items():
            given = Path(path) if form == "Path" else path
            said = told_of(reader, [good, given, good])
            found.append((path, words, os.fsdecode(given), *said))
    return found


def test_each_path_ends_in_an_error_within_a_second(amount, outcome, tmp_path):
    forms, slowest, n = ["str", "Path"] * amount(10), 0.0, 0
    for i, form in enumerate(forms):
        folder = tmp_path / str(i)
        folder.mkdir()
        # What hangs is ended with the child, and is a failure.
        found, warned = Child(open_each, str(folder), form).result()
        assert not warned
        for path, words, given, said, rows, seconds in found:
            assert list(rows) == [1], (path, said)
            assert f"row 1 ({given!r})" in said, (path, said)
            assert re.search(words, rows[1]), (path, words, rows[1])
            slowest = max(slowest, seconds)
        n += len(found)
    assert slowest < SECONDS
    outcome(PROMISE, n, f"each named with its row; the slowest took {slowest:.2f} s")


# --- files of others ---------------------------------------------------------------


def open_as_nobody(folder: str) -> list:
    """What is said of files that this user may not read; runs in a child."""
    reader, good = loaded(folder)
    shut, locked = Path(folder, "shut.png"), Path(folder, "locked")
    locked.mkdir()
    for path in (shut, locked / "inside.png"):
        path.write_bytes(good.read_bytes())
        path.chmod(0o000)
    locked.chmod(0o000)
    is_root = os.geteuid() == 0  # who may read everything
    if is_root:
        os.seteuid(65534)
    try:
        return [told_of(reader, [good, p]) for p in (shut, locked / "inside.png")]
    finally:
        if is_root:
            os.seteuid(0)
        locked.chmod(0o700)


def test_files_that_may_not_be_read_are_named(outcome):
    with tempfile.TemporaryDirectory() as folder:  # tmp_path is shut to others
        os.chmod(folder, 0o755)
        found, _ = Child(open_as_nobody, folder).result()
    for said, rows, seconds in found:
        assert rows == {1: "cannot be opened (Permission denied)"}, said
        assert seconds < SECONDS
    outcome(PROMISE, len(found), "files and folders that may not be read are named")


# --- URLs --------------------------------------------------------------------------

URLS = [
    "https://example.org/a.png",
    "HTTP://localhost:1/a.png",
    "ftp://example.org/a.png",
    "s3://bucket/a.png",
    "hf://datasets/a/b.png",
]


@pytest.mark.parametrize("estimator", [ImageFeaturizer, ImageClassifier])
def test_urls_are_not_fetched(estimator, monkeypatch, outcome):
    def asked_for(*arguments, **given):
        raise AssertionError(f"the network was asked for {arguments}")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, asked_for)
    model = estimator("embedded@random", image_size=16, cache=None)
    for url in URLS:
        X = [np.zeros((8, 8), np.uint8), url, np.ones((8, 8), np.uint8)]
        with pytest.raises(UnreadableRowsError) as caught:
            if estimator is ImageFeaturizer:
                model.fit_transform(X)
            else:
                model.fit(X, [0, 1, 1])
        assert f"row 1 ({url!r}): is a URL" in str(caught.value)
        assert "download it and give the path" in str(caught.value)
    outcome(PROMISE, len(URLS), f"{estimator.__name__} says so, and asks no network")


# --- fitting -----------------------------------------------------------------------


def fit_on_traps(folder: str) -> list:
    """What ImageClassifier.fit says of a column of them; runs in a child."""
    _, good = loaded(folder)
    model = ImageClassifier("embedded@random", image_size=16, cache=None)
    with traps(Path(folder)) as made:
        X = [good, good, *(f"{folder}/{name}" for name in made), *FIXED]
        return told_of(model, X, np.arange(len(X)) % 2)


def test_a_fit_names_all_of_them_at_once(outcome, tmp_path):
    (said, rows, seconds), _ = Child(fit_on_traps, str(tmp_path)).result()
    # Of those that can be read, and are no pictures, only the decoder knows.
    unread = {row for row, why in rows.items() if "not an image" not in why}
    assert len(rows) == len(unread) > 35 and min(rows) == 2
    assert "row 2 (" in said and "and rows " in said
    assert "Featurizer" not in said
    assert seconds < SECONDS * len(rows)
    outcome(
        PROMISE, len(rows), "a fit names all that cannot be opened before it starts"
    )
