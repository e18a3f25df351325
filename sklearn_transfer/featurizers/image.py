"""Images to features of a frozen network."""

from __future__ import annotations

import itertools
import threading
from numbers import Integral

import numpy as np

from sklearn_transfer._sklearn import Interval, InvalidParameterError, StrOptions
from sklearn_transfer._threads import Threads
from sklearn_transfer.exceptions import (
    ImageSizeWarning,
    UnreadableRowsError,
    UnreadableRowsWarning,
    warn_user,
)
from sklearn_transfer.featurizers.base import BaseFeaturizer
from sklearn_transfer.inputs.images import ImageRows, UnreadableRow, image_rows

# Reading and hashing files waits for the disk and releases the GIL. Known files
# cost a few microseconds each, so that a task a row would cost more than it does.
READERS = 8
READ_TOGETHER = 64
# Rows whose size is looked at before advising another backbone.
LOOKED_AT = 25
# Bad rows that an error describes one by one.
LISTED = 20
_advised = threading.Event()


class ImageFeaturizer(BaseFeaturizer):
    """Turn images into the features of a frozen pretrained network.

    Each distinct image is encoded once per session, whatever cross-validation,
    grid search or cloning asks for; ``fit`` learns nothing from X.

    Parameters
    ----------
    backbone : str or ModuleBackbone, default="embedded"
        The network, ``[source:]name[@weights]``: "embedded" (ships with the
        package, made for small pictures), a torchvision name such as
        "resnet50" or "vit_b_16", "timm:name", each optionally with
        "@random" (untrained: the honest baseline), "@IMAGENET1K_V2" (an enum
        name) or "@path/to/weights.safetensors". `list_backbones` names them.
        For your own ``nn.Module`` see `backbone_from_module`.
    layers : "last", "all", str, int or list of these, default="last"
        Stages whose features are returned side by side: names (see
        ``stage_names_``) or numbers from 1, negative from the end. A search
        over ``layers`` encodes each image once.
    pooling : {"auto", "avg", "max", "cls", "flatten"}, default="auto"
        How a stage's map becomes a vector. "auto" gives the network's own
        vector (the input of its last Linear) for the last stage and the mean
        over space for the others.
    image_size : int, (int, int) or None, default=None
        The short side is resized to this many pixels and the centre cut out;
        never squashed. A pair is (height, width). None is the recipe that the
        weights were made with.
    image_shape : tuple of int or None, default=None
        (height, width) or (height, width, channels) of X's rows where X is a
        2-D table of pixels, as scikit-learn's digits and faces are.
    value_range : (float, float) or None, default=None
        What is black and white in numeric arrays. None: integers by their
        dtype, floats in [0, 1].
    decode : {"auto", "exact"}, default="auto"
        "auto" decodes JPEG files that are at least 4 times too large at a lower
        resolution (never below twice the target); "exact" does not.
    batch_size : "auto" or int, default="auto"
        Images a forward pass. "auto" depends on backbone, size and device;
        out-of-memory halves it.
    device : str, default="auto"
        "auto" (cuda, mps, cpu, the first there is), "cpu", "cuda", "cuda:1".
    precision : {"auto", "float32", "bfloat16"}, default="auto"
        "auto" is bfloat16 where the hardware multiplies it natively.
    cache : "session", path or None, default="session"
        Where features are kept: for this process and its workers, in a folder
        for good, or not at all.
    on_error : {"raise", "nan"}, default="raise"
        For images that cannot be read: one error that names them all, or NaN
        rows and one warning.
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
    TextFeaturizer : The same for texts.
    load_image_folder : Paths and labels of a folder of class folders.

    Notes
    -----
    X is one column of images: a list, tuple, array, Series or one-column
    DataFrame of paths, ``bytes``, PIL images or arrays (h, w), (h, w, c) or
    (c, h, w); a stacked array (n, h, w[, c]) or (n, c, h, w); or 2-D numeric
    rows with ``image_shape``.

    References
    ----------
    Razavian et al., "CNN Features off-the-shelf", 2014, arXiv:1403.6382: features
    of a frozen network for any estimator. He et al., 2015, arXiv:1512.03385:
    ResNet. Dosovitskiy et al., 2020, arXiv:2010.11929: ViT.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn_transfer import ImageFeaturizer
    >>> X, y = load_digits(return_X_y=True)
    >>> model = make_pipeline(
    ...     ImageFeaturizer(image_shape=(8, 8), value_range=(0, 16)),
    ...     LogisticRegression(max_iter=1000),
    ... )
    >>> model.fit(X[:100], y[:100]).predict(X[:3])
    array([0, 1, 2])
    """

    _parameter_constraints: dict = {
        **BaseFeaturizer._parameter_constraints,
        "backbone": "no_validation",  # _load_backbone says more than a type
        "pooling": [StrOptions({"auto", "avg", "max", "cls", "flatten"})],
        "image_size": [Interval(Integral, 1, None, closed="left"), tuple, list, None],
        "image_shape": [tuple, list, None],
        "value_range": [tuple, list, None],
        "decode": [StrOptions({"auto", "exact"})],
        "on_error": [StrOptions({"raise", "nan"})],
    }

    def __init__(
        self,
        backbone="embedded",
        *,
        layers="last",
        pooling="auto",
        image_size=None,
        image_shape=None,
        value_range=None,
        decode="auto",
        batch_size="auto",
        device="auto",
        precision="auto",
        cache="session",
        on_error="raise",
        verbose=0,
    ):
        self.backbone = backbone
        self.layers = layers
        self.pooling = pooling
        self.image_size = image_size
        self.image_shape = image_shape
        self.value_range = value_range
        self.decode = decode
        self.batch_size = batch_size
        self.device = device
        self.precision = precision
        self.cache = cache
        self.on_error = on_error
        self.verbose = verbose

    def _rows(self, X) -> ImageRows:
        return image_rows(
            X,
            image_shape=self.image_shape,
            value_range=self.value_range,
            decode=self.decode,
            reader=self._spoken_for,
        )

    def _load_backbone(self):
        from sklearn_transfer.backbones.registry import load_image_backbone

        self._check_backbone_and_size()
        size = self.image_size
        size = tuple(size) if isinstance(size, (tuple, list)) else size
        return load_image_backbone(self.backbone, size)

    def _check_backbone_and_size(self) -> None:
        is_spec = hasattr(self.backbone, "fingerprint")  # of backbone_from_module
        if not isinstance(self.backbone, str) and not is_spec:
            is_module = hasattr(self.backbone, "forward")
            given = "net" if is_module else "your_module"
            raise InvalidParameterError(
                f"backbone is a {type(self.backbone).__name__}, and a string or the "
                "result of backbone_from_module is needed. Write "
                f"{self._name}(backbone_from_module({given}, image_size=224)) or "
                f"{self._name}('resnet18')."
            )
        if isinstance(self.image_size, bool):
            raise InvalidParameterError(
                f"image_size={self.image_size!r} is not a number of pixels. Write "
                "image_size=224, a pair (height, width), or None."
            )

    def _digests(self, rows: ImageRows):
        bad: dict[int, str] = {}

        def digest(row: int) -> bytes | None:
            try:
                return rows.digest(row)
            except UnreadableRow as error:
                bad[row] = str(error)
                return None

        def digest_group(start: int) -> list[bytes | None]:
            stop = min(start + READ_TOGETHER, len(rows))
            return [digest(row) for row in range(start, stop)]

        starts = range(0, len(rows), READ_TOGETHER)
        with Threads(READERS) as pool:
            digests = list(itertools.chain(*pool.map(digest_group, starts)))
        return digests, bad

    def _refuse(self, rows: ImageRows, bad: dict[int, str]) -> None:
        if bad and self.on_error == "raise":
            self._raise_bad_rows(rows, bad)

    def _open_batches(self, rows: ImageRows, digests, runner):
        from sklearn_transfer.running.batches import ImageBatches

        size = runner.batch_size() if self.batch_size == "auto" else self.batch_size
        return ImageBatches(rows, digests, runner.net.recipe, size)

    def _finish(self, features, rows, bad, batches) -> np.ndarray:
        if not bad:
            return features
        self._refuse(rows, bad)
        warn_user(
            f"{len(bad)} of {len(rows)} images could not be read and are rows of NaN: "
            f"{_listed(bad, rows)}",
            UnreadableRowsWarning,
        )
        return features

    def _raise_bad_rows(self, rows: ImageRows, bad: dict[int, str]) -> None:
        remedy = "Drop or mend these rows"
        if self._spoken_for is None:
            remedy += (
                ", or write ImageFeaturizer(on_error='nan') to get rows of NaN for them"
            )
        raise UnreadableRowsError(
            f"{len(bad)} of {len(rows)} images cannot be read: {_listed(bad, rows)}\n"
            f"{remedy}.",
            bad,
        )

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    def _look_at(self, rows: ImageRows) -> None:
        """Say once a process that the embedded network is made for less."""
        is_embedded = isinstance(self.backbone, str) and self.backbone == "embedded"
        if not is_embedded or self.image_size is not None or _advised.is_set():
            return
        from sklearn_transfer.backbones.embedded import PIXELS
        from sklearn_transfer.backbones.torchvision_names import TORCHVISION_WEIGHTS

        median = _median_short_side(rows)
        if median <= 4 * PIXELS:
            return
        _advised.set()
        megabytes = TORCHVISION_WEIGHTS["resnet50"][1]
        warn_user(
            f"The median image is {median:.0f} pixels on its short side, and the "
            f"embedded network looks at {PIXELS}. For photographs of this size write "
            f'{self._name}("resnet50") (downloads {megabytes} MB once).',
            ImageSizeWarning,
        )


def _median_short_side(rows: ImageRows) -> float:
    """Median short side, in pixels, of rows spread over X; 0 if none is readable."""
    spread = np.linspace(0, len(rows) - 1, min(len(rows), LOOKED_AT)).astype(int)
    sides = []
    for row in spread.tolist():
        try:
            sides.append(min(rows.size(row)))
        except UnreadableRow:
            continue  # transform names it, with every other bad row
    return float(np.median(sides)) if sides else 0.0


def _listed(bad: dict[int, str], rows: ImageRows) -> str:
    """A line a bad row; beyond the first twenty the positions alone."""
    found = sorted(bad)
    lines = [f"\n  {rows.name(row)}: {bad[row]}" for row in found[:LISTED]]
    if len(found) > LISTED:
        lines.append(f"\n  and rows {_spans(found[LISTED:])}")
    return "".join(lines)


def _spans(numbers: list[int]) -> str:
    """Sorted numbers with runs drawn together: "3, 5-9"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
