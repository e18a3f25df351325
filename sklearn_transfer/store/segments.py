"""Large payloads, in append-only files; each file has one writing process.

A payload counts once the index names its place, so a killed writer leaves only a
tail that nobody reads. Files are appended to with ``write``, never through a map:
on a full disk the one is an exception, the other a signal. Readers map them.
"""

from __future__ import annotations

import io
import mmap
import os
import re
import weakref
from contextlib import suppress
from pathlib import Path

import numpy as np

from sklearn_transfer.store.owners import NAME

# Payloads start at a multiple, so that maps of any dtype are aligned.
ALIGN = 64
SEGMENT = re.compile(rf"(?P<owner>{NAME.pattern})-[0-9]+\.rows")


class Segments:
    """The segment files of one store.

    Parameters
    ----------
    folder : Path
        Exists before the first payload is appended.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._file: io.FileIO | None = None
        self._name = ""
        self._count = 0
        # Maps live as long as a row that is looked at. One map a row would
        # exhaust the number of maps that the kernel grants a process.
        self._maps: weakref.WeakValueDictionary[str, mmap.mmap] = (
            weakref.WeakValueDictionary()
        )

    def append(self, payload: np.ndarray, owner: str, limit: int) -> tuple[str, int]:
        """Write one payload, of dtype uint8; the file's name and the offset in it.

        A file that would exceed ``limit`` bytes is closed and the next begun.
        """
        file, is_ours = self._file, self._name.startswith(f"{owner}-")
        if file is None or not is_ours or not self.exists(self._name):
            file = self._begin(owner)
        end = file.seek(0, os.SEEK_END)
        if end and end + payload.nbytes > limit:
            file, end = self._begin(owner), 0
        start = -(-end // ALIGN) * ALIGN
        view = memoryview(bytes(start - end))
        for part in (view, payload.data):
            while len(part):  # a write may take less than it was given
                part = part[file.write(part) :]
        return self._name, start

    def _begin(self, owner: str) -> io.FileIO:
        self.close()
        self._count += 1
        name = f"{owner}-{self._count}.rows"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        descriptor = os.open(self.folder / name, flags, 0o600)
        self._file, self._name = os.fdopen(descriptor, "r+b", buffering=0), name
        return self._file

    def exists(self, name: str) -> bool:
        """Whether a file is there; names are never used twice."""
        return (self.folder / name).exists()

    def view(self, name: str, start: int, nbytes: int) -> np.ndarray | None:
        """Part of a file, uint8 and read-only; None where there is no such part."""
        if not _sound(name, start, nbytes):
            return None
        stop = start + nbytes
        mapped = self._maps.get(name)
        if mapped is None or len(mapped) < stop:
            try:
                with open(self.folder / name, "rb") as file:
                    if os.fstat(file.fileno()).st_size < stop:
                        return None
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except FileNotFoundError:
                return None
            self._maps[name] = mapped
        return np.frombuffer(mapped, np.uint8, nbytes, start)

    def drop(self, name: str) -> None:
        """Remove a file; rows that are looked at stay readable."""
        self._maps.pop(name, None)
        if isinstance(name, str) and SEGMENT.fullmatch(name):
            with suppress(OSError):  # Windows refuses while somebody reads
                (self.folder / name).unlink(missing_ok=True)

    def names(self) -> list[tuple[str, str]]:
        """Every file's name and its owner's."""
        matches = (SEGMENT.fullmatch(name) for name in os.listdir(self.folder))
        return [(match[0], match["owner"]) for match in matches if match]

    def close(self) -> None:
        """Stop writing; in a forked child this leaves the parent's file alone."""
        file, self._file, self._name = self._file, None, ""
        if file is not None:
            with suppress(OSError):
                file.close()


def _sound(name: object, start: object, nbytes: object) -> bool:
    """Whether a place read from an index, which may be garbled, can be one."""
    if not (isinstance(name, str) and SEGMENT.fullmatch(name)):
        return False
    if not (isinstance(start, int) and isinstance(nbytes, int)):
        return False
    return start >= 0 and nbytes > 0
