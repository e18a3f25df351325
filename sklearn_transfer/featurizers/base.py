"""What the image and the text featurizer share: one fit, one transform."""

from __future__ import annotations

import os
import sys
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from numbers import Integral

import numpy as np
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
)
from sklearn.utils.validation import check_is_fitted, validate_data

from sklearn_transfer._sklearn import (
    CallbackSupportMixin,
    Interval,
    StrOptions,
    _fit_context,
)
from sklearn_transfer.backbones.spec import POOLINGS, resolve_layers
from sklearn_transfer.exceptions import BackboneChangedError
from sklearn_transfer.running.encode import encode
from sklearn_transfer.running.request import Request
from sklearn_transfer.store.session import open_store


class _OtherPrecision(Exception):
    """Raised while opening the network: ``args[0]`` is the precision here."""


def check_columns(estimator, X, *, reset: bool) -> None:
    """Note or compare column names where X has columns."""
    if hasattr(X, "collect"):
        return  # a LazyFrame, which `as_rows` refuses: its names would cost a query
    if hasattr(X, "columns") or (isinstance(X, np.ndarray) and X.ndim == 2):
        validate_data(estimator, X, reset=reset, skip_check_array=True)
    elif reset:
        for name in ("n_features_in_", "feature_names_in_"):
            estimator.__dict__.pop(name, None)  # of an earlier fit, on columns


