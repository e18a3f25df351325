"""The parameters that all fine-tuning estimators share, and their ranges."""

from __future__ import annotations

import os
from numbers import Integral, Real

from sklearn_transfer._sklearn import Interval, InvalidParameterError, StrOptions
from sklearn_transfer.backbones.spec import POOLINGS


def number(low, high=None, closed="left"):
    """A real number from ``low`` to ``high``."""
    return Interval(Real, low, high, closed=closed)


def whole(low):
    """A whole number from ``low``."""
    return Interval(Integral, low, None, closed="left")


PARAMETERS: dict = {
    "freeze_depth": [Integral, str],
    "head_init": [StrOptions({"probe", "random"})],
    "head": [StrOptions({"linear", "mlp"}), whole(1)],
    "lr": [number(0, closed="neither")],
    "head_lr": [number(0, closed="neither"), None],
    "layer_decay": [number(0, 1, "right")],
    "unfreeze_every": [whole(1), None],
    "max_epochs": [whole(1)],
    "batch_size": [whole(1)],
    "optimizer": [StrOptions({"adamw", "sgd"})],
    "weight_decay": [number(0)],
    "l2_sp": [number(0)],
    "dropout": [number(0, 1)],
    "mixup": [number(0)],
    "warmup": [number(0, 1)],
    "schedule": [StrOptions({"constant", "linear", "cosine"})],
    "clip_norm": [number(0, closed="neither"), None],
    "ema": [number(0, 1)],
    "lora_rank": [whole(0)],
    "early_stopping": [StrOptions({"auto"}), "boolean"],
    "scoring": [str, callable, None],
    "validation_fraction": [number(0, 1, "neither")],
    "n_iter_no_change": [whole(1)],
    "warm_start": ["boolean"],
    "callbacks": [list, tuple, None],
    "prefix_bytes": [StrOptions({"auto"}), whole(0)],
    "random_state": ["random_state"],
    "pooling": [StrOptions(set(POOLINGS))],
    "device": [str],
    "precision": [StrOptions({"auto", "float32", "bfloat16"})],
    "cache": [str, os.PathLike, None],
    "verbose": ["verbose"],
}


def check_callbacks(callbacks, name: str) -> None:
    """Refuse what skorch would stumble over in the middle of a fit.

    It takes a callback, a class of callbacks, or either after a name.
    """
    if not callbacks:
        return
    from skorch.callbacks import Callback

    for given in callbacks:
        callback = given[-1] if isinstance(given, tuple) and given else given
        of = callback if isinstance(callback, type) else type(callback)
        if not issubclass(of, Callback):
            raise InvalidParameterError(
                f"callbacks holds {given!r}, which is no skorch callback. Write "
                f"{name}(callbacks=[...]) with those of skorch.callbacks; "
                "scikit-learn's own go to set_callbacks(...)."
            )
