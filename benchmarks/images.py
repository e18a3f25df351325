"""Images a second from JPEG files to features.

Peer: a careful loop as people write it with torchvision (eval, inference_mode,
batches of 32, float32, torchvision's own transforms on PIL images), or the same
behind a DataLoader with two workers, whichever is faster here. Limit: the fused
bf16 network alone, on ready tensors.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks._common import (
    DATA,
    Figure,
    image_set,
    in_turns,
    median_ratio,
    mobilenet,
    run_alone,
    speedup,
    weight_file,
)

BATCH = 32
TRIED_ROWS = 96
REPEATS = 3
# Large files as a phone makes them.
LARGE = (4000, 3000)
N_LARGE = 24


def main(quick: bool = False, data: Path = DATA) -> list[Figure]:
    small = image_set(data, "imagenette")["train"][0]
    small += image_set(data, "caltech25")["test"][0]
    n_rows = {"mobilenet_v2": 512, "resnet18": 512, "resnet50": 256}
    figures = []
    for name, n in n_rows.items():
        paths = small[:: len(small) // n][: 40 if quick else n]
        figures += _small_files(name, paths, data, 1 if quick else REPEATS)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_large(small, Path(folder), 4 if quick else N_LARGE)
        figures += _large_files(paths, data, 1 if quick else REPEATS)
    return figures


def _small_files(name: str, paths: list[str], data: Path, repeats: int):
    """Against the peer, and as a share of the bare network."""
    featurizer = _featurizer(name, data).fit(paths)
    peer_name, peer = faster_peer(*peer_network(name, data), paths)
    functions = {
        "ours": partial(featurizer.transform, paths),
        peer_name: partial(peer, paths),
        "bare": bare_network(featurizer, len(paths)),
    }
    seconds = in_turns(functions, repeats)
    cosine = mean_cosine(featurizer.transform(paths), peer(paths))
    bare = len(paths) / np.median(seconds["bare"])
    what = f"{name}, 224 px, {len(paths)} small JPEGs"
    return [
        speedup(what, seconds, peer_name, len(paths), "images", at_least=3, aim=5),
        Figure(
            f"{name}: share of the bare fused {featurizer.precision_} network",
            "",
            f"{bare:.1f} images/s",
            median_ratio(seconds["bare"], seconds["ours"]),
            at_least=0.75,
            aim=0.9,
        ),
        _agreement(name, cosine),
    ]


def _large_files(paths: list[str], data: Path, repeats: int) -> list[Figure]:
    """Against both peers; the bounds are for the faster one."""
    featurizer = _featurizer("mobilenet_v2", data).fit(paths)
    net, transform = peer_network("mobilenet_v2", data)
    peers = {
        "plain loop": plain_loop(net, transform),
        # Few files: with batches of 32 one worker would decode them all.
        "DataLoader, 2 workers": loader_loop(net, transform, batch_size=4),
    }
    functions = {name: partial(peer, paths) for name, peer in peers.items()}
    functions["ours"] = partial(featurizer.transform, paths)
    seconds = in_turns(functions, repeats)
    faster = min(peers, key=lambda name: np.median(seconds[name]))
    what = f"mobilenet_v2, {len(paths)} JPEGs of 12 megapixels"
    return [
        speedup(
            what,
            seconds,
            name,
            len(paths),
            "images",
            **({"at_least": 5, "aim": 8} if name == faster else {}),
        )
        for name in peers
    ]


def _agreement(name: str, cosine: float) -> Figure:
    return Figure(
        f"{name}: mean cosine of our features and the peer's",
        "",
        "",
        cosine,
        at_least=0.99,
    )


def mean_cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Mean cosine of the rows of two tables of features, (n, d) each."""
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return float(((ours * theirs).sum(1) / lengths).mean())


def _featurizer(name: str, data: Path):
    from sklearn_transfer import ImageFeaturizer

    backbone = mobilenet(data) if name == "mobilenet_v2" else f"{name}@random"
    # image_size=None: the recipe of the weights, which is the peer's too.
    return ImageFeaturizer(backbone, cache=None)


# --- the peer ----------------------------------------------------------------