class BaseFeaturizer(
    CallbackSupportMixin,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
    BaseEstimator,
):
    """A frozen backbone as a transformer.

    A subclass says how X becomes rows, which backbone its parameters name, and
    how rows become batches.
    """

    # The estimator that messages speak of: the one the user wrote.
    _spoken_for: str | None = None

    _parameter_constraints: dict = {
        "layers": [str, Integral, list, tuple],
        "pooling": [StrOptions(set(POOLINGS))],
        "batch_size": [
            StrOptions({"auto"}),
            Interval(Integral, 1, None, closed="left"),
        ],
        "device": [str],
        "precision": [StrOptions({"auto", "float32", "bfloat16"})],
        "cache": [str, os.PathLike, None],
        "verbose": ["verbose"],
    }

    @abstractmethod
    def _rows(self, X):
        """The samples of X, nothing decoded yet."""

    @abstractmethod
    def _load_backbone(self):
        """The StagedBackbone that the parameters name, in float32 on the CPU."""

    @abstractmethod
    def _digests(self, rows) -> tuple[list[bytes | None], dict[int, str]]:
        """A digest a row (None where there is none), and the bad rows."""

    @abstractmethod
    def _open_batches(self, rows, digests, runner):
        """The Batches that feed the runner."""

    @abstractmethod
    def _finish(self, features, rows, bad: dict[int, str], batches) -> np.ndarray:
        """Errors, warnings and what is cheap enough not to be stored."""

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y=None):
        """Load the backbone and note its stages; nothing is learned from X.

        Parameters
        ----------
        X : array-like of shape (n_samples,)
            See the class docstring for what a row may be. Only its form is
            looked at; no row is decoded or encoded.
        y : ignored
            For scikit-learn's conventions.

        Returns
        -------
        self : object
            The fitted featurizer.

        Raises
        ------
        ValueError
            If X, a parameter or the backbone's name cannot be used.
        BackboneNotFoundError
            If the backbone is not on this machine and cannot be downloaded.
        """
        context = self._init_callback_context()
        context.call_on_fit_task_begin(estimator=self, X=X, y=y)
        self._check_columns(X, reset=True)
        self._look_at(self._rows(X))
        self._describe(self._load_backbone())
        context.call_on_fit_task_end(estimator=self, X=X, y=y)
        return self

    def transform(self, X):
        """Encode each row, or find it in the cache.

        Parameters
        ----------
        X : array-like of shape (n_samples,)
            See the class docstring for what a row may be.

        Returns
        -------
        features : ndarray of shape (n_samples, n_features_out), float32
            A DataFrame after ``set_output``.

        Raises
        ------
        UnreadableRowsError
            If rows cannot be read; the message names every bad row and why.
            What was encoded before is kept in the cache.
        BackboneChangedError
            If the backbone found now is not the one seen by ``fit``.
        MemoryError
            If one sample alone does not fit in memory.
        """
        check_is_fitted(self)
        self._check_columns(X, reset=False)
        rows = self._rows(X)
        digests, bad = self._digests(rows)
        # Before anything is encoded: a missing file is known at once.
        self._refuse(rows, bad)
        return self._features(rows, digests, bad)

    def _features(self, rows, digests, bad: dict[int, str]) -> np.ndarray:
        """Features of rows whose digests are known, (n_rows, n_features_out)."""
        request = self._request_here()
        try:
            return self._find_or_encode(rows, digests, bad, request)
        except _OtherPrecision as other:
            # Fitted elsewhere, under precision="auto". All rows of one call
            # share a precision, so those found under fit's are not mixed in.
            request = replace(request, dtype=other.args[0])
            return self._find_or_encode(rows, digests, bad, request)

    def _find_or_encode(self, rows, digests, bad, request: Request) -> np.ndarray:
        keys = request.keys(digests)
        opened: list = []

        def open_network():
            batches, run = self._open_network(rows, digests, request)
            opened.append(batches)
            return batches, run

        features, undecoded = encode(
            keys,
            request,
            self._wanted,
            open_store(self.cache),
            open_network,
            verbose=self.verbose,
        )
        batches = opened[0] if opened else None
        return self._finish(features, rows, {**bad, **undecoded}, batches)

    def _request_here(self) -> Request:
        """The request of fit, under the precision of this machine if known.

        Where torch is not loaded fit's precision stands until a row is missing:
        a fully stored transform needs neither torch nor the network.
        """
        if self.precision != "auto":
            return replace(self._request, dtype=self.precision)
        if "torch" not in sys.modules:
            return self._request
        return replace(self._request, dtype=self._device_and_precision()[1])

    def _device_and_precision(self):
        from sklearn_transfer.running.device import resolve_device, resolve_precision

        device = resolve_device(self.device)
        return device, resolve_precision(self.precision, device)

    def _open_network(self, rows, digests, request: Request) -> tuple[object, Callable]:
        from sklearn_transfer.backbones.registry import fingerprint
        from sklearn_transfer.running.device import runner_for
        from sklearn_transfer.running.memory import ShrinkingBatches
        from sklearn_transfer.running.parallel import run_batches, workers_for

        device, precision = self._device_and_precision()
        if precision != request.dtype:
            raise _OtherPrecision(precision)
        backbone = self._load_backbone()
        self._check_unchanged(backbone, fingerprint(backbone), request)
        runner = runner_for(backbone, device, precision)
        batches = self._open_batches(rows, digests, runner)
        run = ShrinkingBatches(
            lambda inputs: runner.taps(inputs, request.pooling, request.stages),
        )
        return batches, lambda feed: run_batches(run, feed, workers_for(device))

    def _prefixes(self, rows, digests, k: int, prefix_bytes, *, fresh=False):
        """Activations after stage ``k`` of every row, stored as far as they may be.

        ``fresh`` rows differ at every use, and are never stored.
        """
        from sklearn_transfer.backbones.registry import fingerprint
        from sklearn_transfer.running.device import runner_for
        from sklearn_transfer.running.prefixes import open_prefixes, prefix_budget

        device, precision = self._device_and_precision()
        backbone, request = self._load_backbone(), self._request
        self._check_unchanged(backbone, fingerprint(backbone), request)
        request = replace(request, dtype=precision)
        runner = runner_for(backbone, device, precision)
        store = open_store(self.cache)
        batches = self._open_batches(rows, digests, runner)
        found, bad = open_prefixes(
            [None] * len(digests) if fresh else request.prefix_keys(digests, k),
            batches,
            runner,
            k,
            store,
            prefix_budget(prefix_bytes, store),
            verbose=self.verbose,
            keys_at=None if fresh else lambda j: request.prefix_keys(digests, j),
        )
        if bad:
            self._raise_bad_rows(rows, bad)
        return found

    def _refuse(self, rows, bad: dict[int, str]) -> None:
        """Raise if there are bad rows, unless they are to become NaN."""

    def _raise_bad_rows(self, rows, bad: dict[int, str]) -> None:
        """The error for rows that cannot be read."""
        raise NotImplementedError

    def _check_unchanged(self, backbone, found: str, request: Request) -> None:
        """Raise where what would run is not what fit saw and keys were made for."""
        if found != request.fingerprint:
            raise BackboneChangedError(
                f"backbone={self.backbone!r} is another network than the one this "
                f"{self._name} was fitted with: fingerprint {found[:12]} now, "
                f"{request.fingerprint[:12]} at fit. Restore the weight file, or call "
                "fit again."
            )
        if backbone.recipe != request.recipe:
            raise BackboneChangedError(
                f"The parameters of this {self._name} ask for "
                f"{backbone.recipe}, and it was fitted for {request.recipe}. "
                "After set_params, call fit again."
            )

    def _describe(self, backbone) -> None:
        """Set the fitted attributes."""
        from sklearn_transfer.backbones.registry import fingerprint
        from sklearn_transfer.running.device import measure

        device, precision = self._device_and_precision()
        wanted = resolve_layers(self.layers, backbone.stage_names)
        # One pass stores every tap it passes, so that a grid over layers
        # encodes each row once; flattened maps are too large for that.
        is_small = self.pooling != "flatten"
        stages = tuple(range(1, backbone.n_stages + 1)) if is_small else wanted
        widths = measure(backbone, self.pooling, stages).widths
        self._request = Request(
            recipe=backbone.recipe,
            fingerprint=fingerprint(backbone),
            dtype=precision,
            pooling=self.pooling,
            stages=stages,
            widths=widths,
        )
        self._wanted = wanted
        self._n_features_out = len(self._request.columns(wanted))
        self.stage_names_ = list(backbone.stage_names)
        self.n_stages_ = backbone.n_stages
        self.device_ = str(device)
        self.precision_ = precision

    @property
    def _name(self) -> str:
        return self._spoken_for or type(self).__name__

    def _check_columns(self, X, *, reset: bool) -> None:
        check_columns(self, X, reset=reset)

    def _look_at(self, rows) -> None:
        """A chance to warn about X in fit."""

    def get_feature_names_out(self, input_features=None):
        """Names of the columns that ``transform`` gives.

        Parameters
        ----------
        input_features : ignored
            For scikit-learn's conventions.

        Returns
        -------
        names : ndarray of str, of shape (n_features_out,)
            ``imagefeaturizer0``, ``imagefeaturizer1``, ...; where several layers
            are tapped, ``imagefeaturizer_layer1_0`` and so on.
        """
        check_is_fitted(self, "_n_features_out")
        if len(self._wanted) == 1:
            return super().get_feature_names_out(input_features)
        prefix = type(self).__name__.lower()
        width = dict(zip(self._request.stages, self._request.widths, strict=True))
        return np.asarray(
            [
                f"{prefix}_{self.stage_names_[stage - 1]}_{i}"
                for stage in self._wanted
                for i in range(width[stage])
            ],
            dtype=object,
        )

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.one_d_array = True
        tags.input_tags.string = True
        tags.transformer_tags.preserves_dtype = []
        return tags
