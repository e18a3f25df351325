"""The picture: photographs, patches with what was seen in them, and all scores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from sklearn_transfer.demo.data import BOXES, photographs
from sklearn_transfer.demo.report import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sklearn_transfer.demo.tasks import Job, Outcome


class Colours(NamedTuple):
    """A neutral ground, and one colour each for ours and for mistakes."""

    ground: str
    text: str
    faint: str
    baseline: str
    ours: str
    mistake: str


LIGHT = Colours("#ffffff", "#24292f", "#6e7781", "#ccd2d9", "#2f6fb7", "#d9680d")
DARK = Colours("#0d1117", "#e6edf3", "#8b949e", "#484f58", "#58a6ff", "#e0741b")
WIDTH, HEIGHT, DPI = 12.0, 6.5, 100  # inches
SHOWN = 12  # test patches a kind, the first ones
# In fractions of the figure: the left part shows the first job, the right part
# the scores of all.
LEFT, MIDDLE, RIGHT, BARS = 0.02, 0.595, 0.645, 0.79


def draw(done: Sequence[tuple[Job, list[Outcome]]], path, *, dark: bool = False) -> str:
    """Draw to a file; say where, or why not.

    Parameters
    ----------
    done : sequence of (Job, list of Outcome)
        The first job's test rows are shown, if they are patches.
    path : str or path-like
        Of a picture format that Pillow writes.
    dark : bool, default=False
    """
    if not done:
        return "No picture, for want of results."
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return "No picture: that needs matplotlib. Write: pip install matplotlib"
    colours = DARK if dark else LIGHT
    figure = Figure((WIDTH, HEIGHT), dpi=DPI, facecolor=colours.ground)
    bottom = _photographs(figure, colours)
    _patches(figure, colours, *done[0], top=bottom - 0.065)
    _scores(figure, colours, done)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    # A palette halves the file; dithered, the photographs keep their colours.
    picture.quantize(palette=picture.quantize(256)).save(path, optimize=True)
    return f"Picture: {os.fspath(path)}"


def _photographs(figure: Figure, colours: Colours) -> float:
    """The photographs side by side; the height at which they end."""
    figure.text(
        LEFT, 0.945, "What is on the patch?", color=colours.text, size=12, weight="bold"
    )
    note = "learned from grey patches of the solid boxes, tested on the dashed ones"
    figure.text(MIDDLE, 0.945, note, color=colours.faint, size=9, ha="right")
    photos, gap = photographs(), 0.006
    total = sum(photo.width / photo.height for photo in photos.values())
    scale = (MIDDLE - LEFT - gap * (len(photos) - 1)) / total
    height, left = scale * WIDTH / HEIGHT, LEFT
    for name, photo in photos.items():
        width = scale * photo.width / photo.height
        axes = figure.add_axes((left, 0.92 - height, width, height))
        axes.imshow(photo)
        _outline(axes, name)
        axes.axis("off")
        left += width + gap
    return 0.92 - height


def _outline(axes: Axes, photo: str) -> None:
    """The boxes of one photograph: solid for training, dashed for testing."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import Normal, Stroke

    halo = [Stroke(linewidth=2.6, foreground="#00000080"), Normal()]
    for splits in BOXES.values():
        for split, style in (("train", "-"), ("test", (0, (3, 2)))):
            for name, x0, y0, x1, y1 in splits[split]:
                if name == photo:
                    look: dict[str, Any] = {"edgecolor": "white", "linestyle": style}
                    look |= {"fill": False, "linewidth": 1.2}
                    box = Rectangle((x0, y0), x1 - x0, y1 - y0, **look)
                    box.set_path_effects(halo)
                    axes.add_patch(box)


def _patches(
    figure: Figure, colours: Colours, job: Job, outcomes: list[Outcome], top: float
) -> None:
    """A row of test patches for each kind; mistakes framed and named."""
    if not isinstance(job.test.X, list):
        return
    ours = outcomes[-1]
    note = f"first test patches of each kind, as {short(ours.features)} sees them; "
    figure.text(
        LEFT, top + 0.015, note + "mistakes in orange", color=colours.faint, size=9
    )
    predicted = ours.search.predict(job.test.X)
    labels = list(dict.fromkeys(job.test.y.tolist()))
    left, bottom = LEFT + 0.06, 0.03
    axes = figure.add_axes((left, bottom, MIDDLE - left, top - bottom))
    for y, label in enumerate(labels):
        style: dict[str, Any] = {"ha": "right", "va": "center", "size": 10}
        axes.text(-0.12, y + 0.5, label, color=colours.text, **style)
        for x, i in enumerate(np.flatnonzero(job.test.y == label)[:SHOWN]):
            _patch(axes, job.test.X[i], x, y)
            if predicted[i] != label:
                _mistake(axes, predicted[i], x, y, colours)
    axes.set(xlim=(0, SHOWN), ylim=(len(labels), 0), aspect="auto")
    axes.axis("off")


def _patch(axes: Axes, pixels: np.ndarray, x: int, y: int) -> None:
    extent = (x + 0.03, x + 0.97, y + 0.97, y + 0.03)
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, extent=extent)


def _mistake(axes: Axes, seen: str, x: int, y: int, colours: Colours) -> None:
    from matplotlib.patches import Rectangle

    edge: dict[str, Any] = {"edgecolor": colours.mistake, "linewidth": 2, "fill": False}
    axes.add_patch(Rectangle((x + 0.03, y + 0.03), 0.94, 0.94, **edge))
    ground = {"facecolor": colours.mistake, "edgecolor": "none", "pad": 1.2}
    style: dict[str, Any] = {"ha": "center", "va": "bottom", "size": 7.5}
    axes.text(x + 0.5, y + 0.94, seen, color="white", bbox=ground, **style)


def _scores(figure: Figure, colours: Colours, done) -> None:
    """A group of bars for each job, from the plain baseline to ours."""
    share = 0.95 / len(done)
    for number, (job, outcomes) in enumerate(done):
        top = 0.945 - number * share
        style: dict[str, Any] = {"color": colours.text, "size": 11, "weight": "bold"}
        figure.text(RIGHT, top, job.question, **style)
        style = {"color": colours.faint, "size": 9, "ha": "right"}
        figure.text(0.985, top, job.measure, **style)
        height = min(share - 0.09, 0.05 * len(outcomes))
        axes = figure.add_axes((BARS, top - 0.02 - height, 0.985 - BARS, height))
        for row, outcome in enumerate(outcomes):
            _bar(axes, row, outcome, colours, is_ours=row == len(outcomes) - 1)
        axes.set(xlim=(0, 1.12), ylim=(len(outcomes) - 0.5, -0.5))
        axes.axis("off")


def _bar(
    axes: Axes, row: int, outcome: Outcome, colours: Colours, *, is_ours: bool
) -> None:
    """Mean score as a bar, and the standard deviation over draws as a line on it."""
    mean, deviation = outcome.scores.mean(), outcome.scores.std()
    fill = colours.ours if is_ours else colours.baseline
    ink = colours.text if is_ours else colours.faint
    axes.barh(row, max(mean, 0), height=0.74, color=fill)
    span = [mean - deviation, mean + deviation]
    axes.plot(span, [row, row], color=colours.text, linewidth=1.2)
    style: dict[str, Any] = {"va": "center", "size": 9}
    axes.text(-0.02, row, short(outcome.features), color=ink, ha="right", **style)
    end = max(mean + deviation, 0) + 0.025
    axes.text(end, row, f"{mean:.2f}", color=colours.text, **style)
