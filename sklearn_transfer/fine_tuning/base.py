"""What all fine-tuning estimators share: one fit, one way to predict."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

import numpy as np
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
)
from sklearn.metrics import get_scorer
from sklearn.utils import _safe_indexing, check_consistent_length, check_random_state
from sklearn.utils.validation import check_is_fitted

from sklearn_transfer._sklearn import CallbackSupportMixin, _fit_context
from sklearn_transfer.backbones.spec import resolve_freeze_depth
from sklearn_transfer.featurizers.base import check_columns
from sklearn_transfer.fine_tuning.parameters import PARAMETERS, check_callbacks
from sklearn_transfer.fine_tuning.persistence import LearnedState
from sklearn_transfer.fine_tuning.plans import recipe_of, shape_of
from sklearn_transfer.fine_tuning.progress import Progress
from sklearn_transfer.fine_tuning.samples import (
    Part,
    Samples,
    check_weights,
    inner_split,
)
from sklearn_transfer.fine_tuning.scoring import score_of


class BaseFineTuner(
    CallbackSupportMixin,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
    LearnedState,
    BaseEstimator,
):
    """A pretrained network with a new head, whose last stages are trained.

    A subclass says which featurizer gives its frozen features, and what y means.
    """

    _parameter_constraints: dict = PARAMETERS
    n_frozen_stages_: int
    # One scale for all features of the head, where their lengths mean something.
    _common_scale = False

    @abstractmethod
    def _make_featurizer(self):
        """The featurizer whose features are those of ``freeze_depth="all"``."""

    @abstractmethod
    def _make_target(self, y: np.ndarray, classes=None):
        """What y means: Classes, Labels or Values."""

    @abstractmethod
    def _check_y(self, y) -> np.ndarray:
        """y as an array."""

    @abstractmethod
    def _losses(self):
        """The loss of each row, as the recipe takes it."""

    def _class_weights(self, trained: np.ndarray, y: np.ndarray):
        """What weights of rows are multiplied with, from the labels trained on."""
        return 1.0

    # --- fit -------------------------------------------------------------------

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y, sample_weight=None, *, X_val=None, y_val=None, groups=None):
        """Fit the head, and fine-tune the stages that are not frozen.

        Parameters
        ----------
        X : array-like of shape (n_samples,)
            See the class docstring for what a row may be.
        y : array-like of shape (n_samples,) or (n_samples, n_outputs)
            Targets.
        sample_weight : array-like of shape (n_samples,), default=None
            Weight of each row, in the loss and in the probe. A row of weight 0 is
            as if it were not there.
        X_val, y_val : array-like, default=None
            Rows to stop early by. None splits them off X, if at all.
        groups : array-like of shape (n_samples,), default=None
            Rows of one group are either all trained on or all split off.

        Returns
        -------
        self : object
            The fitted estimator.

        Raises
        ------
        ValueError
            If X, y or a parameter cannot be used.
        UnreadableRowsError
            If rows cannot be read; the message names every bad row and why.
        BackboneNotFoundError
            If the backbone is not on this machine and cannot be downloaded.
        DivergedError
            If the loss stops being a number, or explodes.
        MemoryError
            If one sample alone does not fit in memory.
        """
        with self._all_or_nothing():
            goes_on = self.warm_start and self._is_tuned
            samples = self._begin(X, y, sample_weight, is_new=not goes_on)
            epochs = self.max_epochs if self._trains else 0
            progress = Progress(self, X, y, sample_weight, epochs)
            seed = self._seed()
            # A fit that goes on must not judge by rows that it has trained on.
            split_seed = self.__dict__.setdefault("_split_seed", seed)
            train, valid = self._split(samples, X_val, y_val, groups, split_seed)
            with self._seeded(seed):
                self._build(train, seed, recipe_of(self), goes_on=goes_on)
                if self._trains:
                    self._train(train, valid, epochs, progress, seed)
                    self.net_.forget()
            progress.end()
        return self

    def _partial_fit(self, X, y, sample_weight=None, classes=None):
        """One epoch at a constant learning rate."""
        with self._all_or_nothing():
            is_new = not self._is_tuned
            samples = self._begin(X, y, sample_weight, is_new=is_new, classes=classes)
            progress = Progress(self, X, y, sample_weight, 1)
            train = self._class_weighted(Part.all_of(samples))
            seed = self._seed()
            with self._seeded(seed):
                recipe = replace(recipe_of(self), schedule="constant", warmup=0.0)
                # Else the optimizer goes on as it is.
                if is_new or self.net_.made_of_ != self._made_of(recipe):
                    self._build(train, seed, recipe, goes_on=not is_new)
                self._train(train, None, 1, progress, seed)
            progress.end()
        return self

    def _begin(self, X, y, sample_weight, *, is_new: bool, classes=None) -> Samples:
        """Look at the data and the backbone; set what a new fit starts with."""
        before = None if is_new else self._tuned_so_far()
        self._featurizer = self._make_featurizer()
        self._featurizer._spoken_for = type(self).__name__
        self._check_columns(X, reset=is_new)
        rows, y = self._rows(X), self._check_y(y)
        check_consistent_length(rows, y)
        weights = check_weights(sample_weight, len(y))
        if is_new:
            for name in ("net_", "_learned", "_net_history", "_split_seed"):
                self.__dict__.pop(name, None)
            self.history_, self.n_iter_, self.best_epoch_ = [], 0, 0
            self._target = self._make_target(y[weights > 0], classes)
        self._describe()
        self._check_parameters()
        if before is not None:
            self._check_goes_on(*before)
        return Samples.of(X, rows, y, weights, self._featurizer, self._target)

    def _check_parameters(self) -> None:
        """Find what could not work before anything is computed."""
        if isinstance(self.scoring, str):
            get_scorer(self.scoring)
        check_callbacks(self.callbacks, type(self).__name__)

    def _describe(self) -> None:
        """Load the backbone and note what it is made of."""
        from sklearn_transfer.running.device import check_training_device

        featurizer = self._featurizer
        check_training_device(featurizer._device_and_precision()[0])
        backbone = featurizer._load_backbone()
        k = resolve_freeze_depth(self.freeze_depth, backbone.stage_names)
        if "net_" in vars(self) and k > self.n_frozen_stages_:
            raise ValueError(
                f"This {type(self).__name__} was fitted with {self.n_frozen_stages_} "
                f"frozen stages, and freeze_depth={self.freeze_depth!r} would freeze "
                f"{k}: the stages between have changed. Write warm_start=False, or "
                f"freeze_depth={self.n_frozen_stages_}."
            )
        featurizer._describe(backbone)
        self.stage_names_ = featurizer.stage_names_
        self.n_stages_ = featurizer.n_stages_
        self.n_frozen_stages_ = k
        self.device_, self.precision_ = featurizer.device_, featurizer.precision_
        self._n_features_out = featurizer._n_features_out

    def _split(self, samples: Samples, X_val, y_val, groups, seed: int):
        """Rows to train on, and rows to judge by, or None; with class weights."""
        if (X_val is None) != (y_val is None):
            raise ValueError("X_val and y_val go together; give both to fit, or none.")
        if X_val is None:
            train, valid = inner_split(
                samples,
                groups,
                early_stopping=self.early_stopping if self._trains else False,
                fraction=self.validation_fraction,
                stratify=self._target.task == "classes",
                seed=seed,
            )
        else:
            train = Part.all_of(samples)
            valid = Part.all_of(self._validation_samples(X_val, y_val))
        if valid is not None:
            valid = valid.reweighted(self._class_weights(train.y, valid.y))
            valid = valid if len(valid.index) else None
        return self._class_weighted(train), valid

    def _class_weighted(self, train: Part) -> Part:
        weighted = train.reweighted(self._class_weights(train.y, train.y))
        if not len(weighted.index):
            raise ValueError(
                "class_weight gives every row a weight of 0, and none is left to train "
                "on. Write class_weight=None, or a weight above 0 for each class."
            )
        return weighted

    def _validation_samples(self, X_val, y_val) -> Samples:
        self._check_columns(X_val, reset=False)
        rows, y = self._rows(X_val), self._check_y(y_val)
        check_consistent_length(rows, y)
        weights = np.ones(len(y))
        return Samples.of(X_val, rows, y, weights, self._featurizer, self._target)

    @property
    def _trains(self) -> bool:
        """Whether anything is trained by steps: a probe alone is not."""
        is_probe = self.head_init == "probe" and self.head == "linear"
        return self.n_frozen_stages_ < self.n_stages_ or not is_probe

    # --- the network -----------------------------------------------------------

    def _build(self, train: Part, seed: int, recipe, *, goes_on: bool) -> None:
        """Set ``net_``: new, or with the weights it has."""
        from sklearn_transfer.training.tune import as_arrays, from_arrays, start_head

        learned = history = None
        if goes_on:
            learned, history = as_arrays(self.net_.module_), self.net_.history
        if learned is None:
            # The probe's inner folds are dealt in the order of rows: a shuffled X, or
            # one with weights for copies, then has the same probe to the last bit.
            train = train.by_content()
            self._target.fit_scale(train.targets, train.weights)
        self._shape = shape_of(self)
        network = self._new_network()
        if learned is None:
            features = self._features(train)
            start_head(
                network.head,
                features,
                self._target.scaled(train.targets),
                train.weights,
                task=self._target.task,
                common=self._common_scale,
                init=self.head_init,
            )
        self.net_ = self._net_around(network, recipe, seed)
        if learned is not None:
            # Only now: l2_sp pulls to the pretrained weights, which the net has seen.
            # Fewer stages may be frozen than before: those begin as they are.
            from_arrays(network, learned, may_miss=True)
            self.net_.history_ = history
            self.net_.forget()

    @property
    def _normalizes(self) -> bool:
        return False

    def _new_network(self):
        from sklearn_transfer.training.tune import Shape, build_network

        shape = Shape(**self._shape)
        is_whole_frozen = shape.k == shape.n_stages
        backbone = None if is_whole_frozen else self._featurizer._load_backbone()
        return build_network(backbone, shape)

    def _net_around(self, network, recipe, seed: int):
        from sklearn_transfer.training.tune import make_net

        device, precision = self._featurizer._device_and_precision()
        net = make_net(
            network,
            self._losses(),
            recipe,
            batch_size=self.batch_size,
            device=device,
            precision=precision,
            seed=seed,
            callbacks=self.callbacks,
        )
        net.epochs_before_ = len(self.history_)
        net.made_of_ = self._made_of(recipe)
        return net

    def _made_of(self, recipe) -> tuple:
        """What a net cannot change: where it differs, another one is built."""
        losses = self._losses()
        of_losses = losses.values_loss, losses.label_smoothing
        return recipe, shape_of(self), self.batch_size, of_losses, self.callbacks

    # --- activations -----------------------------------------------------------

    def _features(self, part: Part) -> np.ndarray:
        """The frozen network's features of a part, (n, n_features)."""
        features = self._featurizer._features(part.samples.rows, part.digests, {})
        return features[part.index]

    def _activations(self, part: Part):
        """What the tail takes of a part's rows; other rows are not computed."""
        return self._activations_of(part.samples.rows, part.digests)

    def _activations_of(self, rows, digests, *, fresh=False):
        from sklearn_transfer.training.examples import Vectors

        featurizer, k = self._featurizer, self.n_frozen_stages_
        if k < self.n_stages_:
            return featurizer._prefixes(
                rows, digests, k, self.prefix_bytes, fresh=fresh
            )
        device, _ = featurizer._device_and_precision()
        return Vectors(featurizer._features(rows, digests, {}), device)

    def _examples(self, part: Part, activations, **varied):
        import torch

        from sklearn_transfer.training.examples import Examples

        return Examples(
            activations,
            part.index,
            torch.as_tensor(self._target.scaled(part.targets)),
            torch.as_tensor(part.weights, dtype=torch.float32),
            **varied,
        )

    def _training_examples(self, train: Part, seed: int):
        """Examples to train on; a modality may vary them."""
        return self._examples(train, self._activations(train))

    # --- training --------------------------------------------------------------

    def _train(self, train, valid, epochs: int, progress: Progress, seed) -> None:
        """Train ``net_`` epoch by epoch, noting each in ``history_``."""
        from sklearn_transfer.training.tune import Watch

        net, already = self.net_, len(self.history_)
        examples = self._training_examples(train, seed)
        checks = (
            None if valid is None else self._examples(valid, self._activations(valid))
        )
        stops = checks is not None and self.early_stopping is not False

        def before_epoch(epoch: int) -> None:
            frozen = self._frozen_in(already + epoch)
            if frozen != net.module_.n_frozen:
                net.module_.freeze(frozen)
            progress.begin_epoch()

        def note(record: dict) -> bool:
            record["epoch"] = self.n_iter_ = len(self.history_) + 1
            self.history_.append(record)
            return progress.end_epoch(record)

        watch = Watch(
            net,
            checks,
            None if valid is None else self._score_of(valid),
            by_loss=self.scoring is None,
            patience=self.n_iter_no_change if stops else None,
            tell=note,
            n_recomputed=examples.n_recomputed,
        )
        watch.begin()
        net.tune(
            examples,
            checks,
            epochs,
            before_epoch=before_epoch,
            after_epoch=watch.after_epoch,
        )
        watch.end()
        self.best_epoch_ = already + watch.best_epoch

    def _frozen_in(self, epoch: int) -> int:
        """Frozen stages in an epoch, from 1; they may thaw one by one."""
        if self.unfreeze_every is None:
            return self.n_frozen_stages_
        thawed = (epoch - 1) // self.unfreeze_every
        return max(self.n_frozen_stages_, self.n_stages_ - thawed)

    def _score_of(self, valid: Part):
        samples, index, X = valid.samples, valid.index, valid.samples.X
        weights = samples.weights[index]
        return score_of(
            self.scoring,
            self._target,
            # What has no positions, as array-likes may, is an array first.
            _safe_indexing(X if hasattr(X, "__getitem__") else np.asarray(X), index),
            samples.y[index],
            None if np.all(weights == 1) else weights,
        )

    # --- predictions -----------------------------------------------------------

    def transform(self, X):
        """The vectors that enter the head: features of the tuned network.

        Parameters
        ----------
        X : array-like of shape (n_samples,)
            See the class docstring for what a row may be.

        Returns
        -------
        features : ndarray of shape (n_samples, n_features_out), float32
            With every stage frozen, the very features that the featurizer gives.

        Raises
        ------
        UnreadableRowsError
            If rows cannot be read; the message names every bad row and why.
        """
        return self._vectors(X)

    def _vectors(self, X) -> np.ndarray:
        """What enters the head, (n_samples, n_features), float32."""
        check_is_fitted(self)
        self._follow_parameters()
        self._check_columns(X, reset=False)
        rows = self._rows(X)
        part = Part.all_of(Samples.without_targets(X, rows, self._featurizer))
        if self.n_frozen_stages_ == self.n_stages_:
            return self._features(part)
        import torch

        from sklearn_transfer.training.examples import Examples

        none = torch.zeros(len(rows))
        examples = Examples(self._activations(part), part.index, none, none)
        return self.net_.vectors(examples).numpy()

    def _outputs(self, X) -> np.ndarray:
        """What leaves the head, (n_samples, n_outputs), float64."""
        vectors = self._vectors(X)
        return self.net_.outputs_of(vectors)

    def to_module(self):
        """The whole tuned network as one plain module.

        Returns
        -------
        module : torch.nn.Module
            On the CPU, float32, in eval mode, with adapters folded in; for
            ``torch.export``, ONNX or a service. It takes images (n, 3, height,
            width), float in [0, 1] and of the backbone's size, or token ids and
            attention mask, (n, n_tokens) int64 each. It gives logits (n, n_classes),
            or values in y's units.
        """
        from sklearn_transfer.backbones.registry import fingerprint
        from sklearn_transfer.training.whole import whole_network

        check_is_fitted(self)
        self._follow_parameters()
        featurizer = self._featurizer
        backbone = featurizer._load_backbone()
        featurizer._check_unchanged(
            backbone, fingerprint(backbone), featurizer._request
        )
        n = self._target.n_outputs
        mean = getattr(self._target, "mean", np.zeros(n))
        spread = getattr(self._target, "spread", np.ones(n))
        return whole_network(backbone, self.net_.module_, mean, spread)

    # --- small things ----------------------------------------------------------

    def _rows(self, X):
        return self._featurizer._rows(X)

    def _check_columns(self, X, *, reset: bool) -> None:
        check_columns(self, X, reset=reset)

    def _seed(self) -> int:
        if self.random_state is None:
            # Not from numpy's global state, which a fit leaves as it is.
            return int(np.random.default_rng().integers(2**31))
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        if not self.history_:
            return seed
        # A fit that goes on draws other orders, views and dropout than before.
        sequence = np.random.SeedSequence((seed, len(self.history_)))
        return int(sequence.generate_state(1)[0]) % 2**31

    def _seeded(self, seed: int):
        from sklearn_transfer.training.tune import seeded

        return seeded(seed, self._featurizer._device_and_precision()[0])

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.one_d_array = True
        tags.input_tags.string = True
        tags.transformer_tags.preserves_dtype = []
        return tags
