"""One full epoch, nothing frozen: what the training step itself costs.

Peers: Hugging Face's Trainer with its defaults in float32 (batches of 8, and of 32),
and a loop as torchvision's tutorials write it (DataLoader without workers and with
two, float32). They begin with a random head. Ours by default with a probe, whose time
and that of the features it needs count as ours; the same from a random head as well.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from benchmarks._common import (
    DATA,
    Figure,
    Part,
    image_set,
    in_turns,
    mobilenet,
    rows_of,
    run_alone,
    run_parts,
    speedup,
    text_set,
)

BATCH = 32
IMAGE_SIZE = 160
TEXT_ROWS = 2000
REPEATS = 2
BOUNDS = {"at_least": 2, "aim": 3}


def main(quick: bool = False, data: Path = DATA) -> list[Figure]:
    return run_parts(PARTS, quick, data)


def texts(quick: bool, data: Path) -> list[Figure]:
    """all-MiniLM-L6-v2 on sentences of films."""
    if find_spec("accelerate") is None:
        sys.exit("Trainer needs accelerate. Write pip install -e '.[bench]'.")
    from benchmarks._training_peers import trainer_epoch
    from sklearn_transfer import TextClassifier

    X, y = text_set(data, "sst2", 64 if quick else TEXT_ROWS)["train"]
    ours = TextClassifier(**_one_epoch())
    peers = {
        f"Trainer, batches of {size}": partial(trainer_epoch, X, y, batch_size=size)
        for size in (8, BATCH)
    }
    what = f"all-MiniLM-L6-v2, one epoch, {len(X)} texts"
    return _compare(what, ours, peers, (X, y), "texts", quick)


def images(quick: bool, data: Path) -> list[Figure]:
    """resnet18 and mobilenet_v2 on photographs."""
    from benchmarks import _training_peers as peers
    from sklearn_transfer import ImageClassifier

    X, y = image_set(data, "caltech25", 100 if quick else None)["train"]
    classes, numbers = np.unique(y, return_inverse=True)
    size = 64 if quick else IMAGE_SIZE
    networks = {
        "resnet18": ("resnet18@random", peers.resnet18),
        "mobilenet_v2": (mobilenet(data), partial(peers.mobilenet_v2, data)),
    }
    figures = []
    for name, (backbone, network) in networks.items():
        loops = {
            f"loop, {workers} workers": partial(
                peers.loop_epoch,
                partial(network, len(classes)),
                X,
                numbers,
                size=size,
                workers=workers,
            )
            for workers in (0, 2)
        }
        ours = ImageClassifier(backbone, image_size=size, **_one_epoch())
        what = f"{name} at {size} px, one epoch, {len(X)} JPEGs"
        figures += _compare(what, ours, loops, (X, y), "images", quick)
    return figures


PARTS: dict[str, Part] = {"texts": texts, "images": images}


def _one_epoch() -> dict:
    return {
        "freeze_depth": 0,
        "max_epochs": 1,
        "batch_size": BATCH,
        "early_stopping": False,
        "random_state": 0,
    }


def _compare(
    what: str,
    ours,
    peers: Mapping[str, Callable[[], None]],
    rows,
    kind: str,
    quick: bool,
) -> list[Figure]:
    """Against each peer, the bounds against the faster one; and without a probe."""
    functions = {
        "ours": fresh_fits(ours, *rows),
        "random head": fresh_fits(ours, *rows, head_init="random"),
        **peers,
    }
    seconds = in_turns(functions, 1 if quick else REPEATS)
    middle = {name: statistics.median(seconds[name]) for name in functions}
    faster = min(peers, key=middle.__getitem__)
    n = len(rows[0])
    return [
        *(
            speedup(what, seconds, name, n, kind, **BOUNDS if name == faster else {})
            for name in peers
        ),
        Figure(
            f"{what}: from a random head, as the peer",
            f"{middle['random head']:.1f} s",
            f"{middle[faster]:.1f} s ({faster})",
            middle[faster] / middle["random head"],
            "x",
            **BOUNDS,
        ),
    ]


def fresh_fits(estimator, X, y, **chosen) -> Callable[[], None]:
    """A fit from nothing: a probe is remembered, and would be there already."""
    from sklearn.base import clone

    from sklearn_transfer import clear_cache
    from sklearn_transfer.training.head import forget_probes

    rng = np.random.default_rng(0)

    def fit() -> None:
        clear_cache()
        forget_probes()
        order = rng.permutation(len(y))
        model = clone(estimator).set_params(**chosen)
        model.fit(rows_of(X, order), rows_of(y, order))

    return fit


if __name__ == "__main__":
    run_alone(main, __doc__, parts=PARTS)
