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
    Score,
    image_set,
    in_turns,
    mobilenet,
    not_below,
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

    parts = text_set(data, "sst2", 64 if quick else TEXT_ROWS)
    X, y = parts["train"]
    ours = TextClassifier(**_one_epoch())
    peers = {
        f"Trainer, batches of {size}": partial(trainer_epoch, X, y, batch_size=size)
        for size in (8, BATCH)
    }
    what = f"all-MiniLM-L6-v2, one epoch, {len(X)} texts"
    return _compare(what, ours, peers, parts, parts["test"], "texts", quick)


def images(quick: bool, data: Path) -> list[Figure]:
    """resnet18 and mobilenet_v2 on photographs."""
    from benchmarks import _training_peers as peers
    from sklearn_transfer import ImageClassifier

    parts = image_set(data, "caltech25", 100 if quick else None)
    X, y = parts["train"]
    classes, numbers = np.unique(y, return_inverse=True)
    X_test, y_test = parts["test"]
    # What the peer is scored on: its labels are numbers.
    numbered = X_test, np.searchsorted(classes, y_test)
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
        tested = None if backbone.endswith("@random") else numbered
        figures += _compare(what, ours, loops, parts, tested, "images", quick)
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
    peers: Mapping[str, Callable[[], Score]],
    parts,
    tested,
    kind: str,
    quick: bool,
) -> list[Figure]:
    """Against each peer, the bounds against the faster one; and without a probe.

    ``tested`` are rows with labels for the peers, where accuracy means something.
    """
    rows, scores = parts["train"], {}

    def keeping(name: str, function: Callable[[], Score]) -> Callable[[], None]:
        def run() -> None:
            scores[name] = function()

        return run

    functions = {
        "ours": fresh_fits(ours, *rows),
        "random head": fresh_fits(ours, *rows, head_init="random"),
        **peers,
    }
    functions = {name: keeping(name, run) for name, run in functions.items()}
    seconds = in_turns(functions, 1 if quick else REPEATS)
    middle = {name: statistics.median(seconds[name]) for name in functions}
    faster = min(peers, key=middle.__getitem__)
    n = len(rows[0])
    accuracy = []
    if tested is not None:
        best = max(scores[name](*tested) for name in peers)
        found = scores["ours"](*parts["test"])
        accuracy = [not_below(f"{what}: accuracy", found, best, len(tested[1]))]
    return [
        *accuracy,
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


def fresh_fits(estimator, X, y, **chosen) -> Callable[[], Score]:
    """A fit from nothing: a probe is remembered, and would be there already."""
    from sklearn.base import clone

    from sklearn_transfer import clear_cache
    from sklearn_transfer.training.head import forget_probes

    rng = np.random.default_rng(0)

    def fit() -> Score:
        clear_cache()
        forget_probes()
        order = rng.permutation(len(y))
        model = clone(estimator).set_params(**chosen)
        return model.fit(rows_of(X, order), rows_of(y, order)).score

    return fit


if __name__ == "__main__":
    run_alone(main, __doc__, parts=PARTS)
