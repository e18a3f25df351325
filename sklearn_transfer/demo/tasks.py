"""The four jobs, each the same search over a baseline's features and over ours."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from sklearn.base import BaseEstimator, clone
from sklearn.compose import ColumnTransformer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from sklearn_transfer import ImageFeaturizer, TextFeaturizer, cache_info
from sklearn_transfer.demo.data import Rows, chosen, digits, docstrings, patches

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
# Tried by every search, the baselines' too: C of LogisticRegression, Ridge's alpha.
STRENGTHS = [0.01, 0.1, 1.0, 10.0]
ALPHAS = [0.1, 1.0, 10.0, 100.0]
# Tried by every search over a network: depth is one more parameter. Counted from
# the end, so that other networks than the default ones can be asked for.
IMAGE_LAYERS = ["last", -2, "all"]
TEXT_LAYERS = ["last", -3]
# Columns of the table that the last job reads.
SUMMARY, NUMBERS = 0, slice(1, None)


@dataclass(frozen=True)
class Size:
    """How many rows: a class, but ``lengths`` in all; ``test`` for every job."""

    draws: int = 3
    patches: int = 10
    digits: int = 10
    texts: int = 16
    lengths: int = 160
    pool: int = 60
    test: int = 40


class Outcome:
    """What one search did on one job.

    Attributes
    ----------
    features : str
    scores : ndarray of shape (n_draws,)
    search : GridSearchCV
        Fitted on the last draw.
    seconds : float
        For all draws.
    encoded, asked : int
        Rows that went through a network, and that scikit-learn asked for.
    """

    def __init__(self, features: str, search: GridSearchCV, job: Job):
        before, start = cache_info(), time.perf_counter()
        fitted = [clone(search).fit(*draw) for draw in job.draws]
        scores = [model.score(*job.test) for model in fitted]
        after, self.seconds = cache_info(), time.perf_counter() - start
        self.features, self.search = features, fitted[-1]
        self.scores = np.array(scores)
        self.encoded = after.misses - before.misses
        self.asked = self.encoded + after.hits - before.hits


@dataclass
class Job:
    """A question, training draws, one test set, a search for each kind of features.

    The first search is the plain baseline, the last one ours.
    """

    question: str
    measure: str
    draws: Sequence[Rows]
    test: Rows
    searches: Mapping[str, GridSearchCV]

    def outcomes(self) -> Iterator[Outcome]:
        """Fit each search on every draw, score it on the test rows."""
        for features, search in self.searches.items():
            yield Outcome(features, search, self)


def jobs(size: Size, images: str = "embedded", texts: str = MINILM) -> Iterator[Job]:
    """The four jobs, one after the other, as their data is read.

    Parameters
    ----------
    size : Size
    images, texts : str
        Backbones. Their "@random" is a baseline, so no weights may be named.
    """
    yield photographs_job(size, images)
    yield digits_job(size, images)
    columns = docstrings()
    pools = {
        split: {key: column[rows] for key, column in columns.items()}
        for split, rows in docstring_pools(columns, size).items()
    }
    yield library_job(size, pools["train"], pools["test"], texts)
    yield length_job(size, pools["train"], pools["test"], texts)


def photographs_job(size: Size, backbone: str) -> Job:
    """Patches of photographs: the net has seen such things, if not these."""
    return Job(
        "What is on the patch?",
        "accuracy",
        [patches("train", size.patches, seed) for seed in draws(size)],
        patches("test", size.test, seed=0),
        {
            "pixels": classified(FunctionTransformer(thumbnails)),
            **image_searches(backbone),
        },
    )


def digits_job(size: Size, backbone: str) -> Job:
    """Digits of 8 x 8 pixels: the counter-example, where pixels are hard to beat."""
    as_images = {"image_shape": (8, 8), "value_range": (0, 16)}
    return Job(
        "Which digit is it?",
        "accuracy",
        [digits("train", size.digits, seed) for seed in draws(size)],
        digits("test", size.test, seed=0),
        {
            "pixels": classified(FunctionTransformer()),
            **image_searches(backbone, **as_images),
        },
    )


def library_job(size: Size, train: Mapping, test: Mapping, backbone: str) -> Job:
    """A docstring's first paragraph: which library is it from?"""
    y = train["library"]
    rows = [chosen(y, size.texts, seed) for seed in draws(size)]
    return Job(
        "Which library is it from?",
        "accuracy",
        [Rows(train["summary"][some], y[some]) for some in rows],
        Rows(test["summary"], test["library"]),
        {
            "TF-IDF": classified(TfidfVectorizer(sublinear_tf=True)),
            **{
                name: classified(TextFeaturizer(name), layers=TEXT_LAYERS)
                for name in (f"{backbone}@random", backbone)
            },
        },
    )


