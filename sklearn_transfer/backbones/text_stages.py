"""A transformer as a list of stages that resume each other exactly.

A stage runs inside the model's own forward, which builds attention masks,
position biases and rotary angles for it: what runs is a *segment*, a shallow copy
of the model whose embeddings hand out stored hidden states and whose layer list is
cut. It shares every parameter with the model and changes nothing in it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sklearn_transfer.backbones.spec import TextRecipe, fingerprint_text
from sklearn_transfer.backbones.stages import StagedBackbone, Tokens, pool
from sklearn_transfer.backbones.tokenize import TextTokenizer, TokenIds, collate

# A model without position embeddings reads any length; a limit must be a number.
ABSURD_LENGTH = 100_000
# Entries of a configuration that change no activation: where it came from, how it
# is stored and run, and what a head would make of it.
NOT_OF_THE_NETWORK = frozenset(
    "transformers_version architectures auto_map dtype torch_dtype use_cache "
    "attn_implementation output_attentions output_hidden_states return_dict "
    "chunk_size_feed_forward id2label label2id problem_type".split()
)


class Anatomy(NamedTuple):
    """Where a family keeps its parts: paths inside the model.

    ``shared`` is used by every layer and belongs to the first; ``final`` stands
    behind the last layer. ``first_position`` counts positions before a text's own.
    """

    layers: str
    embeddings: tuple[str, ...] = ("embeddings",)
    shared: tuple[str, ...] = ()
    final: tuple[str, ...] = ()
    first_position: int = 0


BERT = Anatomy("encoder.layer")
ROBERTA = Anatomy("encoder.layer", first_position=2)
# Families whose every boundary was tried to resume exactly.
ANATOMIES = {
    "albert": Anatomy(
        "encoder.albert_layer_groups",
        ("embeddings", "encoder.embedding_hidden_mapping_in"),
    ),
    "bert": BERT,
    "camembert": ROBERTA,
    "distilbert": Anatomy("transformer.layer"),
    "electra": Anatomy("encoder.layer", ("embeddings", "embeddings_project")),
    "gpt2": Anatomy("h", ("wte", "wpe", "drop"), final=("ln_f",)),
    "modernbert": Anatomy("layers", shared=("rotary_emb",), final=("final_norm",)),
    "mpnet": Anatomy(
        "encoder.layer", shared=("encoder.relative_attention_bias",), first_position=2
    ),
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
}


class TextBackbone(StagedBackbone):
    """A transformer as stages "embeddings", "layer.0" .. "layer.L-1".

    The embeddings' stage takes a ``TokenIds``; every other takes and gives
    ``Tokens``. ALBERT, one layer run many times, has one stage for all its runs.
    The stages hold the parameters; they run through ``run``, never alone.

    Attributes
    ----------
    normalize : bool
        Whether the published model ends by scaling vectors to length 1. The
        readout does not: it is done later, in float32.
    recipe : TextRecipe
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        tokenizer: TextTokenizer,
        readout: TextReadout,
        *,
        max_length: int,
        prompt: str = "",
        include_prompt: bool = True,
        normalize: bool = False,
    ):
        stages = _split(model, anatomy, readout.dense)
        super().__init__(
            stages,
            readout,
            layouts=["tokens"] * len(stages),
            recipe=TextRecipe(max_length, tokenizer.sha256, prompt),
            name=_architecture(model.config, readout, include_prompt),
        )
        self._anatomy = anatomy
        # In a tuple, which nn.Module does not look into: the stages own the
        # parameters, and no tensor may be found by two names.
        self._model = (model,)
        self._longest = position_limit(model.config, anatomy)
        self.tokenizer = tokenizer
        self.normalize = normalize
        if not include_prompt:
            readout.n_left_out = tokenizer.prompt_length()

    def tokenize(self, texts: Sequence[str]) -> tuple[list[np.ndarray], int]:
        """Token ids of each text, int32, and how many texts were cut."""
        return self.tokenizer.tokenize(texts)

    def collate(self, ids: Sequence[np.ndarray], pad_to_multiple: int = 16) -> TokenIds:
        """One batch, padded on the right to a multiple of so many tokens."""
        return collate(ids, self.tokenizer.pad_id, pad_to_multiple, self._longest)

    def example(self) -> TokenIds:
        """One short text, to measure by."""
        return self.collate(self.tokenize(["a short text"])[0])

    def prepare(self, batch: TokenIds, device, dtype) -> TokenIds:
        """The same token ids on ``device``; the embeddings give them a dtype."""
        return TokenIds(*(ids.to(device, non_blocking=True) for ids in batch))

    def run(self, h: Any, start: int, stop: int) -> Any:
        """Activations after stage ``stop``, from those after stage ``start``.

        `Tokens`, from token ids where ``start`` is 0; ``h`` where nothing is between.
        """
        if start == stop:
            return h
        states, mask = h  # token ids (n, t) or hidden states (n, t, d)
        given = {"input_ids" if start == 0 else "inputs_embeds": states}
        out = self._segment(states, start, stop)(attention_mask=mask, **given)
        return Tokens(out.last_hidden_state, mask)

    def tail(self, k: int) -> TextBackbone:
        twin = super().tail(k)
        # The stages do not own the model's list of layers, which would keep them.
        layers = twin._model[0].get_submodule(self._anatomy.layers)
        for i in range(k - 1):
            layers[i] = nn.Identity()
        return twin

    def _left_of(self, stage: int) -> nn.Module:
        """The parts that every layer uses, which the first one owns."""
        shared = [path.replace(".", "_") for path in self._anatomy.shared]
        parts = self.stages[stage]
        return nn.ModuleDict({name: parts[name] for name in shared if name in parts})

    def _segment(self, states: Tensor, start: int, stop: int) -> nn.Module:
        """The model from stage ``start`` to ``stop``; it starts from ``states``.

        Built at each call, in some 20 microseconds, rather than kept: nothing can
        go stale, and threads share nothing that changes.
        """
        model, anatomy = self._model[0], self._anatomy
        if (start, stop) == (0, self.n_stages):
            return model
        # Stage 0 is the embeddings, so layer i is stage i + 1.
        layers = model.get_submodule(anatomy.layers)[max(start - 1, 0) : stop - 1]
        exchanged: dict[str, nn.Module] = {anatomy.layers: layers}
        if start > 0:
            first, *others = _present(model, anatomy.embeddings)
            exchanged[first] = _Stored(states)
            for path in others:
                exchanged[path] = _neutral(model.get_submodule(path), states)
        if stop < self.n_stages:
            exchanged |= {path: nn.Identity() for path in anatomy.final}
        segment = _with_modules(model, exchanged)
        if model.config.model_type == "albert":
            segment.encoder.config = _albert_config(model.config, len(layers))
        return segment

    def _apply(self, fn, recurse=True):
        # Rotary angles are computed in float32 from buffers that only the code
        # knows, not the checkpoint: rounding those to bf16 would move every
        # position. Loading in bf16 spares them likewise.
        kept = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module._buffers.items()
            if name in module._non_persistent_buffers_set
            and buffer is not None
            and buffer.is_floating_point()
        ]
        super()._apply(fn, recurse)
        for module, name, buffer in kept:
            module._buffers[name] = buffer.to(module._buffers[name].device)
        return self


