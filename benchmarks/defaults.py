"""Which defaults? Settings of the classifiers, side by side over the shared sets.

    python -m benchmarks.defaults --out sweep.jsonl --budget 3000   sweep, go on
    python -m benchmarks.defaults --out sweep.jsonl --table         the table alone
    python -m benchmarks.defaults --out a.jsonl --draws 0 1 2       one of several
                                        processes; cat joins their files

Peers: the settings of one another. Every result is a line of JSON in FILE; what is
there is not run again, so that a sweep can be stopped and its grids below edited. All
sets and settings get their first draw before any gets its second.

The table holds, for each setting, how far its mean accuracy lies below the best one of
a set and number of rows, in units of the standard error of that (paired) difference:
the mean over the sets, and the worst. Only training parts are used: fitted on rows
drawn from them, scored on others of them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks._common import (
    DATA,
    draw,
    mobilenet,
    paired,
    picture_set,
    rows_of,
    text_set,
)

# --- what is tried: edit here ------------------------------------------------

# As sklearn's ParameterGrid takes them: products of the lists, one after the other.
# What is not named keeps its default.
GRIDS = {
    "image": [
        {"freeze_depth": ["all"]},
        {"freeze_depth": [-2], "label_smoothing": [0.0, 0.03]},
        {"freeze_depth": [-2], "lr": [3e-4]},
        {"freeze_depth": [-2], "max_epochs": [20]},
        {"freeze_depth": [-4]},
    ],
    "text": [
        {"freeze_depth": ["all"]},
        {"freeze_depth": [1], "lr": [1e-4, 3e-4]},
        {"freeze_depth": [-3], "lr": [3e-4]},
        {"freeze_depth": [0]},
    ],
}
IMAGE_BACKBONES = ("mobilenet_v2",)
SETS = {
    "image": ("hymenoptera", "imagenette", "caltech25", "pneumoniamnist", "cifar10"),
    "text": ("sst2", "emotion", "ag_news", "banking77", "trec6", "subj", "mr"),
}
ROWS_A_CLASS = (5, 20, 100)
DRAWS = 10
SCORED_ROWS = 600
LEAST_LEFT = 100
# A draw of more rows takes minutes a setting and tells little about few rows.
MOST_ROWS = {"image": 1000, "text": 600}
# Settings of every classifier, not of interest here. Small pictures save two thirds
# of the time.
COMMON = {"image": {"image_size": 160}, "text": {}}


# --- jobs --------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One fit: a setting (as JSON, which can be compared) on one draw of one set."""

    modality: str
    backbone: str
    name: str
    n: int
    draw: int
    setting: str

    @property
    def cell(self) -> tuple[str, str, int]:
        """Where settings are compared with each other."""
        return self.backbone, self.name, self.n


def jobs() -> Iterator[Job]:
    """All fits, in an order in which every set and setting comes early."""
    for number in range(DRAWS):
        for n in ROWS_A_CLASS:
            for place in range(max(map(len, map(settings, GRIDS)))):
                yield from _row_of_jobs(number, n, place)


def _row_of_jobs(number: int, n: int, place: int) -> Iterator[Job]:
    """The setting at ``place`` of each modality's list, on every set."""
    for modality, names in SETS.items():
        of_modality = settings(modality)
        if place >= len(of_modality):
            continue
        backbones = IMAGE_BACKBONES if modality == "image" else ("minilm",)
        for name in names:
            for backbone in backbones:
                yield Job(modality, backbone, name, n, number, of_modality[place])


@cache
def settings(modality: str) -> tuple[str, ...]:
    """The settings of the grids, each once, as JSON with sorted keys."""
    from sklearn.model_selection import ParameterGrid

    grid = ParameterGrid(GRIDS[modality])
    spelled = (json.dumps(setting, sort_keys=True) for setting in grid)
    return tuple(dict.fromkeys(spelled))


# --- results -----------------------------------------------------------------


