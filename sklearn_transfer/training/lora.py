"""Low-rank adapters: a frozen matrix W trains as W + B A, of a small rank.

The sum is a parametrization of the weight (``torch.nn.utils.parametrize``), not a
module in the Linear's place: nn.MultiheadAttention, torchvision's Swin and torch's
fast paths read weights without calling the modules that hold them. For MiniLM's sizes
and 16 x 32 tokens, in float32 and bf16, a training step takes up to a tenth longer
than with (x A) B beside the Linear, for the sake of one mechanism, and a fifth to a
quarter less than one that trains every weight; forming the sums is a hundredth of it.
So nothing is cached, and no weight can be stale.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

# B A is scaled by SCALE / rank, as in the paper: a learning rate that suits one rank
# then suits the others.
SCALE = 16.0
# What networks call the matrices of an attention: transformers, torchvision, timm.
# By name, for attention also holds Linears of another kind (Swin's cpb_mlp).
MATRICES = frozenset(
    "q k v o qkv kv query key value dense proj merge wq wk wv wo wqkv "
    "q_lin k_lin v_lin out_lin q_proj k_proj v_proj o_proj out_proj qkv_proj "
    "c_attn c_proj to_q to_k to_v to_kv to_qkv to_out".split()
)
# Of nn.MultiheadAttention: one fused, or three of different widths.
IN_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def add_lora(
    stages: Iterable[nn.Module], rank: int, generator: torch.Generator | None
) -> int:
    """Freeze the stages and put a trainable adapter on every matrix of attention.

    The output is the same as before until the adapters are trained.

    Parameters
    ----------
    stages : iterable of Module
        Changed in place. Only the adapters require gradients afterwards.
    rank : int
        Of each adapter, at least 1. Queries, keys and values have one adapter each,
        also where they are fused in one matrix, so that a rank means the same in
        every network.
    generator : torch.Generator or None
        Draws A; B starts at zero.

    Returns
    -------
    n_adapted : int
        Number of matrices that were adapted.

    Raises
    ------
    ValueError
        If the stages hold no attention, or are adapted already.

    Notes
    -----
    Adapted modules can be deep-copied, but not pickled: keep the part of
    ``state_dict()`` that `lora_state` names, or call `merge_lora` first.

    Examples
    --------
    >>> import torch
    >>> from sklearn_transfer.training.lora import add_lora
    >>> layer = torch.nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=16)
    >>> add_lora([layer], rank=2, generator=torch.Generator().manual_seed(0))
    2
    >>> sum(p.numel() for p in layer.parameters() if p.requires_grad)
    128
    """
    stages = list(stages)
    _refuse_parametrized(stages)
    found = {
        (id(module), name): (module, name)
        for stage in stages
        for module, name in _matrices(stage)
    }
    if not found:
        kinds = ", ".join(dict.fromkeys(type(stage).__name__ for stage in stages))
        raise ValueError(
            f"lora_rank={rank} adapts the attention of a transformer, and the stages "
            f"to train ({kinds or 'none'}) hold none. Write lora_rank=0, which trains "
            "their weights themselves, or choose a transformer such as "
            "backbone='vit_b_16'."
        )
    for stage in stages:
        stage.requires_grad_(False)
    for module, name in found.values():
        adapter = LowRank(getattr(module, name), rank, _is_conv1d(module), generator)
        parametrize.register_parametrization(module, name, adapter)
    return len(found)


def merge_lora(module: nn.Module) -> None:
    """Fold all adapters inside ``module`` into the weights, in place.

    Modules become what they were, with the same names in ``state_dict()``; the
    weights are new tensors, so that networks that share the old ones keep them.
    """
    for part in list(module.modules()):
        if _is_adapted(part):
            _merge(part)


def lora_state(module: nn.Module) -> set[str]:
    """Names of the adapters' tensors in ``module.state_dict()``."""
    return {
        f"{path}.{name}" if path else name
        for path, part in module.named_modules()
        if isinstance(part, LowRank)
        for name, _ in part.named_parameters()
    }


class LowRank(nn.Module):
    """Gives ``weight`` + SCALE / rank * B A, for a weight (n_out, n_in).

    ``down`` is A and ``up`` is B, for each of the blocks of a fused matrix: 3 where
    queries, keys and values lie below each other, else 1.
    """

    def __init__(self, weight: Tensor, rank: int, transposed: bool, generator=None):
        super().__init__()
        n_out, n_in = weight.T.shape if transposed else weight.shape
        blocks = 3 if n_out == 3 * n_in else 1
        self.transposed = transposed  # GPT-2 keeps (n_in, n_out)
        # As nn.Linear draws its weights: uniform within 1 / sqrt(n_in).
        drawn = torch.rand(blocks, rank, n_in, generator=generator) * 2 - 1
        self.down = nn.Parameter(drawn.to(weight.device) * n_in**-0.5)
        self.up = nn.Parameter(self.down.new_zeros(blocks, n_out // blocks, rank))

    def forward(self, weight: Tensor) -> Tensor:
        matrix = weight.T if self.transposed else weight
        blocks, _, rank = self.up.shape
        # Outside autocast, which would round the sum before every use.
        with torch.autocast(weight.device.type, enabled=False):
            total = torch.baddbmm(
                matrix.unflatten(0, (blocks, -1)),  # (blocks, n_out / blocks, n_in)
                self.up.to(weight.dtype),
                self.down.to(weight.dtype),
                alpha=SCALE / rank,
            ).flatten(0, 1)
        return total.T if self.transposed else total


def _matrices(stage: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Each matrix of attention inside: the module that holds it, its name there.

    One inside two modules of attention, as BERT nests them, comes twice.
    """
    for attention in stage.modules():
        if isinstance(attention, nn.MultiheadAttention):
            for name in IN_PROJECTIONS:
                if getattr(attention, name) is not None:
                    yield attention, name
        elif not _is_attention(attention):
            continue
        for path, part in attention.named_modules():
            is_matrix = isinstance(part, nn.Linear) or _is_conv1d(part)
            if is_matrix and not MATRICES.isdisjoint(path.lower().split(".")):
                yield part, "weight"


def _is_attention(module: nn.Module) -> bool:
    kind = type(module).__name__.lower()
    return "attention" in kind or "attn" in kind


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's Linear; by name, for transformers may not be installed."""
    return type(module).__name__ == "Conv1D" and module.weight.ndim == 2


def _refuse_parametrized(stages: list[nn.Module]) -> None:
    if any(parametrize.is_parametrized(m) for stage in stages for m in stage.modules()):
        raise ValueError(
            "The stages are adapted already, or parametrized otherwise. Call "
            "merge_lora(module) first, or torch.nn.utils.parametrize."
            "remove_parametrizations(module, 'weight')."
        )


def _is_adapted(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module) and any(
        isinstance(part, LowRank)
        for chain in module.parametrizations.values()
        for part in chain
    )


def _merge(module: nn.Module) -> None:
    """Undo ``register_parametrization``, keeping the sum.

    Not ``remove_parametrizations``: it takes the property from a class that deep
    copies share, after which the other copies have no weight.
    """
    merged = {}
    for name, chain in module.parametrizations.items():
        with torch.no_grad():
            merged[name] = nn.Parameter(chain(), chain.original.requires_grad)
    others = dict(module._parameters)
    del module.parametrizations
    module.__class__ = type(module).__base__
    # Matrices come before biases in every module that is adapted.
    module._parameters.clear()
    module._parameters.update(merged | others)
