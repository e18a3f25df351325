"""The packages that also put pretrained networks behind scikit-learn.

Peers: embetter 0.9 (TimmEncoder, SentenceEncoder) and skrub 0.11 (LLMEncoder), with
the same networks: one call of transform, and a 5-fold cross-validation, where each
fold asks for rows that another has asked for before.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from benchmarks._common import (
    DATA,
    Figure,
    image_set,
    in_turns,
    minilm_folder,
    run_alone,
    speedup,
    text_set,
)

TIMM_NAME = "resnet18"
FOLDS = 5
BOUNDS = {"at_least": 3, "aim": 10}


def main(quick: bool = False, data: Path = DATA) -> list[Figure]:
    try:
        import embetter.text
        import embetter.vision  # noqa: F401
        import skrub  # noqa: F401
    except ImportError as error:
        sys.exit(f"A peer is not installed ({error}). Write pip install -e '.[bench]'.")
    # What they warn about (their own deprecations, short columns) is not our subject.
    warnings.simplefilter("ignore")
    repeats = 1 if quick else 3
    images = image_set(data, "hymenoptera", 10 if quick else 80)["train"]
    texts = text_set(data, "ag_news", 20 if quick else 300)["train"]
    return [
        *_against_timm_encoder(*images, repeats),
        *_against_sentence_encoder(*texts, repeats),
        *_against_llm_encoder(*texts, repeats),
    ]


def _against_timm_encoder(paths, labels, repeats: int) -> list[Figure]:
    from embetter.vision import ImageLoader, TimmEncoder

    from sklearn_transfer import ImageFeaturizer

    # The same architecture and input size, untrained on both sides: there are no
    # timm weights to be had offline, and they cost no time.
    with _untrained_timm():
        return _compare(
            f"embetter TimmEncoder, {TIMM_NAME}, {len(paths)} small JPEGs",
            ImageFeaturizer(f"timm:{TIMM_NAME}@random"),
            [ImageLoader(), TimmEncoder(TIMM_NAME)],
            (paths, labels),
            repeats,
        )


def _against_sentence_encoder(texts, labels, repeats: int) -> list[Figure]:
    from embetter.text import SentenceEncoder

    from sklearn_transfer import TextFeaturizer

    return _compare(
        f"embetter SentenceEncoder, all-MiniLM-L6-v2, {len(texts)} news texts",
        TextFeaturizer(),
        [SentenceEncoder(minilm_folder())],
        (texts, labels),
        repeats,
    )


def _against_llm_encoder(texts, labels, repeats: int) -> list[Figure]:
    import pandas as pd
    from skrub import LLMEncoder

    from sklearn_transfer import TextFeaturizer

    with tempfile.TemporaryDirectory() as folder:
        # n_components=None leaves out its PCA, so that both give 384 features.
        encoder = LLMEncoder(minilm_folder(), n_components=None, cache_folder=folder)
        return _compare(
            f"skrub LLMEncoder, all-MiniLM-L6-v2, {len(texts)} news texts",
            TextFeaturizer(),
            [encoder],
            (pd.Series(texts, name="text"), labels),
            repeats,
        )


def _compare(what: str, ours, theirs: list, rows, repeats: int) -> list[Figure]:
    """One call without a cache, and cross-validation as it comes.

    ``theirs`` are the peer's steps, from what X holds to features.
    """
    from sklearn.base import clone

    X, y = rows
    uncached = clone(ours).set_params(cache=None).fit(X)
    call = in_turns(
        {"ours": lambda: uncached.transform(X), "peer": lambda: _through(theirs, X)},
        repeats,
    )
    validation = {
        "ours": [_seconds(lambda: _validate([ours], X, y))],
        "peer": [_seconds(lambda: _validate(theirs, X, y))],
    }
    n, kind = len(X), "images" if "JPEG" in what else "texts"
    return [
        speedup(f"{what}: one call", call, "peer", n, kind, **BOUNDS),
        speedup(f"{what}: {FOLDS} folds", validation, "peer", n, kind, **BOUNDS),
    ]


def _through(steps: list, X):
    # fit_transform, because these encoders learn nothing and count as unfitted
    # before it; their networks were loaded by the round that warms up.
    for step in steps:
        X = step.fit_transform(X)
    return X


def _validate(steps: list, X, y) -> None:
    """Cross-validation of a classifier behind the features, our store cold."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline

    from sklearn_transfer import clear_cache

    clear_cache()
    pipeline = make_pipeline(*steps, LogisticRegression(max_iter=1000))
    cross_val_score(pipeline, X, y, cv=FOLDS, error_score="raise")


def _seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@contextmanager
def _untrained_timm() -> Iterator[None]:
    """TimmEncoder always asks for published weights; here it gets none."""
    import timm

    create = timm.create_model

    def untrained(name, pretrained=False, **options):
        return create(name, pretrained=False, **options)

    with mock.patch.object(timm, "create_model", untrained):
        yield


if __name__ == "__main__":
    run_alone(main, __doc__)
