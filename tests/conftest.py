"""What every test gets: no network, a cache of its own, data where it lies."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# Before any Hugging Face import: a test that would download fails at once, with
# the error that users get.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before torch: on a busy machine two threads spend their time waiting for each
# other, and the networks here are too small to gain from a second one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
LOOPBACK = ("127.", "localhost", "::1")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and weights, which lies beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("the real data sets and weights are not beside the repository")
    return SHARED


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Connections leave this machine nowhere; local sockets carry callbacks."""
    connect = socket.socket.connect

    def guarded(self, address):
        is_local = self.family == socket.AF_UNIX or str(address[0]).startswith(LOOPBACK)
        if not is_local:
            raise OSError(f"tests reach no network, and {address} was asked for")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="module", autouse=True)
def no_idle_workers():
    """Ends joblib's workers with the module that asked for them.

    What they have loaded and how far they have grown is no affair of the next.
    """
    yield
    from joblib.externals.loky import reusable_executor

    if reusable_executor._executor is not None:
        reusable_executor._executor.shutdown(wait=True)


@pytest.fixture
def images() -> list[Image.Image]:
    """Twelve pictures, no two alike, in two shapes: stripes along either axis."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(12):
        height, width = (72, 90) if i % 2 else (90, 72)
        wave = np.sin(np.arange(width if i % 3 else height) / (2 + i)) * 100 + 128
        pixels = np.broadcast_to(wave if i % 3 else wave[:, None], (height, width))
        noise = rng.integers(0, 28, (height, width, 3))
        rgb = np.clip(pixels[..., None] + noise, 0, 255).astype(np.uint8)
        found.append(Image.fromarray(rgb))
    return found


@pytest.fixture
def image_files(images, tmp_path) -> list[str]:
    """The same pictures as PNG files."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    paths = [str(folder / f"{i:02}.png") for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        image.save(path)
    return paths
