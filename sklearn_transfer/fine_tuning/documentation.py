"""What the docstrings of the fine-tuning estimators share, written once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from textwrap import indent

RECIPE = """\
freeze_depth : int or str, default={freeze_depth}
    Stages that stay as they were pretrained: the first so many; negative, all but
    the last so many; a stage's name, up to and including it (see
    ``stage_names_``); "all", every one. What frozen stages give is computed once
    a row and shared by epochs, folds and candidates.
head_init : {{"probe", "random"}}, default="probe"
    What the head starts from: a regularised linear model on the frozen features,
    its strength chosen by a small inner cross-validation (Kumar et al., 2022), or
    random numbers.
head : {{"linear", "mlp"}} or int, default="linear"
    "mlp" adds a hidden layer of 256 beside the linear map, a number one that wide.
lr : float, default={lr}
    Learning rate of the last stage.
head_lr : float or None, default={head_lr}
    Learning rate of the head. None is ``lr`` after the probe, and ten times that
    for a random head.
layer_decay : float, default={layer_decay}
    Each stage learns at so many times the rate of the stage after it. 1 is off.
unfreeze_every : int or None, default=None
    Start with the head alone and unfreeze one more stage, from the last, every so
    many epochs, down to ``freeze_depth``. None unfreezes all at once.
max_epochs : int, default={max_epochs}
    Passes over the training rows.
batch_size : int, default={batch_size}
    Rows a training step.
optimizer : {{"adamw", "sgd"}}, default="adamw"
    Loshchilov and Hutter, 2017, or steps with a momentum of 0.9.
weight_decay : float, default={weight_decay}
    Decoupled under "adamw". Never on norms and biases. 0 is off.
l2_sp : float, default=0.0
    Strength of a pull towards the pretrained weights (Li et al., 2018). 0 is off.
dropout : float, default=0.0
    Share of the head's inputs dropped in training. 0 is off.
{label_smoothing}\
mixup : float, default=0.0
    Rows are mixed in pairs, by shares drawn from Beta(mixup, mixup), after the
    frozen stages (Zhang et al., 2018). 0 is off.
{augment}\
warmup : float, default={warmup}
    Share of the steps over which learning rates rise from 0. 0 is off.
schedule : {{"constant", "linear", "cosine"}}, default={schedule}
    How learning rates fall to 0 after that; "cosine" as in Loshchilov and Hutter,
    2016. "constant" is off.
clip_norm : float or None, default={clip_norm}
    Longest gradient; a longer one is shortened. None is off.
ema : float, default=0.0
    Decay of an average of the weights (Polyak and Juditsky, 1992), which then
    predicts. 0 is off.
lora_rank : int, default=0
    Rank of adapters on the attention of the stages that are not frozen; they and
    the head are then all that is trained (Hu et al., 2021). 0 is off.
{target}\
early_stopping : "auto" or bool, default="auto"
    Whether to split rows off, stop when they get no better, and keep the best
    weights. "auto" does so where two rows of each class are left on either side.
scoring : str, callable or None, default=None
    Which score of those rows decides; any of scikit-learn's. None is the loss.
validation_fraction : float, default=0.1
    Share of the rows to split off.
n_iter_no_change : int, default={n_iter_no_change}
    Epochs without a better value after which to stop.
warm_start : bool, default=False
    Whether ``fit`` goes on from the weights of the last ``fit``.
callbacks : list of skorch callbacks or None, default=None
    Put into ``net_``. scikit-learn's own are set by ``set_callbacks``.
prefix_bytes : "auto" or int, default="auto"
    Bytes that one fit may keep of what frozen stages give; beyond, it is computed
    again in every epoch. "auto" is half of the cache's budget, or what the
    environment variable SKLEARN_TRANSFER_PREFIX_BYTES says.
random_state : int, RandomState or None, default=None
    Seed of the head, the order of rows, dropout, mixing and the inner split.
device : str, default="auto"
    "auto" (cuda, mps, cpu, the first there is), "cpu", "cuda", "cuda:1".
precision : {{"auto", "float32", "bfloat16"}}, default="auto"
    "auto" is bfloat16 where the hardware multiplies it natively. Weights and the
    head are float32 in any case.
cache : "session", path or None, default="session"
    Where features and activations are kept: for this process and its workers, in
    a folder for good, or no longer than a fit.
verbose : int, default=0
    Above 0, a line an epoch, and a progress bar while rows are encoded.
"""

LABEL_SMOOTHING = """\
label_smoothing : float, default={label_smoothing}
    Share of each label spread over all classes in training (Szegedy et al., 2015,
    arXiv:1512.00567). 0 is off.
"""

CLASS_WEIGHT = """\
class_weight : dict, "balanced" or None, default=None
    Weight of each class, times ``sample_weight``; "balanced" is inverse to their
    frequency among the rows trained on. For several labels a row, a list of dicts.
"""

LOSS = """\
loss : {{"squared_error", "absolute_error", "huber"}}, default="squared_error"
    Of targets in units of their standard deviation, in which "huber" turns from
    squared to absolute at 1.
