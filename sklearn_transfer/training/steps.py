"""One training step of a net: in parts where memory is short, with rollback."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from skorch import NeuralNet
from skorch.dataset import unpack_data
from skorch.utils import TeeGenerator
from torch import Tensor

from sklearn_transfer.exceptions import DivergedError, MicroBatchWarning, warn_user
from sklearn_transfer.running.device import exact_float32
from sklearn_transfer.running.memory import is_out_of_memory
from sklearn_transfer.training.convolutions import ConvolutionGradients
from sklearn_transfer.training.network import length, on_device, rows_of
from sklearn_transfer.training.recipe import Mix, multiplier

# A loss this many times the first one has left everything behind.
EXPLODED = 1e4


class StepsInParts(NeuralNet):
    """What `TunedNet` does with one batch."""

    examples_: Any
    micro_batch_: int | None

    def train_step(self, batch, **fit_params) -> dict:
        """One step of the optimizer, in as many parts as memory asks for."""
        # Backward too: its products are float32 under "float32" as well.
        with self.examples_.guard(), self._exact():
            step = self._gradients(batch)
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
        self._move_weights()
        self.steps_done_ += 1
        if self.recipe.ema:
            self.average_.update()
        return step

    def _move_weights(self) -> None:
        """A step of the optimizer, which takes memory at its first."""
        try:
            self.optimizer_.step()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            # A smaller batch would not help, and half a step cannot be undone here:
            # the estimator puts back what it was before fit.
            n = sum(p.numel() for p in self.module_.parameters() if p.requires_grad)
            raise MemoryError(
                f"The optimizer's own numbers for {n:,} trained weights, {8 * n:,} "
                "bytes or less, do not fit in memory. Write a larger freeze_depth, "
                "lora_rank=8, or optimizer='sgd', which keeps half as many."
            ) from error

    def _gradients(self, batch) -> dict:
        """Gradients of the batch, in smaller parts each time memory runs out."""
        while True:
            undo = self._step_state()
            try:
                return self._accumulate(batch)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                # The frames of the failed pass hold its activations.
                error.__traceback__ = None
                undo()
                self._halve(batch[0], error)

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
            total_weight = mix.losses(weights, weights[mix.partner]).sum()
        loss, outputs = torch.zeros((), device=device), []
        for part in self._parts(n):
            x = h if len(part) == n else rows_of(h, part)
            partners = None if mix is None else mix.partner[part]
            if mix is None:
                y_pred = self.infer(x)
            else:
                others = on_device(rows_of(h, partners), device)
                y_pred = self.infer(x, others, mix.share)
            losses = self.criterion_(y_pred, targets[part]) * weights[part]
            if mix is not None:
                theirs = self.criterion_(y_pred, targets[partners]) * weights[partners]
                losses = mix.losses(losses, theirs)
            share = losses.sum() / total_weight
            with self._backward():
                share.backward()
            loss += share.detach()
            outputs.append(y_pred.detach())
        return {"loss": loss, "y_pred": torch.cat(outputs)}

    def _backward(self):
        """What a backward pass runs in."""
        # Every operation inside passes through Python: not where nothing is gained.
        is_cpu = torch.device(self.device).type == "cpu"
        modules = self.module_.modules() if is_cpu else ()
        has_maps = any(isinstance(module, torch.nn.Conv2d) for module in modules)
        gains = has_maps and self.precision == "bfloat16"
        return ConvolutionGradients() if gains else nullcontext()

    def _parts(self, n: int) -> list[Tensor]:
        """Rows of a batch that are taken at once: even parts, so that none is small."""
        n_parts = 1 if self.micro_batch_ is None else math.ceil(n / self.micro_batch_)
        return list(torch.arange(n).tensor_split(n_parts))

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

    def _halve(self, h, error: BaseException) -> None:
        """Take half as many rows at once from here on."""
        n = length(h)
        self._zero_grad_optimizer()
        if torch.device(self.device).type == "cuda":
            torch.cuda.empty_cache()
        tried = max(len(part) for part in self._parts(n))
        if tried == 1:
            shape = tuple((h if isinstance(h, Tensor) else h[0]).shape[1:])
            raise MemoryError(
                f"A training step on one row, of shape {shape} after "
                f"{self.module_.k} frozen stages, does not fit in memory. Write a "
                "smaller image_size or max_length, a larger freeze_depth, a smaller "
                "backbone, or device='cpu'."
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
            _drops(module) for module in self.module_.modules()
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
        raise self._diverged(f"The training loss is {loss:g}")

    @torch.no_grad()
    def _check_weights(self) -> None:
        """The same for the last step, whose loss nobody asks for."""
        trained = (p for p in self.module_.parameters() if p.requires_grad)
        if not all(torch.isfinite(p).all() for p in trained):
            raise self._diverged("Trained weights are infinite or not numbers")

    def _diverged(self, what: str) -> DivergedError:
        recipe, rate = self.recipe, self.optimizer_.param_groups[-1]["lr"]
        likely = (
            f"The likely cause is too large a learning rate (lr={recipe.lr:g}, "
            f"head_lr={recipe.head_lr:g}): write lr={recipe.lr / 10:g}, "
            f"head_lr={recipe.head_lr / 10:g}"
        )
        if recipe.clip_norm is None:
            likely += ", or clip_norm=1.0"
        if self.steps_done_ == 0:
            likely = (
                "It was so before the first step: look for infinite or huge values in "
                "X, y or sample_weight"
            )
        epoch = self.epochs_before_ + self.epoch_
        return DivergedError(
            f"{what} in epoch {epoch}, after {self.steps_done_} steps, at a head "
            f"learning rate of {rate:g}. {likely}."
        )

    def computing(self):
        """The precision policy, around a forward pass."""
        device = torch.device(self.device)
        if self.precision == "bfloat16":
            return torch.autocast(device.type, torch.bfloat16)
        return self._exact()

    def _exact(self):
        return exact_float32(self.precision, torch.device(self.device))


def _drops(module: torch.nn.Module) -> bool:
    """Whether a module leaves out by chance: torch's, timm's or a family's own way."""
    chances = (v for name, v in vars(module).items() if name == "p" or "drop" in name)
    return module.training and any(isinstance(v, float) and v > 0 for v in chances)
