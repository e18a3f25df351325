"""Language models that fit and predict like any classifier or regressor."""

from __future__ import annotations

from sklearn_transfer._sklearn import StrOptions
from sklearn_transfer.featurizers.text import TextFeaturizer
from sklearn_transfer.fine_tuning.base import BaseFineTuner
from sklearn_transfer.fine_tuning.documentation import documented
from sklearn_transfer.fine_tuning.outputs import FineTunedClassifier, FineTunedRegressor

INPUT = {
    name: TextFeaturizer._parameter_constraints[name]
    for name in "backbone prompt max_length normalize pooling".split()
} | {"missing": [StrOptions({"error", "empty"})]}


class _OfTexts(BaseFineTuner):
    """X is one column of texts."""

    _common_scale = True

    def _make_featurizer(self) -> TextFeaturizer:
        return TextFeaturizer(
            self.backbone,
            pooling=self.pooling,
            prompt=self.prompt,
            max_length=self.max_length,
            normalize=self.normalize,
            missing=self.missing,
            device=self.device,
            precision=self.precision,
            cache=self.cache,
            verbose=self.verbose,
        )

    @property
    def _normalizes(self) -> bool:
        if self.normalize == "auto":
            return self.pooling == "auto" and self._featurizer._normalizes
        return bool(self.normalize)


@documented("text", "classes")
class TextClassifier(_OfTexts, FineTunedClassifier):
    """A pretrained language model with a new head, fine-tuned to classify.

    Fits and predicts like any scikit-learn classifier, in a Pipeline, a
    cross-validation or a GridSearchCV; ``freeze_depth`` is one more parameter to
    search over, and what frozen stages give is computed once.

    Parameters
    ----------
    backbone : str, default="sentence-transformers/all-MiniLM-L6-v2"
        The model, as for `TextFeaturizer`: a Hugging Face id or a folder, optionally
        "@revision", "@random" or "@path/to/weights.safetensors".
    $PARAMETERS

    Attributes
    ----------
    $ATTRIBUTES

    See Also
    --------
    TextFeaturizer : The frozen model's features, for any estimator.
    ImageClassifier : The same for images.

    Notes
    -----
    X is one column of texts. Frozen stages are always in eval mode, without dropout.
    With ``freeze_depth="all"`` and a linear head from the
    probe nothing is trained by steps: the classifier is the probe.

    References
    ----------
    $REFERENCES

    Examples
    --------
    >>> from sklearn_transfer import TextClassifier
    >>> texts = ["what a joy", "I loved it", "how dull", "I was bored"] * 4
    >>> model = TextClassifier(max_epochs=1, random_state=0)
    >>> model.fit(texts, ["good", "good", "bad", "bad"] * 4).predict(["lovely"])
    array(['good'], dtype='<U4')
    """

    _parameter_constraints: dict = {
        **FineTunedClassifier._parameter_constraints,
        **INPUT,
    }

    def __init__(
        self,
        backbone="sentence-transformers/all-MiniLM-L6-v2",
        *,
        freeze_depth=1,
        head_init="probe",
        head="linear",
        lr=1e-4,
        head_lr=None,
        layer_decay=0.8,
        unfreeze_every=None,
        max_epochs=10,
        batch_size=16,
        optimizer="adamw",
        weight_decay=0.01,
        l2_sp=0.0,
        dropout=0.0,
        label_smoothing=0.0,
        mixup=0.0,
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
        prompt=None,
        max_length=None,
        normalize="auto",
        missing="error",
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
        self.prompt = prompt
        self.max_length = max_length
        self.normalize = normalize
        self.missing = missing
        self.pooling = pooling


@documented("text", "values")
class TextRegressor(_OfTexts, FineTunedRegressor):
    """A pretrained language model with a new head, fine-tuned to predict numbers.

    Fits and predicts like any scikit-learn regressor; see `TextClassifier`.

    Parameters
    ----------
    backbone : str, default="sentence-transformers/all-MiniLM-L6-v2"
        The model, as for `TextFeaturizer`: a Hugging Face id or a folder, optionally
        "@revision", "@random" or "@path/to/weights.safetensors".
    $PARAMETERS

    Attributes
    ----------
    $ATTRIBUTES

    See Also
    --------
    TextClassifier : The same for classes.

    Notes
    -----
    y may have several columns. Targets are standardised inside; what is predicted
    and scored is in y's units, losses are not.

    References
    ----------
    $REFERENCES

    Examples
    --------
    >>> from sklearn_transfer import TextRegressor
    >>> texts = ["one cat", "two cats", "three cats", "four cats"] * 4
    >>> model = TextRegressor(max_epochs=1, random_state=0)
    >>> model.fit(texts, [1, 2, 3, 4] * 4).predict(["two cats"]).shape
    (1,)
    """

    _parameter_constraints: dict = {
        **FineTunedRegressor._parameter_constraints,
        **INPUT,
    }

    def __init__(
        self,
        backbone="sentence-transformers/all-MiniLM-L6-v2",
        *,
        freeze_depth=1,
        head_init="probe",
        head="linear",
        lr=1e-4,
        head_lr=None,
        layer_decay=0.8,
        unfreeze_every=None,
        max_epochs=10,
        batch_size=16,
        optimizer="adamw",
        weight_decay=0.01,
        l2_sp=0.0,
        dropout=0.0,
        mixup=0.0,
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
        prompt=None,
        max_length=None,
        normalize="auto",
        missing="error",
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
        self.prompt = prompt
        self.max_length = max_length
        self.normalize = normalize
        self.missing = missing
        self.pooling = pooling