def length_job(size: Size, train: Mapping, test: Mapping, backbone: str) -> Job:
    """How long is the whole docstring, from its first paragraph and the code?"""
    rng = np.random.default_rng(0)
    X, y = mixed_table(train), np.log(train["n_words"])
    rows = [rng.permutation(len(y))[: size.lengths] for _ in range(size.draws)]
    numbers = ("numbers", StandardScaler(), NUMBERS)
    tfidf = ("text", TfidfVectorizer(sublinear_tf=True), SUMMARY)
    network = ("text", TextFeaturizer(backbone), SUMMARY)
    return Job(
        "How long is its docstring?",
        "R²",
        [Rows(X[some], y[some]) for some in rows],
        Rows(mixed_table(test), np.log(test["n_words"])),
        {
            "numbers": regressed(ColumnTransformer([numbers])),
            "numbers, TF-IDF": regressed(ColumnTransformer([tfidf, numbers])),
            f"numbers, {backbone}": regressed(
                ColumnTransformer([network, numbers]), text__layers=TEXT_LAYERS
            ),
        },
    )


def image_searches(backbone: str, **parameters) -> dict[str, GridSearchCV]:
    """Searches over the network untrained and as it is."""
    searches = {}
    for name in (f"{backbone}@random", backbone):
        features = Pipeline(
            [("network", ImageFeaturizer(name, **parameters)), ("z", StandardScaler())]
        )
        searches[name] = classified(features, network__layers=IMAGE_LAYERS)
    return searches


def classified(features: BaseEstimator, **grid: list) -> GridSearchCV:
    """Features into LogisticRegression, over its C and the features' own grid."""
    model = LogisticRegression(max_iter=2000)
    return _search(features, model, {"model__C": STRENGTHS}, grid)


def regressed(features: BaseEstimator, **grid: list) -> GridSearchCV:
    """Features into Ridge, over its alpha and the features' own grid."""
    return _search(features, Ridge(), {"model__alpha": ALPHAS}, grid)


def _search(features, model, strengths: Mapping, grid: Mapping) -> GridSearchCV:
    pipeline = Pipeline([("features", features), ("model", model)])
    grid = {f"features__{name}": values for name, values in grid.items()}
    return GridSearchCV(pipeline, {**strengths, **grid}, cv=3, error_score="raise")


def thumbnails(X: Sequence[np.ndarray]) -> np.ndarray:
    """Patches as 16 x 16 pixels, (n, 256), less their mean brightness.

    Of what was tried (8 to 24 pixels, standardised or not) the best baseline.
    """
    small = [Image.fromarray(x).resize((16, 16), Image.Resampling.BOX) for x in X]
    pixels = np.stack([np.asarray(x, float).ravel() for x in small]) / 255
    return pixels - pixels.mean(axis=1, keepdims=True)


def draws(size: Size) -> range:
    """Seeds of the training draws; 0 is the test set's."""
    return range(1, size.draws + 1)


def docstring_pools(columns: Mapping, size: Size) -> dict[str, np.ndarray]:
    """Rows of the table for training and for testing, equally many a library."""
    pools = {}
    for split, per_class in (("train", size.pool), ("test", size.test)):
        rows = np.flatnonzero(columns["split"] == split)
        pools[split] = rows[chosen(columns["library"][rows], per_class, seed=0)]
    return pools


def mixed_table(columns: Mapping) -> np.ndarray:
    """Summary and numbers side by side: objects, (n, 5)."""
    names = ("summary", "n_lines", "n_parameters", "n_defaults", "is_class")
    return np.stack([columns[name].astype(object) for name in names], axis=1)
