"""Image networks that fit and predict like any classifier or regressor."""

from __future__ import annotations

from contextlib import nullcontext

from sklearn_transfer._sklearn import StrOptions
from sklearn_transfer.featurizers.image import ImageFeaturizer
from sklearn_transfer.fine_tuning.base import BaseFineTuner
from sklearn_transfer.fine_tuning.documentation import documented
from sklearn_transfer.fine_tuning.outputs import FineTunedClassifier, FineTunedRegressor
from sklearn_transfer.fine_tuning.parameters import whole
from sklearn_transfer.fine_tuning.samples import Part
from sklearn_transfer.inputs.augment import (
    FixedViews,
    FreshViews,
    alone_with_random_state,
    resolve_augment,
)

INPUT = {
    name: ImageFeaturizer._parameter_constraints[name]
    for name in ("backbone image_size image_shape value_range decode pooling".split())
} | {
    "augment": [StrOptions({"none", "flip", "standard"}), callable],
    "n_views": [whole(0)],
    "batch_norm": [StrOptions({"fixed", "train"})],
}


class _OfImages(BaseFineTuner):
    """X is one column of images."""

    def _make_featurizer(self) -> ImageFeaturizer:
        return ImageFeaturizer(
            self.backbone,
            pooling=self.pooling,
            image_size=self.image_size,
            image_shape=self.image_shape,
            value_range=self.value_range,
            decode=self.decode,
            device=self.device,
            precision=self.precision,
            cache=self.cache,
            verbose=self.verbose,
        )

    def _check_parameters(self) -> None:
        super()._check_parameters()
        augment = resolve_augment(self.augment)
        is_fresh = augment is not None and not self.n_views
        if is_fresh and self._trains and self.n_frozen_stages_ == self.n_stages_:
            raise ValueError(
                "freeze_depth='all' trains on stored features, and augment makes new "
                "images in every epoch. Write n_views=4 for as many fixed views of "
                "each image, or augment='none'."
            )

    def _training_examples(self, train: Part, seed: int):
        augment = resolve_augment(self.augment)
        if augment is None:
            return super()._training_examples(train, seed)
        rows, digests = train.samples.rows, train.digests
        # A transform draws, in threads, from the very state that dropout draws from.
        shares = augment.uses_global_random_state
        guard = alone_with_random_state if shares else nullcontext
        if self.n_views:
            views = FixedViews(rows, augment, self.n_views)
            digests = [
                None if digests[i % len(rows)] is None else views.digest(i)
                for i in range(len(views))
            ]
            activations = self._activations_of(views, digests)
            return self._examples(
                train,
                activations,
                n_views=self.n_views,
                n_rows=len(rows),
                guard=guard,
            )
        fresh = FreshViews(rows, augment, seed)
        activations = self._activations_of(fresh, digests, fresh=True)
        return self._examples(train, activations, on_epoch=fresh.set_epoch, guard=guard)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags


@documented("image", "classes")
class ImageClassifier(_OfImages, FineTunedClassifier):
    """A pretrained image network with a new head, fine-tuned to classify.

    Fits and predicts like any scikit-learn classifier, in a Pipeline, a
    cross-validation or a GridSearchCV; ``freeze_depth`` is one more parameter to
    search over, and what frozen stages give is computed once.

    Parameters
    ----------
    backbone : str or ModuleBackbone, default="embedded"
        The network, as for `ImageFeaturizer`: "embedded", "resnet50",
        "vit_b_16", "timm:name", each optionally "@random" or "@weights".
    $PARAMETERS

    Attributes
    ----------
    $ATTRIBUTES

    See Also
    --------
    ImageFeaturizer : The frozen network's features, for any estimator.
    TextClassifier : The same for texts.

    Notes
    -----
    X is one column of images: paths, ``bytes``, PIL images or arrays; see
    `ImageFeaturizer`. Frozen stages are always in eval mode: their BatchNorm
    statistics do not move. With ``freeze_depth="all"`` and a linear head from the
    probe nothing is trained by steps: the classifier is the probe.

    References
    ----------
    $REFERENCES

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn_transfer import ImageClassifier
    >>> X, y = load_digits(return_X_y=True)
    >>> model = ImageClassifier(
    ...     image_shape=(8, 8), value_range=(0, 16), max_epochs=2, random_state=0
    ... )
    >>> model.fit(X[:100], y[:100]).predict(X[:3])
    array([0, 1, 2])
    """

    _parameter_constraints: dict = {
        **FineTunedClassifier._parameter_constraints,
        **INPUT,
    }

    def __init__(
        self,
        backbone="embedded",
        *,
        freeze_depth=-2,
        head_init="probe",
        head="linear",
        lr=1e-4,
        head_lr=None,
        layer_decay=0.8,
        unfreeze_every=None,
        max_epochs=10,
        batch_size=32,
        optimizer="adamw",
        weight_decay=0.01,
        l2_sp=0.0,
        dropout=0.0,
        label_smoothing=0.03,
        mixup=0.0,
        augment="none",
        n_views=0,
        batch_norm="fixed",
        warmup=0.0,
        schedule="cosine",
        clip_norm=1.0,
        ema=0.0,
        lora_rank=0,
        class_weight=None,
        early_stopping="auto",
        scoring=None,
        validation_fraction=0.1,
        n_iter_no_change=5,
        warm_start=False,
        callbacks=None,
        prefix_bytes="auto",
        random_state=None,
        device="auto",
        precision="auto",
        cache="session",
        verbose=0,
        image_size=None,
        image_shape=None,
        value_range=None,
        decode="auto",
        pooling="auto",
    ):
        self.backbone = backbone
        self.freeze_depth = freeze_depth
        self.head_init = head_init
        self.head = head
        self.lr = lr
        self.head_lr = head_lr
        self.layer_decay = layer_decay
        self.unfreeze_every = unfreeze_every
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.optimizer = optimizer
        self.weight_decay = weight_decay
        self.l2_sp = l2_sp
        self.dropout = dropout
        self.label_smoothing = label_smoothing
        self.mixup = mixup
        self.augment = augment
        self.n_views = n_views
        self.batch_norm = batch_norm
        self.warmup = warmup
        self.schedule = schedule
        self.clip_norm = clip_norm
        self.ema = ema
        self.lora_rank = lora_rank
        self.class_weight = class_weight
        self.early_stopping = early_stopping
        self.scoring = scoring
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.warm_start = warm_start
        self.callbacks = callbacks
        self.prefix_bytes = prefix_bytes
        self.random_state = random_state
        self.device = device
        self.precision = precision
        self.cache = cache
        self.verbose = verbose
        self.image_size = image_size
        self.image_shape = image_shape
        self.value_range = value_range
        self.decode = decode
        self.pooling = pooling