class TextReadout(nn.Module):
    """Hidden states to one float32 vector a text: pooling, then Dense layers.

    The Dense layers are owned by the last stage; a tuple keeps them from being
    registered twice.
    """

    def __init__(self, poolings: Sequence[str], dense: tuple[nn.Module, ...] = ()):
        super().__init__()
        self.poolings = tuple(poolings)
        self.dense = dense
        self.n_left_out = 0

    def forward(self, h: Tokens) -> Tensor:
        mask = h.mask
        if self.n_left_out:  # a prompt that does not count
            mask = mask.clone()
            mask[:, : self.n_left_out] = 0
        vector = torch.cat(
            [self._pool(h.hidden, mask, how) for how in self.poolings], 1
        )
        for layer in self.dense:
            vector = layer(vector)
        return vector

    def _pool(self, hidden: Tensor, mask: Tensor, how: str) -> Tensor:
        if how == "cls":  # the first token that counts
            return hidden[:, self.n_left_out].float()
        if how == "last":  # counted from the front, so never a shortened mask
            mask = mask.clone()
            mask[:, : self.n_left_out] = 1
        return pool(Tokens(hidden, mask), how, "tokens")


class Dense(nn.Module):
    """A sentence-transformers Dense: a Linear and its activation."""

    def __init__(self, n_in: int, n_out: int, bias: bool, activation: nn.Module):
        super().__init__()
        self.linear = nn.Linear(n_in, n_out, bias=bias)
        self.activation = activation

    def forward(self, vector: Tensor) -> Tensor:
        dtype = self.linear.weight.dtype
        return self.activation(self.linear(vector.to(dtype))).float()


