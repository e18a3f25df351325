"""The head after a backbone, and the probe that it starts from.

A probe is a regularised linear model on the backbone's vectors, with a centre and a
scale of its own. It is a whole answer where nothing else trains, and the start of
fine-tuning where something does.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, fields
from numbers import Integral

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from sklearn_transfer._locks import ForkSafeLock
from sklearn_transfer.training.linear import (
    Space,
    fit_classes,
    fit_labels,
    fit_values,
)

MLP_WIDTH = 256
MOST_BELOW_ZERO = 0.05  # share of the absolute sum
REMEMBERED = 32


# --- the module --------------------------------------------------------------


class Head(nn.Module):
    """(vector - center) * scale -> dropout -> linear, always in float32.

    Parameters
    ----------
    n_in, n_out : int
        Width of the vectors, number of outputs.
    kind : {"linear", "mlp"} or int, default="linear"
        "mlp" or a width adds a branch with one hidden layer (of 256 for "mlp")
        beside the linear map. Its last layer starts at zero, so that every kind
        starts as the linear head.
    dropout : float, default=0.0
        Share of the scaled vector's entries that are dropped in training.

    Raises
    ------
    ValueError
        If ``kind`` is nothing of these.

    Examples
    --------
    >>> import torch
    >>> head = Head(4, 3).eval()
    >>> head(torch.zeros(2, 4)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self, n_in: int, n_out: int, *, kind: str | int = "linear", dropout: float = 0.0
    ):
        super().__init__()
        width = _width(kind)
        self.register_buffer("center", torch.zeros(n_in))
        self.register_buffer("scale", torch.ones(n_in))
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(n_in, n_out)
        self.branch = _branch(n_in, width, n_out) if width else None

    def forward(self, vectors: Tensor) -> Tensor:
        """Outputs (n, n_out) float32 of vectors (n, n_in) of any dtype."""
        # Logits in bf16 have three digits: a probe's probabilities would be off by
        # more than a first step of fine-tuning moves them.
        with torch.autocast(vectors.device.type, enabled=False):
            rows = self.dropout((vectors.float() - self.center) * self.scale)
            outputs = self.linear(rows)
            return outputs if self.branch is None else outputs + self.branch(rows)

    @torch.no_grad()
    def load_scaling(self, center: np.ndarray, scale: np.ndarray) -> None:
        """Take centre and scale, both of shape (n_in,)."""
        self.center.copy_(torch.tensor(center))
        self.scale.copy_(torch.tensor(scale))

    @torch.no_grad()
    def load_probe(self, probe: Probe) -> None:
        """Become the probe: in eval mode the outputs are the probe's."""
        self.load_scaling(probe.center, probe.scale)
        self.linear.weight.copy_(torch.tensor(probe.coef))
        self.linear.bias.copy_(torch.tensor(probe.intercept))
        if self.branch is not None:
            _start_at_zero(self.branch)


def _width(kind: str | int) -> int:
    """Width of the hidden layer; 0 for none."""
    if isinstance(kind, str) and kind in ("linear", "mlp"):
        return MLP_WIDTH if kind == "mlp" else 0
    if isinstance(kind, Integral) and not isinstance(kind, bool) and kind >= 1:
        return int(kind)
    raise ValueError(
        f"head={kind!r} is neither 'linear', 'mlp' nor the width of a hidden layer. "
        f"Write head='linear', or head={MLP_WIDTH} for a hidden layer that wide."
    )


def _branch(n_in: int, width: int, n_out: int) -> nn.Sequential:
    """One hidden layer whose output is zero at first."""
    branch = nn.Sequential(nn.Linear(n_in, width), nn.GELU(), nn.Linear(width, n_out))
    _start_at_zero(branch)
    return branch


def _start_at_zero(branch: nn.Sequential) -> None:
    nn.init.zeros_(branch[-1].weight)
    nn.init.zeros_(branch[-1].bias)


