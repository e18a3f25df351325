"""A grid search over fine-tuned networks: is a frozen layer computed once?

GridSearchCV, 3 folds, from JPEG files and texts. Peer: the same grid in plain skorch
(its Freezer, float32, torchvision's network and transforms, or transformers and
tokenized inside each fold), as many epochs, every row decoded again in every epoch.

An untrained network tells speed alone: its accuracies are printed, not held
against anything. Where weights exist, accuracies at the same epochs are compared.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks._common import (
    DATA,
    Figure,
    Part,
    Timed,
    image_set,
    mobilenet,
    not_below,
    rows_of,
    run_alone,
    run_parts,
    spread,
    text_set,
)

FOLDS = 3
BATCH = 32
IMAGE_SIZE = 160
IMAGE_EPOCHS = 4
DEPTHS = ["layer2", "layer3", "all"]
# Of the untrained network, on both sides.
LR = 1e-3
# No larger ones: with the fixed statistics of untrained norms those end in an error.
RATES = {"lr": [1e-5, 3e-5, 1e-4, 3e-4], "weight_decay": [0.0, 1e-3, 1e-2]}
MOBILENET_DEPTHS = ["features.13", "features.16"]
TEXT_EPOCHS = 3
TEXT_ROWS = 2000
TEXT_DEPTHS = ["layer.2", "layer.4", "all"]
# The rate of both sides, for the peer the best of 1e-4, 3e-4 and 1e-3 on 400 texts.
TEXT_LR = 3e-4
# The peer's only rate, for head and body; ours keeps its defaults. The best of 1e-4,
# 3e-4, 1e-3 and 3e-3 on 250 pictures.
PEER_IMAGE_LR = 1e-3


def main(quick: bool = False, data: Path = DATA) -> list[Figure]:
    return run_parts(PARTS, quick, data)


# --- the grids ---------------------------------------------------------------


def depths(quick: bool, data: Path) -> list[Figure]:
    """A grid over freezing depths, and the same with nothing frozen as well."""
    from benchmarks._training_peers import FREEZER, RESNET18, frozen_patterns

    rows = _pictures(quick, data)
    ours, peer = _untrained(quick, lr=LR)
    _warm(ours, peer, rows)

    def of_peer(grid) -> Found:
        patterns = [frozen_patterns(RESNET18, depth) for depth in grid]
        return _search(peer, {FREEZER: patterns}, rows.X, rows.numbers)

    frozen = of_peer(DEPTHS)
    ours_frozen = _search_ours(ours, {"freeze_depth": DEPTHS}, rows)
    # The peer's candidates share nothing, so that its longer grid costs its shorter
    # one and the candidate that is new; ours is run anew from an empty store.
    unfrozen = of_peer([0])
    ours_all = _search_ours(ours, {"freeze_depth": [0, *DEPTHS]}, rows)
    together = Found(
        frozen.seconds + unfrozen.seconds,
        max(frozen.accuracy, unfrozen.accuracy),
        frozen.n_candidates + unfrozen.n_candidates,
    )
    what = f"resnet18@random, {_task(rows, _image_epochs(quick))}, freeze_depth"
    return [
        _faster(f"{what} {DEPTHS}", ours_frozen, frozen, at_least=4, aim=8),
        _faster(f"{what} {[0, *DEPTHS]}", ours_all, together, at_least=2.5, aim=4),
    ]


def rates(quick: bool, data: Path) -> list[Figure]:
    """A grid over learning rate and weight decay of the last stage."""
    from benchmarks._training_peers import FREEZER, RESNET18, frozen_patterns

    rows = _pictures(quick, data)
    ours, peer = _untrained(quick, freeze_depth=-1)
    peer.set_params(**{FREEZER: frozen_patterns(RESNET18, -1)})
    _warm(ours, peer, rows)
    decays = RATES["weight_decay"][: 1 if quick else None]
    theirs = _search(
        peer, {"lr": [LR], "optimizer__weight_decay": decays}, rows.X, rows.numbers
    )
    found = _search_ours(ours, RATES, rows)
    what = f"resnet18@random, {_task(rows, _image_epochs(quick))}, freeze_depth=-1"
    return [
        _faster(
            f"{what}, {found.n_candidates} candidates of lr x weight_decay",
            found,
            theirs,
            at_least=6,
            aim=12,
        )
    ]


def pretrained(quick: bool, data: Path) -> list[Figure]:
    """Accuracy where it means something: ImageNet weights, late stages trained."""
    from benchmarks import _training_peers as peers
    from sklearn_transfer import ImageClassifier

    rows = _pictures(quick, data)
    common = {"max_epochs": _image_epochs(quick), "batch_size": BATCH}
    size = _image_size(quick)
    ours = ImageClassifier(
        mobilenet(data),
        image_size=size,
        early_stopping=False,
        random_state=0,
        **common,
    )
    network = partial(peers.mobilenet_v2, data, rows.n_classes)
    peer = peers.skorch_images(network, size, lr=PEER_IMAGE_LR, **common)
    _warm(ours, peer, rows)
    stages = peers.MOBILENET_V2
    patterns = [peers.frozen_patterns(stages, depth) for depth in MOBILENET_DEPTHS]
    theirs = _search(peer, {peers.FREEZER: patterns}, rows.X, rows.numbers)
    found = _search_ours(ours, {"freeze_depth": MOBILENET_DEPTHS}, rows)
    what = f"mobilenet_v2, {_task(rows, common['max_epochs'])}, {MOBILENET_DEPTHS}"
    return [
        _faster(what, found, theirs),
        not_below(
            f"{what}: accuracy", found.accuracy, theirs.accuracy, len(rows.labels)
        ),
    ]


def texts(quick: bool, data: Path) -> list[Figure]:
    """A grid over the upper half of all-MiniLM-L6-v2."""
    from benchmarks import _training_peers as peers
    from sklearn_transfer import TextClassifier

    rows = _rows(*text_set(data, "sst2", 60 if quick else TEXT_ROWS)["train"])
    common = {"max_epochs": 1 if quick else TEXT_EPOCHS, "batch_size": BATCH}
    ours = TextClassifier(lr=TEXT_LR, early_stopping=False, random_state=0, **common)
    peer = peers.skorch_texts(rows.n_classes, lr=TEXT_LR, **common)
    _warm(ours, peer, rows)
    patterns = [peers.frozen_patterns(peers.MINILM, depth) for depth in TEXT_DEPTHS]
    theirs = _search(peer, {f"net__{peers.FREEZER}": patterns}, rows.X, rows.numbers)
    found = _search_ours(ours, {"freeze_depth": TEXT_DEPTHS}, rows)
    what = f"all-MiniLM-L6-v2, {_task(rows, common['max_epochs'])}, {TEXT_DEPTHS}"
    return [
        _faster(what, found, theirs, at_least=4, aim=8),
        not_below(
            f"{what}: accuracy", found.accuracy, theirs.accuracy, len(rows.labels)
        ),
    ]


PARTS: dict[str, Part] = {
    "depths": depths,
    "rates": rates,
    "pretrained": pretrained,
    "texts": texts,
}


# --- rows --------------------------------------------------------------------


class Rows(NamedTuple):
    """Samples with their labels, and the labels as the peer needs them."""

    X: np.ndarray  # paths or texts, (n,), object: skorch reads a list as many inputs
    labels: np.ndarray
    numbers: np.ndarray  # 0 .. n_classes - 1
    n_classes: int


def _rows(X, y) -> Rows:
    labels = np.array(y)
    classes, numbers = np.unique(labels, return_inverse=True)
    return Rows(np.array(X, object), labels, numbers, len(classes))


def _pictures(quick: bool, data: Path) -> Rows:
    return _rows(*image_set(data, "caltech25", 100 if quick else None)["train"])


def _image_size(quick: bool) -> int:
    return 64 if quick else IMAGE_SIZE


def _image_epochs(quick: bool) -> int:
    return 1 if quick else IMAGE_EPOCHS


def _untrained(quick: bool, **ours_only):
    """Ours and the peer's classifier on resnet18 with the same untrained weights."""
    from benchmarks._training_peers import resnet18, skorch_images
    from sklearn_transfer import ImageClassifier

    size = _image_size(quick)
    common = {"max_epochs": _image_epochs(quick), "batch_size": BATCH}
    ours = ImageClassifier(
        "resnet18@random",
        image_size=size,
        early_stopping=False,
        random_state=0,
        **common,
        **ours_only,
    )
    return ours, skorch_images(partial(resnet18, 25), size, lr=LR, **common)


