"""Make the pickles that tests/test_persistence.py loads: one of each estimator.

    python -m tests.pickles.make

They stand for those that users have written with earlier versions. Make them anew
only where a change of format is meant, and say so in the changelog.
"""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from tests.fine_tuning_data import save_text_model

FOLDER = Path(__file__).resolve().parent
BACKBONE = "tiny-text"  # in FOLDER, where the pickles are loaded too
TEXTS = [
    "a good red fox",
    "the dull bee",
    "good good cow",
    "bad owl",
    "dull",
    "red",
] * 3
GOOD = np.array(["yes", "no", "yes", "no", "no", "yes"] * 3)
SHOWN = 6
COMMON = {
    "max_epochs": 3,
    "lr": 1e-3,
    "early_stopping": False,
    "random_state": 0,
    "device": "cpu",
    "precision": "float32",
    "cache": None,
}


def digits():
    """Sixty digits, (n, 64) float, and what they are."""
    X, y = load_digits(return_X_y=True)
    return X[:60], y[:60]


def data(name: str):
    """X and y that the estimator of this name is fitted to."""
    X, y = digits()
    return {
        "image_classifier": (X, y),
        "image_regressor": (X, X.sum(1)),
        "text_classifier": (TEXTS, GOOD),
        "text_regressor": (TEXTS, 10.0 + np.char.str_len(TEXTS)),
    }[name]


def estimators() -> dict:
    """The four, not fitted."""
    from sklearn_transfer import (
        ImageClassifier,
        ImageRegressor,
        TextClassifier,
        TextRegressor,
    )

    image = {**COMMON, "image_shape": (8, 8), "value_range": (0, 16)}
    return {
        "image_classifier": ImageClassifier(freeze_depth="all", **image),
        "image_regressor": ImageRegressor(freeze_depth="all", head=4, **image),
        "text_classifier": TextClassifier(
            BACKBONE, freeze_depth=1, lora_rank=2, **COMMON
        ),
        "text_regressor": TextRegressor(BACKBONE, freeze_depth=-1, **COMMON),
    }


def answers(model, X) -> list:
    """What the estimator says of the first rows."""
    is_classifier = hasattr(model, "predict_proba")
    found = model.predict_proba(X) if is_classifier else model.predict(X)
    return found.tolist()


def make_backbone(folder: Path) -> None:
    """A very small BERT."""
    words = sorted(set(" ".join(TEXTS).split()))
    save_text_model(folder, words, seed=0, width=16, n_heads=2, longest=32)


def main() -> None:
    os.chdir(FOLDER)
    make_backbone(FOLDER / BACKBONE)
    expected = {}
    for name, model in estimators().items():
        X, y = data(name)
        model.fit(X, y)
        expected[name] = answers(model, X[:SHOWN])
        (FOLDER / f"{name}.pkl").write_bytes(pickle.dumps(model, protocol=5))
    (FOLDER / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
