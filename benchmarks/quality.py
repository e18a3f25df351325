"""Are the features right? Peers: published and earlier figures, untrained networks.

STS benchmark with all-MiniLM-L6-v2 against the published Spearman correlation;
linear probes on ImageNet features; the embedded network against itself untrained
and against plain pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks._common import (
    DATA,
    Figure,
    image_set,
    mobilenet,
    run_alone,
    spread,
)

PUBLISHED_STS = 0.8203
IMAGENET_PROBES = {"hymenoptera": 0.93, "imagenette": 0.945, "caltech25": 0.96}
# Embedded, embedded@random, pixels: what training the embedded network gave.
EMBEDDED_PROBES = {
    "cifar10": (0.646, 0.389, 0.339),
    "hymenoptera": (0.821, 0.690, 0.586),
    "imagenette": (0.812, 0.428, 0.346),
    "caltech25": (0.870, 0.366, 0.310),
}
TOLERANCE = 0.03
PIXELS = 32  # side of the pictures whose pixels are the baseline
# Inverse strengths of the probes, small because features outnumber rows.
FEATURES_C = 0.01
PIXELS_C = 1e-4
FEW = 5  # rows a class of digits
DRAWS = 10


def main(quick: bool = False, data: Path = DATA) -> list[Figure]:
    most = 60 if quick else None
    figures = [_sts(data, most)]
    for name, bound in IMAGENET_PROBES.items():
        parts = image_set(data, name, most)
        accuracy = probe(_featurize(mobilenet(data), 224), parts, FEATURES_C)
        figures.append(
            Figure(
                f"linear probe, mobilenet_v2 at 224 px, {name}",
                f"{accuracy:.3f}",
                "",
                accuracy,
                at_least=bound,
            )
        )
    for name, known in EMBEDDED_PROBES.items():
        figures += _embedded(name, read_set(data, name, most), known)
    return [*figures, _digits()]


def _sts(data: Path, most: int | None) -> Figure:
    """Spearman correlation of cosines and human scores, test part."""
    import pandas as pd
    from scipy.stats import spearmanr

    from sklearn_transfer import TextFeaturizer

    pairs = pd.read_csv(data / "text" / "stsb.csv").query("split == 'test'")[:most]
    featurizer = TextFeaturizer().fit(pairs["sentence1"])
    first = featurizer.transform(pairs["sentence1"])
    second = featurizer.transform(pairs["sentence2"])
    cosines = (first * second).sum(1)  # both have length one
    correlation = float(spearmanr(cosines, pairs["score"]).statistic)
    return Figure(
        "STS benchmark test, Spearman, all-MiniLM-L6-v2",
        f"{correlation:.4f}",
        f"{PUBLISHED_STS} published",
        correlation,
        at_least=0.815,
    )


def _embedded(name: str, parts, known: tuple[float, float, float]) -> list[Figure]:
    """The embedded network, itself untrained, and pixels, on one set."""
    ways = {
        "embedded": (_featurize("embedded", 64), FEATURES_C),
        "embedded@random": (_featurize("embedded@random", 64), FEATURES_C),
        f"pixels ({PIXELS} x {PIXELS})": (pixels, PIXELS_C),
    }
    figures = []
    for (way, (features_of, C)), before in zip(ways.items(), known, strict=True):
        accuracy = probe(features_of, parts, C)
        figures.append(
            Figure(
                f"linear probe, {way}, {name}",
                f"{accuracy:.3f}",
                f"{before} before",
                accuracy - before,
                at_least=-TOLERANCE,
                # Better weights are welcome; other baselines mean another probe.
                at_most=None if way == "embedded" else TOLERANCE,
            )
        )
    return figures


def _digits() -> Figure:
    """Few rows of a set that is far from photographs: pixels should win."""
    from sklearn.datasets import load_digits

    from sklearn_transfer import ImageFeaturizer

    X, y = load_digits(return_X_y=True)
    featurizer = ImageFeaturizer(image_shape=(8, 8), value_range=(0, 16))
    features = featurizer.fit_transform(X)
    ours, plain = [], []
    for draw in range(DRAWS):
        order = np.random.default_rng(draw).permutation(len(y))
        train = np.concatenate([order[y[order] == c][:FEW] for c in range(10)])
        test = np.setdiff1d(order, train)
        for table, scores in ((features, ours), (X, plain)):
            model = linear_probe(1.0).fit(table[train], y[train])
            scores.append(model.score(table[test], y[test]))
    return Figure(
        f"digits, {FEW} rows a class, {DRAWS} draws: embedded above pixels by",
        f"{np.mean(ours):.3f} ± {np.std(ours):.3f}",
        f"{np.mean(plain):.3f} ± {np.std(plain):.3f} (pixels)",
        float(np.mean(ours) - np.mean(plain)),
    )


# --- probes ------------------------------------------------------------------


def linear_probe(C: float):
    """Features to classes: scaled, then logistic regression."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=2000))


def probe(features_of, parts, C: float) -> float:
    """Test accuracy of a linear probe on what ``features_of`` gives for X."""
    (X, y), (X_test, y_test) = parts["train"], parts["test"]
    model = linear_probe(C).fit(features_of(X), y)
    return float(model.score(features_of(X_test), y_test))


def _featurize(backbone: str, image_size: int):
    from sklearn_transfer import ImageFeaturizer

    featurizer = ImageFeaturizer(backbone, image_size=image_size)
    return featurizer.fit_transform


def pixels(X: Sequence) -> np.ndarray:
    """The pictures themselves, centre cut and resized, as rows of numbers."""
    from PIL import Image, ImageOps

    def flat(row) -> np.ndarray:
        image = Image.open(row) if isinstance(row, str) else Image.fromarray(row)
        small = ImageOps.fit(
            image.convert("RGB"), (PIXELS, PIXELS), Image.Resampling.BILINEAR
        )
        return np.asarray(small, np.float32).ravel() / 255

    return np.stack([flat(row) for row in X])


def read_set(data: Path, name: str, most: int | None = None):
    """A folder of pictures, or cifar10's arrays, as "train" and "test"."""
    if name != "cifar10":
        return image_set(data, name, most)
    with np.load(data / "images" / "cifar10.npz", allow_pickle=False) as file:
        parts = {p: (file[f"X_{p}"], file[f"y_{p}"]) for p in ("train", "test")}
    some = {part: spread(len(y), most) for part, (_, y) in parts.items()}
    return {part: (X[some[part]], y[some[part]]) for part, (X, y) in parts.items()}


if __name__ == "__main__":
    run_alone(main, __doc__)