"""

AUGMENT = """\
augment : {{"none", "flip", "standard"}} or torchvision v2 transform, default="none"
    Random views of the training images: mirrored, or also cropped and resized. A
    transform takes and gives uint8 tensors (3, height, width). Where nothing is
    trained by steps it has nothing to do.
n_views : int, default=0
    Fixed views made of each training image, the frozen part of which is stored;
    epochs take turns among them. 0 makes new ones in every epoch.
batch_norm : {{"fixed", "train"}}, default="fixed"
    Whether BatchNorm layers of trained stages keep their pretrained statistics,
    which suits few rows, or take those of each batch. Their scale and shift learn
    in any case. An untrained ("@random") backbone needs "train".
"""

IMAGE_INPUT = """\
image_size : int, (int, int) or None, default=None
    The short side is resized to this many pixels and the centre cut out; never
    squashed. A pair is (height, width). None is the recipe that the weights were
    made with.
image_shape : tuple of int or None, default=None
    (height, width) or (height, width, channels) of X's rows where X is a 2-D table
    of pixels, as scikit-learn's digits and faces are.
value_range : (float, float) or None, default=None
    What is black and white in numeric arrays. None: integers by their dtype,
    floats in [0, 1].
decode : {{"auto", "exact"}}, default="auto"
    "auto" decodes JPEG files that are at least 4 times too large at a lower
    resolution (never below twice the target); "exact" does not.
pooling : {{"auto", "avg", "max", "cls", "flatten"}}, default="auto"
    How the last stage's map becomes the vector that enters the head. "auto" is
    the network's own way.
"""

TEXT_INPUT = """\
prompt : str or None, default=None
    Put before every text. None is the model's own default prompt, if any.
max_length : int or None, default=None
    Tokens a text may have, special ones included; the rest is cut. None is the
    model's own limit.
normalize : "auto" or bool, default="auto"
    Whether the vector that enters the head has length one. "auto" does what the
    model itself does.
missing : {{"error", "empty"}}, default="error"
    For None, NaN and NA: an error that names the rows, or the empty text.
pooling : {{"auto", "avg", "max", "cls", "last"}}, default="auto"
    How tokens become the vector. "auto" is the model's own way.
"""

ATTRIBUTES = """\
net_ : skorch.NeuralNet
    The trained stages and the head. It takes activations of the last frozen stage,
    not rows of X. After unpickling it is built when first asked for.
{classes}\
history_ : list of dict
    One an epoch, for ``pandas.DataFrame``: epoch, train_loss, valid_loss,
    valid_score, lr, head_lr, frozen_stages, recomputed_rows, seconds.
n_iter_ : int
    Epochs that were run; 0 where the head is the probe.
best_epoch_ : int
    The epoch whose weights were kept; 0 is the start.
stage_names_ : list of str
    The backbone's stages, in order.
n_stages_, n_frozen_stages_ : int
    Their number, and how many of them were frozen.
device_, precision_ : str
    Where and in which precision the network ran.
n_features_in_ : int
    Number of columns of X, where X has columns.
feature_names_in_ : ndarray of str
    Their names, where X is a DataFrame.
"""

CLASSES = """\
classes_ : ndarray of shape (n_classes,)
    The labels. Of several labels a row, the numbers of y's columns.
"""

REFERENCES = """\
Kumar et al., "Fine-Tuning can Distort Pretrained Features", 2022,
arXiv:2202.10054: the probe first. Howard and Ruder, "ULMFiT", 2018,
arXiv:1801.06146: rates by layer and gradual unfreezing. Li et al., 2018,
arXiv:1802.01483: L2-SP. Zhang et al., 2018, arXiv:1710.09412: mixup. Hu et al.,
2021, arXiv:2106.09685: LoRA. Loshchilov and Hutter, 2017, arXiv:1711.05101: AdamW,
and 2016, arXiv:1608.03983: the cosine. Polyak and Juditsky, "Acceleration of
Stochastic Approximation by Averaging", 1992.
"""


def documented(modality: str, target: str) -> Callable[[type], type]:
    """Fill ``$PARAMETERS``, ``$ATTRIBUTES`` and ``$REFERENCES`` in a docstring.

    Parameters
    ----------
    modality : {"image", "text"}
    target : {"classes", "values"}
    """
    is_image, is_classifier = modality == "image", target == "classes"

    def fill(cls: type) -> type:
        signature = inspect.signature(cls).parameters
        defaults = {name: _shown(p.default) for name, p in signature.items()}
        recipe = RECIPE.format(
            **defaults
            | {
                "label_smoothing": LABEL_SMOOTHING.format(**defaults)
                if is_classifier
                else "",
                "augment": AUGMENT.format() if is_image else "",
                "target": CLASS_WEIGHT if is_classifier else LOSS.format(),
            }
        )
        inputs = (IMAGE_INPUT if is_image else TEXT_INPUT).format()
        texts = {
            "$PARAMETERS": recipe + inputs,
            "$ATTRIBUTES": ATTRIBUTES.format(classes=CLASSES if is_classifier else ""),
            "$REFERENCES": REFERENCES,
        }
        doc = cls.__doc__ or ""  # None under python -OO
        for name, text in texts.items():
            doc = doc.replace(f"    {name}\n", indent(text, "    "))
        cls.__doc__ = doc
        return cls

    return fill


def _shown(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)
