"""Eight rows a class: is fine-tuning as it comes better than frozen features?

Ten draws, the same on both sides. Peers: TextFeaturizer + LogisticRegression(C=10),
SetFit's published accuracies with the same network, and for pictures our own probe
(freeze_depth="all"). Every row of the table says by how much the defaults are better,
mean of the paired differences ± its standard error.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks._common import (
    DATA,
    Figure,
    Part,
    draw,
    mobilenet,
    paired,
    picture_set,
    rows_of,
    run_alone,
    run_parts,
    spread,
    text_set,
)

ROWS_A_CLASS = 8
DRAWS = 10
TEST_ROWS = 600
TEXTS = ("sst2", "emotion", "ag_news", "banking77", "trec6", "subj")
PICTURES = ("hymenoptera", "imagenette", "caltech25", "pneumoniamnist", "cifar10")
# Percent, eight rows a class, all-MiniLM-L6-v2, from SetFit's published raw files.
SETFIT = {"emotion": 39.1, "ag_news": 83.1}


def main(quick: bool = False, data: Path = DATA) -> list[Figure]:
    return run_parts(PARTS, quick, data)


def texts(quick: bool, data: Path) -> list[Figure]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    from sklearn_transfer import TextClassifier, TextFeaturizer

    figures = []
    with tempfile.TemporaryDirectory() as cache:
        for name in TEXTS:
            parts = _cut(text_set(data, name), quick)
            ours, frozen = accuracies(
                parts,
                2 if quick else DRAWS,
                lambda seed: TextClassifier(cache=cache, random_state=seed),
                lambda seed: make_pipeline(
                    TextFeaturizer(cache=cache),
                    LogisticRegression(C=10, max_iter=2000),
                ),
            )
            figures.append(
                above(name, ours, frozen, "frozen features + LogisticRegression")
            )
            if name in SETFIT:
                figures.append(published(name, ours, SETFIT[name]))
    return [*figures, mean_of("the text sets", figures)]


def pictures(quick: bool, data: Path) -> list[Figure]:
    from sklearn_transfer import ImageClassifier

    figures = []
    with tempfile.TemporaryDirectory() as cache:

        def classifier(seed: int, **settings):
            return ImageClassifier(
                mobilenet(data), cache=cache, random_state=seed, **settings
            )

        for name in PICTURES:
            ours, probe = accuracies(
                _cut(picture_set(data, name), quick),
                2 if quick else DRAWS,
                classifier,
                lambda seed: classifier(seed, freeze_depth="all"),
            )
            figures.append(above(name, ours, probe, "probe"))
    return [*figures, mean_of("the picture sets", figures)]


PARTS: dict[str, Part] = {"texts": texts, "pictures": pictures}


# --- accuracies --------------------------------------------------------------


def accuracies(
    parts,
    n_draws: int,
    *makers: Callable[[int], object],
) -> list[list[float]]:
    """Test accuracies in percent, a list for each maker, on the same draws.

    A maker gives an unfitted classifier for the number of a draw.
    """
    (X, y), (X_test, y_test) = parts["train"], parts["test"]
    found: list[list[float]] = [[] for _ in makers]
    for seed in range(n_draws):
        rows = draw(y, ROWS_A_CLASS, seed)
        X_drawn, y_drawn = rows_of(X, rows), rows_of(y, rows)
        for scores, maker in zip(found, makers, strict=True):
            model = maker(seed).fit(X_drawn, y_drawn)
            scores.append(100 * float(model.score(X_test, y_test)))
    return found


def _cut(parts, quick: bool):
    """Few enough test rows, at equal steps: banking77's are sorted by class."""
    X, y = parts["test"]
    some = spread(len(y), 60 if quick else TEST_ROWS)
    return {**parts, "test": (rows_of(X, some), rows_of(y, some))}


def above(name: str, ours: list[float], theirs: list[float], peer: str) -> Figure:
    """By how many points the defaults are better; they must not be worse.

    Not worse is: not by more than one standard error of the paired differences.
    """
    mean, error = paired(ours, theirs)
    return Figure(
        f"{name}, {ROWS_A_CLASS} rows a class, {len(ours)} draws",
        spelled(ours),
        f"{spelled(theirs)} ({peer})",
        mean,
        f"± {error:.2f} points",
        at_least=round(-error, 4),
    )


def published(name: str, ours: list[float], known: float) -> Figure:
    """Accuracy beside a published one, which was measured on other draws."""
    mean = float(np.mean(ours))
    reached = "reached" if mean >= known else "not reached"
    return Figure(
        f"{name}, {ROWS_A_CLASS} rows a class: accuracy",
        spelled(ours),
        f"{known} (SetFit, published: {reached})",
        mean,
        "%",
        aim=known,
    )


def mean_of(sets: str, figures: list[Figure]) -> Figure:
    """Mean over the sets of the paired differences."""
    gains = [figure.value for figure in figures if figure.unit.startswith("±")]
    return Figure(
        f"mean over {sets}: defaults above the peer",
        "",
        "",
        float(np.mean(gains)),
        "points",
    )


def spelled(scores: list[float]) -> str:
    """Mean and standard deviation over the draws."""
    spread_of = np.std(scores, ddof=1) if len(scores) > 1 else np.nan
    return f"{np.mean(scores):.1f} ± {spread_of:.1f}"


if __name__ == "__main__":
    run_alone(main, __doc__, parts=PARTS)
