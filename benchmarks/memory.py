"""Resident memory while many large JPEG files are featurized in one call.

Peer: none is run. Beside ours stands what the decoded input alone would take in the
usual float32 tensor, which several peers build of all rows at once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks._common import DATA, Figure, image_set, mobilenet, run_alone

N_FILES = 5000
N_PICTURES = 50
SIZE = (1600, 1200)
STEP = 500
MEGABYTE = 2**20


def main(quick: bool = False, data: Path = DATA) -> list[Figure]:
    from sklearn_transfer import ImageFeaturizer, clear_cache

    n, step = (600, 150) if quick else (N_FILES, STEP)
    featurizer = ImageFeaturizer(mobilenet(data))
    sources = image_set(data, "imagenette", N_PICTURES)["train"][0]
    clear_cache()
    with tempfile.TemporaryDirectory() as folder:
        paths = write_distinct(sources, Path(folder), n)
        featurizer.fit(paths)
        before = _resident()
        with _resident_by_row() as seen:
            features = featurizer.transform(paths)
    clear_cache()
    peaks = [
        max(bytes_ for row, bytes_ in seen if start < row <= start + step)
        for start in range(0, n, step)
    ]
    curve = ", ".join(f"{peak / MEGABYTE:.0f}" for peak in peaks)
    as_tensor = n * 3 * 224 * 224 * 4
    # The first step fills caches of compiled kernels; after it nothing may grow.
    growth = max(peaks[len(peaks) // 2 :]) - peaks[1]
    return [
        Figure(
            f"peak MB in each {step} of {n} JPEGs of {SIZE[0]} x {SIZE[1]}: {curve}; "
            "growth from the second to the last half",
            f"{growth / MEGABYTE:.0f} MB",
            f"output: {features.nbytes / MEGABYTE:.0f} MB",
            growth / MEGABYTE,
            "MB",
            at_most=features.nbytes / MEGABYTE,
        ),
        Figure(
            "peak above what was resident before",
            f"{(max(peaks) - before) / MEGABYTE:.0f} MB",
            f"{as_tensor / MEGABYTE:.0f} MB (all input as one tensor)",
            (max(peaks) - before) / MEGABYTE,
            "MB",
        ),
    ]


def write_distinct(sources: list[str], folder: Path, n: int) -> list[str]:
    """``n`` files with distinct bytes, of a few pictures.

    A number behind the end-of-image marker makes the digest another one and is
    read by no decoder; to encode every file anew would take minutes.
    """
    from io import BytesIO

    from PIL import Image

    pictures = []
    for source in sources:
        with Image.open(source) as image:
            large = image.convert("RGB").resize(SIZE, Image.Resampling.BICUBIC)
        buffer = BytesIO()
        large.save(buffer, "JPEG", quality=90)
        pictures.append(buffer.getvalue())
    paths = []
    for i in range(n):
        path = folder / f"{i:05}.jpg"
        path.write_bytes(pictures[i % len(pictures)] + i.to_bytes(4, "big"))
        paths.append(str(path))
    return paths


@contextmanager
def _resident_by_row() -> Iterator[list[tuple[int, int]]]:
    """Rows encoded so far and resident bytes, noted after every batch."""
    from sklearn_transfer.running.device import Runner

    taps, seen = Runner.taps, []

    def noting(self, batch, pooling, stages) -> np.ndarray:
        features = taps(self, batch, pooling, stages)
        done = seen[-1][0] if seen else 0
        seen.append((done + len(batch), _resident()))
        return features

    Runner.taps = noting
    try:
        yield seen
    finally:
        Runner.taps = taps


def _resident() -> int:
    import psutil

    return psutil.Process().memory_info().rss


if __name__ == "__main__":
    run_alone(main, __doc__)