# --- searches ----------------------------------------------------------------


class Found(NamedTuple):
    """A finished search: its wall time, and the best mean accuracy over the folds."""

    seconds: float
    accuracy: float
    n_candidates: int


def _search(estimator, grid: dict, X, y) -> Found:
    from sklearn.model_selection import GridSearchCV, StratifiedKFold

    from sklearn_transfer.backbones.weights import seeded

    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    search = GridSearchCV(estimator, grid, cv=folds, refit=False, error_score="raise")
    with seeded():  # skorch takes its numbers from the global state
        start = time.perf_counter()
        search.fit(X, y)
        seconds = time.perf_counter() - start
    scores = search.cv_results_["mean_test_score"]
    return Found(seconds, float(scores.max()), len(scores))


def _search_ours(estimator, grid: dict, rows: Rows) -> Found:
    """The search from an empty store, with no probe remembered."""
    from sklearn_transfer import clear_cache
    from sklearn_transfer.training.head import forget_probes

    clear_cache()
    forget_probes()
    return _search(estimator, grid, rows.X, rows.labels)


def _warm(ours, peer, rows: Rows) -> None:
    """Imports, files of weights and first calls of kernels, on both sides."""
    from sklearn.base import clone

    some = spread(len(rows.X), 2 * rows.n_classes)
    X = rows_of(rows.X, some)
    epochs = {"net__max_epochs" if hasattr(peer, "steps") else "max_epochs": 1}
    clone(ours).set_params(max_epochs=1).fit(X, rows.labels[some])
    clone(peer).set_params(**epochs).fit(X, rows.numbers[some])


def _task(rows: Rows, epochs: int) -> str:
    kind = "JPEGs" if str(rows.X[0]).endswith(".jpg") else "texts"
    return f"{len(rows.X)} {kind}, {FOLDS} folds, {epochs} epochs"


def _faster(what: str, ours: Found, peer: Found, **bounds: float) -> Figure:
    """How many times the peer's time ours is; a part of its candidates is scaled."""
    theirs = Timed(peer.seconds, peer.n_candidates, ours.n_candidates)
    return Figure(
        what,
        f"{ours.seconds:.0f} s, accuracy {ours.accuracy:.3f}",
        f"{theirs}, accuracy {peer.accuracy:.3f} (skorch)",
        theirs.whole / ours.seconds,
        "x",
        **bounds,
    )


if __name__ == "__main__":
    run_alone(main, __doc__, parts=PARTS)