def read_results(file: Path) -> dict[Job, dict]:
    """What a sweep has left: accuracy, seconds and test rows of each job.

    A last line without its end was cut off by a kill, and its job runs again.
    """
    if not file.exists():
        return {}
    found = {}
    for line in file.read_text("utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            continue
        entry = json.loads(line)
        job = Job(**{key: entry.pop(key) for key in Job.__dataclass_fields__})
        found[job] = entry
    return found


def append_result(file: Path, job: Job, result: Mapping) -> None:
    """Add a line, in the place of one that was cut off."""
    with open(file, "a+b") as out:
        out.seek(0)
        whole = out.read().rfind(b"\n") + 1
        out.truncate(whole)
        out.write(json.dumps({**asdict(job), **result}).encode() + b"\n")


def sweep(file: Path, data: Path, budget: float, todo: Iterable[Job]) -> int:
    """Run what is not in ``file`` until ``budget`` seconds are over; how many ran."""
    deadline = time.monotonic() + budget
    done = read_results(file)
    n_run = 0
    with tempfile.TemporaryDirectory() as cache_folder:
        for job in todo:
            if job in done or not worth_it(job, data):
                continue
            if time.monotonic() >= deadline:
                break
            result = run(job, data, cache_folder)
            append_result(file, job, result)
            n_run += 1
            print(
                f"{result['seconds']:6.1f} s  {result['accuracy']:.3f}  "
                f"{job.name} ({job.backbone}), {job.n} a class, draw {job.draw}, "
                f"{job.setting}",
                flush=True,
            )
    return n_run


@cache
def rows(modality: str, name: str, data: Path):
    """Samples and labels of a set's training part.

    The test part stays out of the choice: few_shot.py and the guide report on it.
    """
    read = picture_set if modality == "image" else text_set
    return read(data, name)["train"]


def worth_it(job: Job, data: Path) -> bool:
    """Whether draws differ, are not too large, and leave enough rows to score on.

    Where most classes have no more than ``n`` rows, every draw is the whole set.
    """
    _, counts = np.unique(rows(job.modality, job.name, data)[1], return_counts=True)
    drawn = np.minimum(counts, job.n).sum()
    left = counts.sum() - drawn
    is_draw = np.median(counts) > job.n and drawn <= MOST_ROWS[job.modality]
    return bool(is_draw and left >= LEAST_LEFT)


def left_over(n: int, drawn: np.ndarray) -> np.ndarray:
    """Row numbers to score on: of those not drawn, mostly the same in every draw."""
    order = np.random.default_rng(0).permutation(n)
    return order[~np.isin(order, drawn)][:SCORED_ROWS]


def run(job: Job, data: Path, cache_folder: str) -> dict:
    """Fit and score one classifier."""
    X, y = rows(job.modality, job.name, data)
    drawn = draw(y, job.n, job.draw)
    others = left_over(len(y), drawn)
    model = _classifier(job, data, cache_folder)
    start = time.perf_counter()
    model.fit(rows_of(X, drawn), rows_of(y, drawn))
    seconds = time.perf_counter() - start
    accuracy = float(model.score(rows_of(X, others), rows_of(y, others)))
    return {"accuracy": accuracy, "seconds": round(seconds, 2), "n_test": len(others)}


def _classifier(job: Job, data: Path, cache_folder: str):
    from sklearn_transfer import ImageClassifier, TextClassifier

    chosen = {
        **COMMON[job.modality],
        **json.loads(job.setting),
        "cache": cache_folder,
        "random_state": job.draw,
    }
    if job.modality == "text":
        return TextClassifier(**chosen)
    known = {"mobilenet_v2": mobilenet(data)}
    return ImageClassifier(known.get(job.backbone, job.backbone), **chosen)


# --- the table ---------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """How one setting does over the sets."""

    setting: str
    accuracy: float  # mean over the cells
    mean_gap: float  # standard errors below the best, mean over the cells
    worst_gap: float
    worst_cell: tuple[str, str, int]
    n_cells: int
    seconds: float  # a fit; the first ones of a set also encode its rows


def table(results: Mapping[Job, Mapping], modality: str) -> list[Line]:
    """One line a setting of today's grid, the smallest worst gap first.

    In each cell only the draws count that all settings have, and at least two.
    """
    chosen = settings(modality)
    gaps: dict[str, dict[tuple, float]] = {setting: {} for setting in chosen}
    accuracy: dict[str, list[float]] = {setting: [] for setting in chosen}
    seconds: dict[str, list[float]] = {setting: [] for setting in chosen}
    for cell, found in _cells(results, modality).items():
        draws = _common_draws(found, chosen)
        if len(draws) < 2:
            continue
        scores = {s: [found[s][d]["accuracy"] for d in draws] for s in chosen}
        n_test = found[chosen[0]][draws[0]]["n_test"]
        for setting, gap in gaps_to_best(scores, n_test).items():
            gaps[setting][cell] = gap
            accuracy[setting].append(float(np.mean(scores[setting])))
            seconds[setting] += [found[setting][d]["seconds"] for d in draws]
    lines = [
        Line(
            setting,
            float(np.mean(accuracy[setting])),
            float(np.mean(list(of_setting.values()))),
            max(of_setting.values()),
            max(of_setting, key=of_setting.__getitem__),
            len(of_setting),
            float(np.mean(seconds[setting])),
        )
        for setting, of_setting in gaps.items()
        if of_setting
    ]
    return sorted(lines, key=lambda line: line.worst_gap)


def gaps_to_best(scores: Mapping[str, Sequence[float]], n_test: int):
    """Standard errors by which each setting lies below the one with the best mean.

    The errors are of the paired differences, and at least what a single test row in
    each draw would make: few draws can agree by chance.
    """
    best = max(scores, key=lambda setting: float(np.mean(scores[setting])))
    gaps = {}
    for setting, values in scores.items():
        mean, error = paired(scores[best], values)
        gaps[setting] = mean / max(error, 1 / (n_test * math.sqrt(len(values))))
    return gaps


def _cells(results: Mapping[Job, Mapping], modality: str):
    """Cell -> setting -> draw -> result."""
    cells: dict[tuple, dict[str, dict[int, Mapping]]] = {}
    for job, result in results.items():
        if job.modality == modality:
            of_cell = cells.setdefault(job.cell, {})
            of_cell.setdefault(job.setting, {})[job.draw] = result
    return cells


def _common_draws(found: Mapping[str, Mapping[int, object]], chosen) -> list[int]:
    """Draws of a cell that every setting has."""
    return sorted(set.intersection(*(set(found.get(s, ())) for s in chosen)))


def print_tables(results: Mapping[Job, Mapping]) -> None:
    """The published tables, one a modality, in markdown."""
    for modality in GRIDS:
        lines = table(results, modality)
        print(f"\n## {modality}\n")
        if not lines:
            print("No set has two draws of every setting yet.")
            continue
        print("| setting | accuracy | mean gap | worst gap | where | cells | s a fit |")
        print("|---|---|---|---|---|---|---|")
        for line in lines:
            backbone, name, n = line.worst_cell
            print(
                f"| `{line.setting}` | {line.accuracy:.3f} | {line.mean_gap:.2f} "
                f"| {line.worst_gap:.2f} | {name}, {n} a class ({backbone}) "
                f"| {line.n_cells} | {line.seconds:.1f} |"
            )


def command() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--only", choices=list(GRIDS), help="one modality")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS_A_CLASS)
    parser.add_argument("--draws", type=int, nargs="+", default=range(DRAWS))
    parser.add_argument("--quick", action="store_true", help="the first eight fits")
    parser.add_argument("--data", type=Path, default=DATA, help="the real data")
    args = parser.parse_args()
    if not args.table:
        if not args.data.is_dir():
            sys.exit(f"No data in {args.data}. Write --data FOLDER.")
        todo = [
            job
            for job in jobs()
            if args.only in (None, job.modality)
            and job.n in args.rows
            and job.draw in args.draws
        ]
        todo = todo[: 8 if args.quick else None]
        n_run = sweep(args.out, args.data, args.budget, todo)
        left = sum(
            worth_it(job, args.data) for job in set(todo) - set(read_results(args.out))
        )
        print(f"{n_run} fits, {left} left")
    print_tables(read_results(args.out))


if __name__ == "__main__":
    command()
