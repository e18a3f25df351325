"""The skorch net inside the fine-tuning estimators."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from skorch.callbacks import Callback, PassthroughScoring
from skorch.dataset import unpack_data
from torch import Tensor

from sklearn_transfer._memory import give_memory_back, memory_kept
from sklearn_transfer.running.memory import ShrinkingBatches
from sklearn_transfer.training.examples import Examples, Minibatches, weighted_mean
from sklearn_transfer.training.network import TunedNetwork, on_device
from sklearn_transfer.training.recipe import (
    Average,
    Losses,
    Pull,
    Recipe,
    make_optimizer,
    parameter_groups,
)
from sklearn_transfer.training.steps import StepsInParts


class TunedNet(StepsInParts):
    """A skorch net over the trained tail and head.

    Its data are `Examples`: activations at the boundary, with targets and weights.

    Parameters
    ----------
    module : TunedNetwork
    criterion : Losses
        Gives one loss a row; the net takes their weighted mean.
    recipe : Recipe
    precision : {"float32", "bfloat16"}
        bfloat16 runs the stages under autocast; weights and the head are float32.
    generator : torch.Generator
        Draws the batches and what is mixed.
    **kwargs
        As for ``skorch.NeuralNet``.
    """

    epoch_: int
    steps_planned_: int | None
    check_: ShrinkingBatches[Tensor]
    seen_: list[Tensor]

    def __init__(
        self,
        module: TunedNetwork,
        criterion: Losses,
        *,
        recipe: Recipe,
        precision: str = "float32",
        generator: torch.Generator | None = None,
        **kwargs,
    ):
        self.recipe = recipe
        self.precision = precision
        self.generator = generator
        given: dict[str, Any]
        given = {"iterator_train": Minibatches, "iterator_valid": Minibatches}
        given |= {"train_split": None, "verbose": 0, **kwargs}
        super().__init__(module, criterion, **given)

    # --- what skorch asks for ------------------------------------------------

    @property
    def _default_callbacks(self):
        return [
            ("train_loss", PassthroughScoring("train_loss", on_train=True)),
            ("valid_loss", PassthroughScoring("valid_loss")),
        ]

    def initialize_module(self):
        # The estimator's own network, not a copy that skorch would build.
        self.module_ = self.module
        return self

    def initialize_criterion(self):
        self.criterion_ = self.criterion
        return self

    def initialize_optimizer(self, triggered_directly=None):
        module, recipe = self.module_, self.recipe
        groups = parameter_groups(module.trained_stages, module.head, recipe)
        self.optimizer_ = make_optimizer(groups, recipe, torch.device(self.device))
        trained = [p for stage in module.trained_stages for p in stage.parameters()]
        self.pull_ = Pull(trained, recipe.l2_sp)
        self.average_ = Average(module.parameters(), recipe.ema)
        self.steps_done_, self.steps_planned_ = 0, None
        self.epochs_before_ = 0
        self.micro_batch_ = None  # rows at once; None is a whole batch
        return self

    def get_iterator(self, dataset, training=False):
        if not isinstance(dataset, Examples):
            return super().get_iterator(dataset, training)
        size = self.batch_size if training else max(self.batch_size, 64)
        return Minibatches(dataset, size, self.generator if training else None)

    def infer(self, x, others=None, share: float = 1.0, **fit_params) -> Tensor:
        device = torch.device(self.device)
        with self.computing():
            return self.module_(on_device(x, device), others, share)

    def get_loss(self, y_pred, y_true, X=None, training=False) -> Tensor:
        targets, weights = (t.to(y_pred.device) for t in y_true)
        return weighted_mean(self.criterion_(y_pred, targets), weights)

    # --- a fit -----------------------------------------------------------------

    def partial_fit(self, X, y=None, classes=None, **fit_params):
        """Train for ``max_epochs`` on `Examples`; an interrupt is not swallowed."""
        return self.tune(X, None, self.max_epochs)

    def tune(
        self,
        examples: Examples,
        valid: Examples | None,
        epochs: int,
        *,
        before_epoch: Callable[[int], None] | None = None,
        after_epoch: Callable[[int], bool] | None = None,
    ) -> TunedNet:
        """Train for some epochs, numbered from 1.

        Parameters
        ----------
        examples, valid : Examples
        epochs : int
        before_epoch : callable, default=None
            Called with the epoch's number.
        after_epoch : callable, default=None
            Called likewise, with the averaged weights in place where ``ema`` is
            on; training ends where it gives True.
        """
        if not self.initialized_:
            self.initialize()
        self.examples_ = examples
        batches = self.get_iterator(examples, training=True)
        checks = None if valid is None else self.get_iterator(valid)
        self.steps_done_, self.steps_planned_ = 0, epochs * len(batches)
        self.check_ = ShrinkingBatches(self.infer)
        if self.average_.is_in_place:  # left there by the call before
            self.average_.swap()
        data = {"dataset_train": examples, "dataset_valid": valid}
        self.notify("on_train_begin", X=examples, y=None)
        with memory_kept():
            for epoch in range(1, epochs + 1):
                examples.set_epoch(self.epochs_before_ + epoch - 1)
                if before_epoch is not None:
                    before_epoch(epoch)
                if self._run_epoch(epoch, batches, checks, data, after_epoch):
                    break
        if self.recipe.ema:
            self.average_.swap()
        self.epochs_before_ += epoch
        self.examples_ = None  # its files need not stay open
        self.notify("on_train_end", X=examples, y=None)
        return self

    def _run_epoch(self, epoch: int, batches, checks, data: dict, after_epoch) -> bool:
        """Train, and look at the validation rows; gives whether to stop."""
        self.epoch_, started = epoch, time.perf_counter()
        self.notify("on_epoch_begin", **data)
        self.run_single_epoch(batches, True, "train", self.train_step)
        self._check_weights()
        with self.average_.in_place() if self.recipe.ema else nullcontext():
            if checks is not None:
                self.seen_ = []
                self.run_single_epoch(checks, False, "valid", self.validation_step)
                self.valid_outputs_ = _in_order(self.seen_, checks.parts())
            self.history.record("seconds", time.perf_counter() - started)
            wants_to_stop = self._notify_epoch_end(data)
            if after_epoch is not None and after_epoch(epoch):
                wants_to_stop = True
        return wants_to_stop

    def forget(self) -> None:
        """Free what only further training needs: twice the weights, with AdamW."""
        self.optimizer_.state.clear()
        self.optimizer_.zero_grad()
        self.average_.restart()
        # joblib ends workers that have grown by 300 MB, which freed activations are.
        give_memory_back()

    @torch.no_grad()
    def validation_step(self, batch, **fit_params) -> dict:
        self._set_training(False)
        h, y = unpack_data(batch)
        outputs = self.check_(h)
        self.seen_.append(outputs.cpu())
        return {"loss": self.get_loss(outputs, y), "y_pred": outputs}

    def loss_of(self, outputs: Tensor, examples: Examples) -> float:
        """Weighted mean loss of outputs, over all rows at once."""
        self.criterion_.eval()
        losses = self.criterion_(outputs, examples.targets)
        return weighted_mean(losses, examples.weights).item()

    def _notify_epoch_end(self, data: dict) -> bool:
        """Tell the callbacks; gives whether one of them asks to stop.

        skorch's EarlyStopping asks by raising KeyboardInterrupt, which must not be
        taken for the user's.
        """
        try:
            self.notify("on_epoch_end", **data)
        except KeyboardInterrupt as interrupt:
            if not _raised_by_callback(interrupt):
                raise
            return True
        return False

    def outputs(self, examples: Examples) -> Tensor:
        """Outputs (n, m) on the CPU, in the order of the examples."""
        return self._of_all(examples, self.module_)

    def vectors(self, examples: Examples) -> Tensor:
        """Vectors (n, d) on the CPU that enter the head, likewise."""
        return self._of_all(examples, self.module_.vector)

    @torch.no_grad()
    def outputs_of(self, vectors: np.ndarray) -> np.ndarray:
        """What the head makes of vectors (n, d), (n, m) float64."""
        # A product of float32 matrices is rounded otherwise in another batch, and a
        # head is a small part of the work. In parts: float64 copies of all vectors
        # are not wanted at once.
        head = deepcopy(self.module_.head).cpu().double().eval()
        parts = torch.from_numpy(vectors).split(1024)
        return torch.cat([head(part) for part in parts]).numpy()

    @torch.no_grad()
    def _of_all(self, examples: Examples, run: Callable) -> Tensor:
        self._set_training(False)
        batches, device = self.get_iterator(examples), torch.device(self.device)

        def compute(h) -> Tensor:
            with self.computing():
                return run(on_device(h, device)).cpu()

        in_parts = ShrinkingBatches(compute)
        return _in_order([in_parts(h) for h, _ in batches], batches.parts())


def _in_order(found: list[Tensor], parts: list) -> Tensor:
    """Rows of all batches, each at its place."""
    together = torch.cat(found)
    out = torch.empty_like(together)
    out[torch.as_tensor([int(i) for part in parts for i in part])] = together
    return out


def _raised_by_callback(interrupt: KeyboardInterrupt) -> bool:
    """Whether the last frame of the traceback is a skorch callback's."""
    last = interrupt.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and isinstance(last.tb_frame.f_locals.get("self"), Callback)