class _Stored(nn.Module):
    """Gives one stored tensor, whatever it is called with."""

    def __init__(self, stored: Tensor):
        super().__init__()
        self._stored = stored

    def forward(self, *args, **kwargs) -> Tensor:
        return self._stored


def _neutral(module: nn.Module, states: Tensor) -> nn.Module:
    """What stands for a part whose work the stored states already hold."""
    if isinstance(module, nn.Embedding):  # its output is added to the states
        return _Stored(states.new_zeros(()))
    return nn.Identity()


def _with_modules(root: nn.Module, exchanged: dict[str, nn.Module]) -> nn.Module:
    """A copy of ``root`` with some parts exchanged; it shares everything else."""
    twin = copy.copy(root)
    twin._modules = dict(root._modules)
    inner: dict[str, dict[str, nn.Module]] = {}
    for path, module in exchanged.items():
        head, _, rest = path.partition(".")
        if rest:
            inner.setdefault(head, {})[rest] = module
        else:
            twin._modules[head] = module
    for head, parts in inner.items():
        twin._modules[head] = _with_modules(twin._modules[head], parts)
    return twin


def _split(
    model: nn.Module, anatomy: Anatomy, dense: tuple[nn.Module, ...]
) -> dict[str, nn.ModuleDict]:
    """The stages, which own every parameter of the model once."""

    def parts(paths: Sequence[str]) -> dict[str, nn.Module]:
        found = _present(model, paths)
        return {path.replace(".", "_"): model.get_submodule(path) for path in found}

    layers = model.get_submodule(anatomy.layers)
    stages = {"embeddings": parts(anatomy.embeddings)}
    stages |= {f"layer.{i}": {"layer": layer} for i, layer in enumerate(layers)}
    stages["layer.0"] |= parts(anatomy.shared)
    stages[f"layer.{len(layers) - 1}"] |= parts(anatomy.final)
    stages[f"layer.{len(layers) - 1}"] |= {f"dense_{i}": d for i, d in enumerate(dense)}
    return {name: nn.ModuleDict(modules) for name, modules in stages.items()}


def _architecture(config, readout: TextReadout, include_prompt: bool) -> str:
    """All that decides the vector besides tensors and tokens, as text.

    Heads of attention, activations, epsilons or rotary angles change the network
    and no tensor's shape. A setting at its default is not told: a new release of
    transformers that adds one would make every tuned text model another's.
    """
    defaults = type(config)().to_dict()
    settings = {
        key: value
        for key, value in config.to_dict().items()
        if key not in NOT_OF_THE_NETWORK
        and not key.startswith("_")
        and (key not in defaults or value != defaults[key])
    }
    told = json.dumps(settings, sort_keys=True, default=repr)
    activations = [repr(dense.activation) for dense in readout.dense]
    return (
        f"{config.model_type}, {readout.poolings}, include_prompt={include_prompt}, "
        f"{activations}, {fingerprint_text(told)}"
    )


def _present(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """The paths that this model has: ELECTRA projects only where widths differ."""
    known = {name for name, _ in model.named_modules()}
    return [path for path in paths if path in known]


def _albert_config(config, n_groups: int):
    """ALBERT's configuration for some of its groups, each run as often as before."""
    each = config.num_hidden_layers // config.num_hidden_groups
    config = copy.copy(config)
    config.num_hidden_layers, config.num_hidden_groups = each * n_groups, n_groups
    return config


def position_limit(config, anatomy: Anatomy) -> int:
    """Longest sequence that the position embeddings allow."""
    positions = getattr(config, "max_position_embeddings", None) or ABSURD_LENGTH
    return positions - anatomy.first_position
