"""The table, as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sklearn_transfer.demo.tasks import Job, Outcome

_LINE = "{:<34}{:>15}{:>9}{:>14}{:>12}"


def header() -> str:
    """The names of the columns."""
    return _LINE.format("", "score", "seconds", "rows encoded", "asked for")


def lines(job: Job, outcomes: Sequence[Outcome]) -> str:
    """One job: its question, then a line for each kind of features."""
    n_train, n_test = len(job.draws[0].y), len(job.test.y)
    title = (
        f"\n{job.question}  {job.measure}, {n_train} training and {n_test} test rows"
    )
    return "\n".join([title, *map(_line, outcomes)])


def _line(outcome: Outcome) -> str:
    score = f"{outcome.scores.mean():.3f} ± {outcome.scores.std():.3f}"
    rows = (f"{outcome.encoded:,}", f"{outcome.asked:,}") if outcome.asked else ("", "")
    return _LINE.format(
        "  " + short(outcome.features), score, f"{outcome.seconds:.1f}", *rows
    ).rstrip()


def short(features: str) -> str:
    """A backbone's name without its organisation."""
    head, slash, tail = features.rpartition("/")
    before = head.rpartition(", ")
    return before[0] + before[1] + tail if slash else features


def footer(outcomes: Sequence[Outcome]) -> str:
    """What the table means, and what the cache saved."""
    encoded = sum(outcome.encoded for outcome in outcomes)
    asked = sum(outcome.asked for outcome in outcomes)
    return (
        "\nScores: mean and standard deviation over random training draws; the "
        "searches chose\nC or alpha, and for networks the layers, by 3-fold "
        "cross-validation within each draw.\n"
        f"Rows encoded: {encoded:,}, each once. Without the cache: {asked:,}."
    )
