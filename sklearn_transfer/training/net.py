"""The skorch net inside the fine-tuning estimators."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from skorch import NeuralNet
from skorch.callbacks import Callback, PassthroughScoring
from skorch.dataset import unpack_data
from skorch.utils import TeeGenerator
from torch import Tensor

from sklearn_transfer.exceptions import DivergedError, MicroBatchWarning, warn_user
from sklearn_transfer.running.device import exact_float32
from sklearn_transfer.running.memory import is_out_of_memory
from sklearn_transfer.training.examples import Examples, Minibatches, weighted_mean
from sklearn_transfer.training.network import (
    TunedNetwork,
    length,
    on_device,
    rows_of,
)
from sklearn_transfer.training.recipe import (
    Average,
    Losses,
    Mix,
    Pull,
    Recipe,
    make_optimizer,
    multiplier,
    parameter_groups,
)

# A loss this many times the first one has left everything behind.
EXPLODED = 1e4


class TunedNet(NeuralNet):
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

    def infer(self, x, mix: Mix | None = None, **fit_params) -> Tensor:
        device = torch.device(self.device)
        with self.computing():
            return self.module_(on_device(x, device), mix)

    def computing(self):
        """The precision policy, around a forward pass."""
        device = torch.device(self.device)
        if self.precision == "bfloat16":
            return torch.autocast(device.type, torch.bfloat16)
        return exact_float32(self.precision, device)

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
        data = {"dataset_train": examples, "dataset_valid": valid}
        self.notify("on_train_begin", X=examples, y=None)
        for epoch in range(1, epochs + 1):
            examples.set_epoch(self.epochs_before_ + epoch - 1)
            if before_epoch is not None:
                before_epoch(epoch)
            self.epoch_, started = epoch, time.perf_counter()
            self.notify("on_epoch_begin", **data)
            self.run_single_epoch(batches, True, "train", self.train_step)
            with self.average_.in_place() if self.recipe.ema else nullcontext():
                if checks is not None:
                    self.seen_ = []
                    self.run_single_epoch(checks, False, "valid", self.validation_step)
                    self.valid_outputs_ = _in_order(self.seen_, checks.parts())
                self.history.record("seconds", time.perf_counter() - started)
                wants_to_stop = self._notify_epoch_end(data)
                if after_epoch is not None and after_epoch(epoch):
                    wants_to_stop = True
            if wants_to_stop:
                break
        if self.recipe.ema:
            self.average_.swap()
        self.epochs_before_ += epoch
        self.examples_ = None  # its files need not stay open
        self.notify("on_train_end", X=examples, y=None)
        return self

    def validation_step(self, batch, **fit_params) -> dict:
        step = super().validation_step(batch, **fit_params)
        self.seen_.append(step["y_pred"].cpu())
        return step

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

    def train_step(self, batch, **fit_params) -> dict:
        """One step of the optimizer, in as many parts as memory asks for."""
        while True:
            undo = self._step_state()
            try:
                with self.examples_.guard():
                    step = self._accumulate(batch)
                break
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                # The frames of the failed pass hold its activations.
                error.__traceback__ = None
                undo()
                self._halve(length(batch[0]), error)
        self._check_loss(step["loss"].item())
        self.pull_.add_to_gradients()
        self.notify(
            "on_grad_computed",
            named_parameters=TeeGenerator(self.get_all_learnable_params()),
            batch=batch,
            training=True,
        )
        if self.recipe.clip_norm:
            learning = [p for p in self.module_.parameters() if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(learning, self.recipe.clip_norm)
        self._set_rates()
        self.optimizer_.step()
        self.steps_done_ += 1
        if self.recipe.ema:
            self.average_.update()
        return step

    def _accumulate(self, batch) -> dict:
        """Gradients of the batch's loss, summed over its parts."""
        self._zero_grad_optimizer()
        self._set_training(True)
        h, (targets, weights) = unpack_data(batch)
        n, device = length(h), torch.device(self.device)
        targets, weights = targets.to(device), weights.to(device)
        mix = Mix.draw(n, self.recipe.mixup, self.generator)
        total_weight = weights.sum()
        if mix is not None:
            # Partners are anywhere in the batch: it cannot be mixed in parts.
            total_weight = mix.losses(weights, weights[mix.partner]).sum()
        size = n if mix is not None or self.micro_batch_ is None else self.micro_batch_
        loss, outputs = torch.zeros((), device=device), []
        for start in range(0, n, size):
            part = slice(start, min(start + size, n))
            x = h if size >= n else rows_of(h, part)
            y_pred = self.infer(x, mix)
            losses = self.criterion_(y_pred, targets[part]) * weights[part]
            if mix is not None:
                others, w = targets[mix.partner], weights[mix.partner]
                losses = mix.losses(losses, self.criterion_(y_pred, others) * w)
            share = losses.sum() / total_weight
            share.backward()
            loss += share.detach()
            outputs.append(y_pred.detach())
        return {"loss": loss, "y_pred": torch.cat(outputs)}

    def _step_state(self) -> Callable[[], None]:
        """Remember what a failed pass may have moved; gives what puts it back."""
        buffers = [(b, b.clone()) for b in self.module_.buffers()]
        states = [self.generator.get_state()] if self.generator is not None else []
        cpu, device = torch.get_rng_state(), torch.device(self.device)
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

        @torch.no_grad()
        def undo() -> None:
            for buffer, before in buffers:
                buffer.copy_(before)
            for state in states:
                self.generator.set_state(state)
            torch.set_rng_state(cpu)
            if cuda is not None:
                torch.cuda.set_rng_state(cuda, device)

        return undo

    def _halve(self, n: int, error: BaseException) -> None:
        """Take half as many rows at once from here on."""
        self._zero_grad_optimizer()
        if torch.device(self.device).type == "cuda":
            torch.cuda.empty_cache()
        tried = n if self.micro_batch_ is None else min(self.micro_batch_, n)
        if tried == 1 or self.recipe.mixup:
            why = "mixup needs whole batches" if tried > 1 else "one row is too much"
            raise MemoryError(
                f"A training step on {tried} rows does not fit in memory, and {why}. "
                "Write batch_size=4, a smaller image_size or max_length, a larger "
                "freeze_depth, or device='cpu'."
            ) from error
        if self.micro_batch_ is None and self._parts_differ():
            warn_user(
                f"A batch of {n} rows does not fit in memory. Gradients of smaller "
                "parts are added up instead, and BatchNorm or dropout sees the parts: "
                "the result differs a little from one with more memory. "
                f"batch_size={max(1, tried // 2)} would say so openly.",
                MicroBatchWarning,
            )
        self.micro_batch_ = max(1, tried // 2)

    def _parts_differ(self) -> bool:
        """Whether a batch in parts gives other gradients than the whole."""
        return any(norm.training for norm in self.module_.batch_norms()) or any(
            isinstance(module, torch.nn.Dropout) and module.training and module.p > 0
            for module in self.module_.modules()
        )

    def _set_rates(self) -> None:
        now = multiplier(self.steps_done_, self.steps_planned_, self.recipe)
        for group in self.optimizer_.param_groups:
            group["lr"] = group["initial_lr"] * now

    def _check_loss(self, loss: float) -> None:
        """Stop with an error where training has left all bounds."""
        if self.steps_done_ == 0:
            self.first_loss_ = max(loss, 1.0)
        if math.isfinite(loss) and loss <= EXPLODED * self.first_loss_:
            return
        recipe, rate = self.recipe, self.optimizer_.param_groups[-1]["lr"]
        likely = (
            f"The likely cause is too large a learning rate (lr={recipe.lr:g}, "
            f"head_lr={recipe.head_lr:g}): write lr={recipe.lr / 10:g}"
        )
        if recipe.clip_norm is None:
            likely += ", or clip_norm=1.0"
        if self.steps_done_ == 0:
            likely = (
                "It was so before the first step: look for infinite or huge values in "
                "X, y or sample_weight"
            )
        raise DivergedError(
            f"The training loss is {loss:g} in epoch {self.epoch_}, after "
            f"{self.steps_done_} steps, at a head learning rate of {rate:g}. {likely}."
        )

    def outputs(self, examples: Examples) -> Tensor:
        """Outputs (n, m) on the CPU, in the order of the examples."""
        return self._of_all(examples, self.module_)

    def vectors(self, examples: Examples) -> Tensor:
        """Vectors (n, d) on the CPU that enter the head, likewise."""
        return self._of_all(examples, self.module_.vector)

    @torch.no_grad()
    def _of_all(self, examples: Examples, run: Callable) -> Tensor:
        self._set_training(False)
        batches, found = self.get_iterator(examples), []
        for h, _ in batches:
            with self.computing():
                found.append(run(on_device(h, torch.device(self.device))).cpu())
        return _in_order(found, batches.parts())


def _in_order(found: list[Tensor], parts: list) -> Tensor:
    """Rows of all batches, each at its place."""
    together = torch.cat(found)
    out = torch.empty_like(together)
    out[torch.as_tensor([int(i) for part in parts for i in part])] = together
    return out


def _raised_by_callback(interrupt: KeyboardInterrupt) -> bool:
    """Whether the last frame of the traceback is a skorch callback's."""
    last = interrupt.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    return isinstance(last.tb_frame.f_locals.get("self"), Callback)