# --- the probe ---------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """A linear model of ``(vector - center) * scale``; arrays are read-only float32.

    Attributes
    ----------
    center, scale : ndarray of shape (n_in,)
    coef : ndarray of shape (n_out, n_in)
    intercept : ndarray of shape (n_out,)
    strength : float
        Variance of an output that the penalty expects at a row of average length:
        large where the data were let speak.
    """

    center: np.ndarray
    scale: np.ndarray
    coef: np.ndarray
    intercept: np.ndarray
    strength: float

    def __post_init__(self):
        for field in fields(self)[:4]:
            array = np.array(getattr(self, field.name), np.float32)
            array.setflags(write=False)  # one probe serves every fit that asks
            object.__setattr__(self, field.name, array)


def fit_scaling(features, weights, common: bool) -> tuple[np.ndarray, np.ndarray]:
    """Centre and scale that give columns of mean 0 and variance about 1.

    Parameters
    ----------
    features : ndarray of shape (n, d)
    weights : ndarray of shape (n,) or None
    common : bool
        True: one scale for all columns, under which their average variance is 1.
        Right where lengths and angles carry meaning: texts, normalised vectors.
        False: half way to a variance of 1 in every column.

    Returns
    -------
    center, scale : ndarray of shape (d,), float32
    """
    features = np.asarray(features, np.float64)
    weights = np.ones(len(features)) if weights is None else np.asarray(weights)
    center = np.average(features, axis=0, weights=weights)
    variance = np.average((features - center) ** 2, axis=0, weights=weights)
    average = variance.mean()
    if average <= 1e-12 * np.mean(center**2):  # nothing moved but rounding
        return center.astype(np.float32), np.ones(len(center), np.float32)
    # Never by a column's own variance alone: of few rows it is known badly, and of
    # a column that hardly moved it blows noise up (hymenoptera, 8 rows a class,
    # lost 2 points).
    own = average if common else variance
    variance = (own + np.full_like(variance, average)) / 2
    return center.astype(np.float32), (1 / np.sqrt(variance)).astype(np.float32)


def fit_probe(features, target, weights, *, task, n_out, common, seed) -> Probe:
    """Fit the probe, its strength chosen by a small inner cross-validation.

    A weight of 2 is the row twice, to the last bit of rounding. The probe of equal
    data is computed once a process.

    Parameters
    ----------
    features : ndarray of shape (n, d)
    target : ndarray
        (n,) int in 0 .. n_out - 1 for "classes", (n, n_out) of 0 and 1 for
        "labels", (n, n_out) float, already standardised, for "values".
    weights : ndarray of shape (n,) or None
        Positive. Only their ratios count, as in the loss of fine-tuning.
    task : {"classes", "labels", "values"}
    n_out : int
        Number of outputs.
    common : bool
        As in :func:`fit_scaling`.
    seed : int
        Of the inner folds.

    Returns
    -------
    Probe
        Outputs are logits of a softmax for "classes", of sigmoids for "labels",
        and the values themselves for "values".

    Examples
    --------
    >>> import numpy as np
    >>> features = np.array([[0.0, 1.0], [0.1, 0.9], [1.0, 0.0], [0.9, 0.2]])
    >>> probe = fit_probe(
    ...     features, np.array([0, 0, 1, 1]), None,
    ...     task="classes", n_out=2, common=True, seed=0,
    ... )
    >>> probe.coef.shape
    (2, 2)
    """
    features = np.ascontiguousarray(features, np.float32)
    target = np.ascontiguousarray(target, np.float64 if task == "values" else np.int64)
    n = len(features)
    weights = np.ones(n) if weights is None else np.asarray(weights, np.float64)
    what = (task, n_out, common, seed)
    return _remembered.get(
        _key(features, target, weights, *what),
        lambda: _fit_alone(*_distinct(features, target, weights), *what),
    )


def _fit_alone(*problem) -> Probe:
    """As `_fit`, on one thread.

    Its products take microseconds: threads that wait for each other at the end of
    every one made 500 rows of 512 features take 65 seconds instead of 5 on 2 cores.
    """
    with threadpool_limits(1):
        return _fit(*problem)


def _fit(features, target, weights, task, n_out, common, seed) -> Probe:
    """The probe of distinct rows."""
    n_broken = int(np.sum(~np.isfinite(features).all(axis=1)))
    if n_broken:
        raise ValueError(
            f"The network's features of {n_broken} of {len(features)} distinct rows "
            "are infinite or not numbers. Write precision='float32', or look at what "
            "the backbone makes of your data."
        )
    center, scale = scaling = fit_scaling(features, weights, common)
    if task == "values":
        space = Space.around_mean(features, *scaling)
        fitted = fit_values(space, target.reshape(-1, n_out), weights)
    else:
        # Pooled activations have an origin, "nothing was seen", and a penalty that
        # knows of it gains 1 to 2 points at 8 rows a class (hymenoptera,
        # pneumoniamnist). Texts and signed features have none (it cost trec6 2).
        at_origin = not common and _is_one_sided(features)
        space_of = Space.around_origin if at_origin else Space.around_mean
        space = space_of(features, *scaling)
        if task == "classes":
            fitted = fit_classes(space, target, n_out, weights, seed)
        else:
            fitted = fit_labels(space, target, weights, seed)
    coef, intercept, strength = fitted
    return Probe(center, scale, coef, intercept, strength)


def _is_one_sided(features: np.ndarray) -> bool:
    """Whether these are activations that hardly go below zero (ReLU, SiLU)."""
    below = -np.minimum(features, 0).sum(dtype=np.float64)
    return below <= MOST_BELOW_ZERO * np.abs(features).sum(dtype=np.float64)


def _distinct(features, target, weights):
    """Distinct pairs of row and target, as they first appear, weights summed.

    So a weight of 2 is the row twice, also in the inner folds, where a copy in the
    training part would vouch for its twin. Weights then average 1. Not in the order
    of the numbers: rounding of the features would then deal other folds.
    """
    pairs = np.concatenate([_bytes_of(features), _bytes_of(target)], axis=1)
    _, first, group = np.unique(
        pairs.view(f"V{pairs.shape[1]}").ravel(),
        return_index=True,
        return_inverse=True,
    )
    total = np.bincount(group, weights)
    appeared = np.argsort(first)
    first, total = first[appeared], total[appeared]
    return features[first], target[first], total * (len(total) / total.sum())


def _bytes_of(table: np.ndarray) -> np.ndarray:
    """The bytes of each row (n, bytes); -0.0 counts as 0.0."""
    rows = np.ascontiguousarray(table + 0).reshape(len(table), -1)
    return rows.view(np.uint8)


# --- memory of probes --------------------------------------------------------


class _Remembered:
    """The probes asked for last. A grid over learning rates asks for equal ones."""

    def __init__(self, most: int):
        self.most = most
        self.probes: OrderedDict[bytes, Probe] = OrderedDict()
        self.lock = ForkSafeLock()

    def get(self, key: bytes, fit) -> Probe:
        """The probe of the key, fitted outside the lock if it is not known."""
        with self.lock.held():
            if key in self.probes:
                self.probes.move_to_end(key)
                return self.probes[key]
        probe = fit()
        with self.lock.held():
            self.probes[key] = probe
            while len(self.probes) > self.most:
                self.probes.popitem(last=False)
        return probe


_remembered = _Remembered(REMEMBERED)


def forget_probes() -> None:
    """Fit every probe anew, as a benchmark wants it."""
    with _remembered.lock.held():
        _remembered.probes.clear()


def _key(*parts) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(repr((part.shape, part.dtype.str)).encode())
            digest.update(np.ascontiguousarray(part).data)
        else:
            digest.update(repr(part).encode())
    return digest.digest()
