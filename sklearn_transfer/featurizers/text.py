"""Texts to features of a frozen network."""

from __future__ import annotations

from numbers import Integral
from typing import cast

import numpy as np

from sklearn_transfer._sklearn import Interval, StrOptions
from sklearn_transfer.backbones.spec import TextRecipe
from sklearn_transfer.exceptions import TruncatedTextWarning, warn_user
from sklearn_transfer.featurizers.base import BaseFeaturizer
from sklearn_transfer.inputs.texts import TextRows, text_rows


class TextFeaturizer(BaseFeaturizer):
    """Turn texts into the features of a frozen pretrained language model.

    Each distinct text is encoded once per session, whatever cross-validation,
    grid search or cloning asks for; ``fit`` learns nothing from X.

    Parameters
    ----------
    backbone : str, default="sentence-transformers/all-MiniLM-L6-v2"
        A Hugging Face id or the folder of a model (sentence-transformers or
        transformers), optionally "@revision", "@random" (untrained: the honest
        baseline) or "@path/to/weights.safetensors". The default comes from the
        ``offline`` extra's package where that is installed.
    layers : "last", "all", str, int or list of these, default="last"
        Stages whose features are returned side by side: names (see
        ``stage_names_``) or numbers from 1, negative from the end. A search
        over ``layers`` encodes each text once.
    pooling : {"auto", "avg", "max", "cls", "last"}, default="auto"
        How a stage's tokens become a vector. "auto" gives the model's own
        sentence vector for the last stage and the mean over tokens for the
        others.
    prompt : str or None, default=None
        Put before every text. None is the model's own default prompt, if any.
    max_length : int or None, default=None
        Tokens a text may have, special ones included; the rest is cut, which
        one warning counts. None is the model's own limit.
    normalize : "auto" or bool, default="auto"
        Whether each stage's vector is scaled to length one. "auto" does what
        the model itself does, to its last vector.
    missing : {"error", "empty", "nan"}, default="error"
        For None, NaN and NA: an error that names the rows, the empty text, or a
        row of NaN. The empty string is a text.
    batch_size : "auto" or int, default="auto"
        Texts a forward pass. "auto" counts tokens instead.
    device : str, default="auto"
        "auto" (cuda, mps, cpu, the first there is), "cpu", "cuda", "cuda:1".
    precision : {"auto", "float32", "bfloat16"}, default="auto"
        "auto" is bfloat16 where the hardware multiplies it natively.
    cache : "session", path or None, default="session"
        Where features are kept: for this process and its workers, in a folder
        for good, or not at all.
    verbose : int, default=0
        Above 0, a progress bar on stderr.

    Attributes
    ----------
    stage_names_ : list of str
        The backbone's stages, in order.
    n_stages_ : int
        Their number.
    device_ : str
        Where ``fit`` found the network would run.
    precision_ : str
        In which precision.
    n_features_in_ : int
        Number of columns of X, where X has columns.
    feature_names_in_ : ndarray of str
        Their names, where X is a DataFrame.

    See Also
    --------
    ImageFeaturizer : The same for images.

    References
    ----------
    Reimers and Gurevych, "Sentence-BERT", 2019, arXiv:1908.10084: the family of
    the default backbone.

    Examples
    --------
    >>> from sklearn_transfer import TextFeaturizer
    >>> texts = ["a cat on a mat", "a kitten on a rug", "quarterly earnings"]
    >>> vectors = TextFeaturizer().fit_transform(texts)
    >>> vectors.shape
    (3, 384)
    >>> bool(vectors[0] @ vectors[1] > vectors[0] @ vectors[2])
    True
    """

    _parameter_constraints: dict = {
        **BaseFeaturizer._parameter_constraints,
        "backbone": [str],
        "pooling": [StrOptions({"auto", "avg", "max", "cls", "last"})],
        "prompt": [str, None],
        "max_length": [Interval(Integral, 1, None, closed="left"), None],
        "normalize": [StrOptions({"auto"}), "boolean"],
        "missing": [StrOptions({"error", "empty", "nan"})],
    }

    def __init__(
        self,
        backbone="sentence-transformers/all-MiniLM-L6-v2",
        *,
        layers="last",
        pooling="auto",
        prompt=None,
        max_length=None,
        normalize="auto",
        missing="error",
        batch_size="auto",
        device="auto",
        precision="auto",
        cache="session",
        verbose=0,
    ):
        self.backbone = backbone
        self.layers = layers
        self.pooling = pooling
        self.prompt = prompt
        self.max_length = max_length
        self.normalize = normalize
        self.missing = missing
        self.batch_size = batch_size
        self.device = device
        self.precision = precision
        self.cache = cache
        self.verbose = verbose

    def _rows(self, X) -> TextRows:
        return text_rows(X, missing=self.missing, reader=self._spoken_for)

    def _load_backbone(self):
        from sklearn_transfer.backbones.registry import load_text_backbone

        return load_text_backbone(self.backbone, self.max_length, self.prompt)

    def _describe(self, backbone) -> None:
        super()._describe(backbone)
        self._normalizes = backbone.normalize

    def _digests(self, rows: TextRows):
        digests = [
            None if missing else rows.digest(i)
            for i, missing in enumerate(rows.missing.tolist())
        ]
        return digests, {}

    def _open_batches(self, rows: TextRows, digests, runner):
        from sklearn_transfer.running.batches import TextBatches

        size = None if self.batch_size == "auto" else self.batch_size
        return TextBatches(rows.texts, runner.net, size, runner.batch_tokens())

    def _finish(self, features, rows, bad, batches) -> np.ndarray:
        if batches is not None and batches.n_truncated:
            # Those found in the cache were counted when they were encoded.
            recipe = cast(TextRecipe, self._request.recipe)
            warn_user(
                f"{batches.n_truncated} of the {len(batches.ids)} distinct texts "
                "encoded now are longer than "
                f"{recipe.max_length} tokens and were cut. Write "
                f"{self._name}(max_length=...) if the model reads more.",
                TruncatedTextWarning,
            )
        return self._normalized(features)

    def _normalized(self, features: np.ndarray) -> np.ndarray:
        """Each wanted stage's vector at length one, where asked for."""
        request, start = self._request, 0
        for stage in self._wanted:
            width = request.widths[request.stages.index(stage)]
            block = features[:, start : start + width]  # a view
            is_own = stage == self.n_stages_ and request.pooling == "auto"
            auto = self.normalize == "auto"
            if (self._normalizes and is_own) if auto else self.normalize:
                block /= np.linalg.norm(block, axis=1, keepdims=True).clip(1e-12)
            start += width
        return features
