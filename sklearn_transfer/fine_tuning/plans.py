"""An estimator's parameters as the plain values that training takes."""

from __future__ import annotations


def recipe_of(estimator):
    """The `Recipe` that the parameters name."""
    from sklearn_transfer.training.recipe import Recipe

    head_lr = estimator.head_lr
    if head_lr is None:
        # A random head has everything to learn, the probe next to nothing.
        is_probe = estimator.head_init == "probe"
        head_lr = estimator.lr if is_probe else 10 * estimator.lr
    return Recipe(
        lr=estimator.lr,
        head_lr=head_lr,
        layer_decay=estimator.layer_decay,
        unfreeze_every=estimator.unfreeze_every,
        optimizer=estimator.optimizer,
        weight_decay=estimator.weight_decay,
        l2_sp=estimator.l2_sp,
        mixup=estimator.mixup,
        warmup=estimator.warmup,
        schedule=estimator.schedule,
        clip_norm=estimator.clip_norm,
        ema=estimator.ema,
    )


def shape_of(estimator) -> dict:
    """Arguments of the `Shape` of a fitted estimator's network.

    A dict, because it is pickled, and unpickling a `Shape` would import torch.
    """
    return {
        "k": estimator.n_frozen_stages_,
        "n_stages": estimator.n_stages_,
        "n_features": estimator._n_features_out,
        "n_outputs": estimator._target.n_outputs,
        "pooling": estimator.pooling,
        "normalize": estimator._normalizes,
        "head": estimator.head,
        "dropout": estimator.dropout,
        "lora_rank": estimator.lora_rank,
        "fixed_norms": getattr(estimator, "batch_norm", "fixed") == "fixed",
    }
