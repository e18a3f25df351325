"""Texts a second. Peer: SentenceTransformer.encode as it comes (float32, batch 32)."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from benchmarks._common import (
    DATA,
    Figure,
    in_turns,
    minilm_folder,
    run_alone,
    speedup,
    text_set,
)
from benchmarks.images import mean_cosine

PEER = "SentenceTransformer.encode"
REPEATS = 3
SHARE_OF_REPEATS = 0.95


def main(quick: bool = False, data: Path = DATA) -> list[Figure]:
    from sentence_transformers import SentenceTransformer

    from sklearn_transfer import TextFeaturizer
    from sklearn_transfer.exceptions import TruncatedTextWarning

    # Both sides cut texts of more than 256 tokens; only ours says so.
    warnings.simplefilter("ignore", TruncatedTextWarning)
    n = 60 if quick else 2000
    repeats = 1 if quick else REPEATS
    texts = made_up_texts(data, n)
    column = with_repeats(texts, n // 2)
    featurizer = TextFeaturizer(cache=None).fit(texts)
    peer = SentenceTransformer(
        minilm_folder(), device="cpu", model_kwargs={"dtype": "float32"}
    )

    def compare(X: list[str], what: str, **bounds: float) -> Figure:
        functions = {
            "ours": lambda: featurizer.transform(X),
            PEER: lambda: peer.encode(X, show_progress_bar=False),
        }
        seconds = in_turns(functions, repeats)
        return speedup(what, seconds, PEER, len(X), "texts", **bounds)

    figures = [
        compare(texts, f"{n} texts of 3 to 200 words", at_least=3.5, aim=5),
        compare(
            column,
            f"{len(column)} texts, {SHARE_OF_REPEATS:.0%} of them repeats",
            at_least=20,
        ),
    ]
    some = texts[:200]
    cosine = mean_cosine(
        featurizer.transform(some), peer.encode(some, show_progress_bar=False)
    )
    agreement = "mean cosine of our features and the peer's"
    return [*figures, Figure(agreement, "", "", cosine, at_least=0.999)]


def made_up_texts(data: Path, n: int) -> list[str]:
    """Texts of 3 to 200 words, drawn from the words of a news set."""
    rng = np.random.default_rng(0)
    news = text_set(data, "ag_news", 500)["train"][0]
    words = np.array(" ".join(news).split())
    return [" ".join(rng.choice(words, rng.integers(3, 201))) for _ in range(n)]


def with_repeats(texts: list[str], n: int) -> list[str]:
    """``n`` rows of which only every twentieth brings a new text, in random order."""
    rng = np.random.default_rng(1)
    n_distinct = max(1, round(n * (1 - SHARE_OF_REPEATS)))
    distinct = texts[:n_distinct]
    rows = [*range(n_distinct), *rng.integers(n_distinct, size=n - n_distinct)]
    return [distinct[i] for i in rng.permutation(rows)]


if __name__ == "__main__":
    run_alone(main, __doc__)