def peer_network(name: str, data: Path):
    """torchvision's network without its head, with the same weights as ours, and
    the transforms that torchvision publishes with it."""
    import torch
    from safetensors.torch import load_file
    from torchvision import models

    from sklearn_transfer.backbones.weights import seeded

    with seeded():  # the numbers that "@random" stands for
        net = models.get_model(name, weights=None)
    if name == "mobilenet_v2":
        net.load_state_dict(load_file(weight_file(data, "mobilenet_v2_imagenet")))
        net.classifier = torch.nn.Identity()
    else:
        net.fc = torch.nn.Identity()
    weights = models.get_model_weights(name).__members__["IMAGENET1K_V1"]
    return net.eval(), weights.transforms()


def plain_loop(net, transform) -> Callable[[list[str]], np.ndarray]:
    """Open, transform, stack, run: thirty-two at a time."""
    import torch
    from PIL import Image

    def encode(paths):
        features = []
        with torch.inference_mode():
            for start in range(0, len(paths), BATCH):
                images = [
                    Image.open(path).convert("RGB")
                    for path in paths[start : start + BATCH]
                ]
                batch = torch.stack([transform(image) for image in images])
                features.append(net(batch).numpy())
        return np.concatenate(features)

    return encode


def loader_loop(
    net, transform, batch_size: int = BATCH
) -> Callable[[list[str]], np.ndarray]:
    """The same with a DataLoader whose two workers decode."""
    import torch
    from torch.utils.data import DataLoader

    def encode(paths):
        files = _Files(paths, transform)
        loader = DataLoader(files, batch_size=batch_size, num_workers=2)
        with torch.inference_mode():
            return np.concatenate([net(batch).numpy() for batch in loader])

    return encode


class _Files:
    """A map-style data set of decoded, transformed files."""

    def __init__(self, paths, transform):
        self.paths, self.transform = paths, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        from PIL import Image

        return self.transform(Image.open(self.paths[i]).convert("RGB"))


def faster_peer(net, transform, paths):
    """The faster of the two loops on some of the rows, and its name."""
    some = paths[:TRIED_ROWS]
    loops = {
        "plain loop": plain_loop(net, transform),
        "DataLoader, 2 workers": loader_loop(net, transform),
    }
    seconds = {}
    for name, loop in loops.items():
        loop(some[:BATCH])
        start = time.perf_counter()
        loop(some)
        seconds[name] = time.perf_counter() - start
    name = min(seconds, key=seconds.__getitem__)
    return name, loops[name]


# --- the limit ---------------------------------------------------------------


def bare_network(featurizer, n_rows: int) -> Callable[[], None]:
    """The network alone on ready tensors, in the batches of the featurizer."""
    import torch

    from sklearn_transfer.running.device import (
        inference_mode,
        resolve_device,
        runner_for,
    )

    backbone = featurizer._load_backbone()
    device = resolve_device("auto")
    runner = runner_for(backbone, device, featurizer.precision_)
    size = runner.batch_size()
    shape = (size, 3, *backbone.recipe.crop)
    ready = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ready = ready.to(device, runner.dtype, memory_format=torch.channels_last)

    def run() -> None:
        with inference_mode(featurizer.precision_, device):
            for start in range(0, n_rows, size):
                runner.net(ready[: n_rows - start]).float().cpu()

    return run


# --- large files -------------------------------------------------------------


def write_large(sources: list[str], folder: Path, n: int) -> list[str]:
    """JPEG files of 12 megapixels: shared photographs enlarged, with sensor noise."""
    from PIL import Image

    width, height = LARGE
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 6, (height, width, 1)).astype(np.int16)
    paths = []
    for i, source in enumerate(sources[:: len(sources) // n][:n]):
        with Image.open(source) as image:
            large = image.convert("RGB").resize(LARGE, Image.Resampling.BICUBIC)
        grain = np.roll(noise, i * 101, axis=(0, 1))
        pixels = np.clip(np.asarray(large, np.int16) + grain, 0, 255)
        path = folder / f"{i:02}.jpg"
        Image.fromarray(pixels.astype(np.uint8)).save(path, quality=90)
        paths.append(str(path))
    return paths


if __name__ == "__main__":
    run_alone(main, __doc__)