@documented("image", "values")
class ImageRegressor(_OfImages, FineTunedRegressor):
    """A pretrained image network with a new head, fine-tuned to predict numbers.

    Fits and predicts like any scikit-learn regressor; see `ImageClassifier`.

    Parameters
    ----------
    backbone : str or ModuleBackbone, default="embedded"
        The network, as for `ImageFeaturizer`: "embedded", "resnet50",
        "vit_b_16", "timm:name", each optionally "@random" or "@weights".
    $PARAMETERS

    Attributes
    ----------
    $ATTRIBUTES

    See Also
    --------
    ImageClassifier : The same for classes.

    Notes
    -----
    y may have several columns. Targets are standardised inside; what is predicted
    and scored is in y's units, losses are not.

    References
    ----------
    $REFERENCES

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn_transfer import ImageRegressor
    >>> X, y = load_digits(return_X_y=True)
    >>> ink = X.sum(axis=1)
    >>> model = ImageRegressor(
    ...     image_shape=(8, 8), value_range=(0, 16), max_epochs=2, random_state=0
    ... )
    >>> model.fit(X[:100], ink[:100]).predict(X[:3]).shape
    (3,)
    """

    _parameter_constraints: dict = {
        **FineTunedRegressor._parameter_constraints,
        **INPUT,
    }

    def __init__(
        self,
        backbone="embedded",
        *,
        freeze_depth=-2,
        head_init="probe",
        head="linear",
        lr=1e-4,
        head_lr=None,
        layer_decay=0.8,
        unfreeze_every=None,
        max_epochs=10,
        batch_size=32,
        optimizer="adamw",
        weight_decay=0.01,
        l2_sp=0.0,
        dropout=0.0,
        mixup=0.0,
        augment="none",
        n_views=0,
        batch_norm="fixed",
        warmup=0.0,
        schedule="cosine",
        clip_norm=1.0,
        ema=0.0,
        lora_rank=0,
        loss="squared_error",
        early_stopping="auto",
        scoring=None,
        validation_fraction=0.1,
        n_iter_no_change=5,
        warm_start=False,
        callbacks=None,
        prefix_bytes="auto",
        random_state=None,
        device="auto",
        precision="auto",
        cache="session",
        verbose=0,
        image_size=None,
        image_shape=None,
        value_range=None,
        decode="auto",
        pooling="auto",
    ):
        self.backbone = backbone
        self.freeze_depth = freeze_depth
        self.head_init = head_init
        self.head = head
        self.lr = lr
        self.head_lr = head_lr
        self.layer_decay = layer_decay
        self.unfreeze_every = unfreeze_every
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.optimizer = optimizer
        self.weight_decay = weight_decay
        self.l2_sp = l2_sp
        self.dropout = dropout
        self.mixup = mixup
        self.augment = augment
        self.n_views = n_views
        self.batch_norm = batch_norm
        self.warmup = warmup
        self.schedule = schedule
        self.clip_norm = clip_norm
        self.ema = ema
        self.lora_rank = lora_rank
        self.loss = loss
        self.early_stopping = early_stopping
        self.scoring = scoring
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.warm_start = warm_start
        self.callbacks = callbacks
        self.prefix_bytes = prefix_bytes
        self.random_state = random_state
        self.device = device
        self.precision = precision
        self.cache = cache
        self.verbose = verbose
        self.image_size = image_size
        self.image_shape = image_shape
        self.value_range = value_range
        self.decode = decode
        self.pooling = pooling
