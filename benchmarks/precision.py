"""What bfloat16 costs in accuracy. Peer: the same features in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks._common import (
    DATA,
    Figure,
    mobilenet,
    run_alone,
    text_set,
    weight_file,
)
from benchmarks.quality import FEATURES_C, linear_probe, read_set

IMAGE_SETS = ("hymenoptera", "imagenette", "caltech25")
TEXT_SETS = ("sst2", "emotion", "ag_news", "trec6", "subj", "mr", "banking77")
MOST_TEXTS = 1500
MOST_POINTS = 0.3


def main(quick: bool = False, data: Path = DATA) -> list[Figure]:
    figures, changes = [], []
    for what, make, parts, classifier in _cases(data, quick):
        scores = {
            precision: _accuracy(make(precision), parts, classifier)
            for precision in ("bfloat16", "float32")
        }
        change = 100 * (scores["bfloat16"] - scores["float32"])
        changes.append(change)
        figures.append(
            Figure(
                f"{what}, {len(parts['test'][1])} test rows",
                f"{scores['bfloat16']:.4f}",
                f"{scores['float32']:.4f} (float32)",
                change,
                "points",
            )
        )
    spread = np.std(changes, ddof=1) / np.sqrt(len(changes))
    return [
        *figures,
        Figure(
            f"mean change over {len(changes)} sets, ± its standard error",
            f"{np.mean(changes):+.2f} ± {spread:.2f}",
            "0 (float32)",
            float(np.mean(changes)),
            "points",
            at_least=-MOST_POINTS,
        ),
    ]


def _cases(data: Path, quick: bool):
    """What, the featurizer of a precision, the parts of a set, and a classifier."""
    from sklearn.linear_model import LogisticRegression

    most_images, most_texts = (40, 40) if quick else (None, MOST_TEXTS)
    squeezenet = weight_file(data, "squeezenet1_1_features_imagenet")
    networks = {
        "mobilenet_v2, 224 px": (mobilenet(data), 224, IMAGE_SETS),
        "squeezenet1_1, 224 px": (f"squeezenet1_1@{squeezenet}", 224, IMAGE_SETS),
        "embedded, 64 px": ("embedded", 64, ("cifar10", *IMAGE_SETS)),
    }
    for network, (backbone, size, names) in networks.items():
        for name in names:
            parts = read_set(data, name, most_images)
            classifier = linear_probe(FEATURES_C)
            yield f"{network}, {name}", _images(backbone, size), parts, classifier
    for name in TEXT_SETS:
        parts = text_set(data, name, most_texts)
        # Not scaled by feature: vectors of length one lose by it.
        classifier = LogisticRegression(C=10, max_iter=2000)
        yield f"all-MiniLM-L6-v2, {name}", _texts, parts, classifier


def _images(backbone: str, size: int):
    from sklearn_transfer import ImageFeaturizer

    return lambda precision: ImageFeaturizer(
        backbone, image_size=size, precision=precision
    )


def _texts(precision: str):
    from sklearn_transfer import TextFeaturizer

    return TextFeaturizer(precision=precision)


def _accuracy(featurizer, parts, classifier) -> float:
    (X, y), (X_test, y_test) = parts["train"], parts["test"]
    classifier.fit(featurizer.fit_transform(X), y)
    return float(classifier.score(featurizer.transform(X_test), y_test))


if __name__ == "__main__":
    run_alone(main, __doc__)
