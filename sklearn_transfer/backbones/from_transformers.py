"""Text networks of transformers and sentence-transformers: found, read, loaded."""

from __future__ import annotations

import json
import pickle
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from sklearn_transfer.backbones.attention import ATTENTION, register_attention
from sklearn_transfer.backbones.text_folders import (
    TextFolder,
    find_folder,
    quiet_hub,
    read_folder,
)
from sklearn_transfer.backbones.text_stages import (
    ABSURD_LENGTH,
    ANATOMIES,
    Dense,
    TextBackbone,
    TextReadout,
    position_limit,
)
from sklearn_transfer.backbones.tokenize import TextTokenizer
from sklearn_transfer.backbones.weights import (
    is_weight_file,
    load_body,
    read_state_dict,
    seeded,
)
from sklearn_transfer.exceptions import BackboneNotFoundError, WeightsError

# For tokenizers that say "no limit" (by 10 ** 30): attention grows with the square.
FALLBACK_LENGTH = 512


def load(
    name: str,
    weights: str | None = None,
    max_length: int | None = None,
    prompt: str | None = None,
) -> TextBackbone:
    """Load a text network, in eval mode, float32, on the CPU.

    Parameters
    ----------
    name : str
        An id on the Hugging Face hub, or a folder. A sentence-transformers model
        brings its own pooling; any other gets the mean over its tokens, causal
        ones (GPT-2) too.
    weights : str or None
        None for the published weights; a revision; "random" (untrained, the same
        at each call); or the path of a weight file.
    max_length : int or None
        Longest text in tokens, special tokens included. None is the model's own.
    prompt : str or None
        Put before every text. None is the model's default prompt, "" is none.

    Returns
    -------
    backbone : TextBackbone

    Raises
    ------
    BackboneNotFoundError
        If its files are not here and may or can not be downloaded.
    WeightsError
        If the weights are not of this network.
    ValueError
        If the family is not supported, or ``max_length`` is out of range.

    Examples
    --------
    >>> backbone = load("sentence-transformers/all-MiniLM-L6-v2")
    >>> ids, n_cut = backbone.tokenize(["A bird.", "A plane."])
    >>> backbone(backbone.collate(ids)).shape
    torch.Size([2, 384])
    """
    is_file = weights is not None and weights != "random" and is_weight_file(weights)
    own_weights = weights != "random" and not is_file
    revision = weights if own_weights else None
    folder = read_folder(find_folder(name, revision, with_weights=own_weights))
    with _quiet(), seeded():
        model = _load_model(folder, name, weights if not own_weights else None)
        tokenizer = _load_tokenizer(folder, name)
        dense = tuple(_load_dense(path, weights) for path in folder.dense)
    anatomy = ANATOMIES[model.config.model_type]
    if prompt is None:
        prompt = folder.prompt
    limit = position_limit(model.config, anatomy)
    max_length = _resolve_max_length(max_length, folder, tokenizer, limit)
    return TextBackbone(
        model,
        anatomy,
        TextTokenizer(tokenizer, max_length, prompt, folder.lower),
        TextReadout(folder.poolings, dense),
        max_length=max_length,
        prompt=prompt,
        include_prompt=folder.include_prompt,
        normalize=folder.normalize,
    )


def _load_model(folder: TextFolder, name: str, weights: str | None) -> nn.Module:
    """The body, float32: from its folder, at random, or from a weight file."""
    from transformers import AutoConfig, AutoModel

    path = folder.transformer
    config = AutoConfig.from_pretrained(
        path, trust_remote_code=False, local_files_only=True
    )
    _check_family(config, name)
    config.use_cache = False
    model_class = AutoModel._model_mapping[type(config)]
    sdpa = getattr(model_class, "_supports_sdpa", False)
    how = {
        "dtype": torch.float32,
        "attn_implementation": "sdpa" if sdpa else "eager",
        "trust_remote_code": False,
    }
    if weights is None:
        model = _from_checkpoint(AutoModel, path, config, how)
    else:
        model = AutoModel.from_config(config, **how)
    if hasattr(model, "pooler"):
        # Trained on next-sentence prediction, or not at all; it is no part of the
        # vector.
        model.pooler = None
    if weights not in (None, "random"):
        state = read_state_dict(weights)
        source = f"{weights} into {name}"
        load_body(model, state, is_head=_head_rule(model), source=source)
    if sdpa:
        register_attention()
        model.config._attn_implementation = ATTENTION
    return model.eval()


def _from_checkpoint(auto_model, path: Path, config, how: dict) -> nn.Module:
    try:
        model, found = auto_model.from_pretrained(
            path, config=config, local_files_only=True, output_loading_info=True, **how
        )
    except RuntimeError as error:  # shapes that differ
        raise WeightsError(f"The weights in {path} do not fit: {error}") from error
    except pickle.UnpicklingError as error:
        # PyTorch's own message advises weights_only=False, which runs the payload.
        raise WeightsError(
            f"The weights in {path} hold Python objects besides tensors. Loading them "
            "could run any code, so it is refused. Where you trust them, save the "
            "model again: model.save_pretrained(folder) writes safetensors."
        ) from error
    except OSError as error:
        raise BackboneNotFoundError(
            f"No weights of a text network in {path}: {error}"
        ) from error
    missing = [key for key in found["missing_keys"] if not key.startswith("pooler.")]
    if missing:
        raise WeightsError(
            f"The weights in {path} lack {len(missing)} tensors of the network, among "
            f"them {', '.join(sorted(missing)[:3])}. Save the whole model again with "
            "model.save_pretrained(folder)."
        )
    for tensor in (*model.parameters(), *model.buffers()):
        # transformers leaves tensors mapped on their file: written over, it would
        # change a loaded network; cut short, it would end the process.
        tensor.data = tensor.data.clone()
    return model


def _check_family(config, name: str) -> None:
    if config.model_type not in ANATOMIES:
        raise ValueError(
            f"backbone={name!r} is of the family {config.model_type!r}, which is not "
            f"supported. Supported are {', '.join(map(repr, ANATOMIES))}."
        )
    groups = getattr(config, "num_hidden_groups", 1)
    if config.num_hidden_layers < 1 or config.num_hidden_layers % groups:
        raise ValueError(
            f"backbone={name!r} has {config.num_hidden_layers} layers in {groups} "
            "groups; the layers must divide evenly into the groups, one at least."
        )


def _head_rule(model: nn.Module):
    """Says of a key whether it is of a head, or a constant that old files carry."""
    own = set(model.state_dict())
    tops = {key.partition(".")[0] for key in own}
    constants = ("position_ids", ".attn.bias", ".attn.masked_bias")

    def is_head(key: str) -> bool:
        return key not in own and (
            key.partition(".")[0] not in tops or key.endswith(constants)
        )

    return is_head


def _load_tokenizer(folder: TextFolder, name: str):
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder.transformer, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise BackboneNotFoundError(
            f"No tokenizer of backbone {name!r} in {folder.transformer}: {error} "
            "Save it there with tokenizer.save_pretrained(folder)."
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"backbone={name!r} has no fast tokenizer (tokenizer.json). Convert it "
            "once: AutoTokenizer.from_pretrained(name).save_pretrained(folder)."
        )
    return tokenizer


def _load_dense(folder: Path, weights: str | None) -> Dense:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    if config.get("use_residual"):
        raise ValueError(f"The Dense layer in {folder} has a residual: not supported.")
    path = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    activation = getattr(nn, path.rpartition(".")[2], None)
    # Only torch's own: a name in a downloaded file must not choose what is run.
    if not (
        path.startswith("torch.nn.")
        and isinstance(activation, type)
        and issubclass(activation, nn.Module)
    ):
        raise ValueError(
            f"The Dense layer in {folder} has the activation {path!r}; only those of "
            "torch.nn are supported."
        )
    dense = Dense(
        config["in_features"],
        config["out_features"],
        config.get("bias", True),
        activation(),
    )
    if weights != "random":
        file = folder / "model.safetensors"
        file = file if file.is_file() else folder / "pytorch_model.bin"
        load_body(
            dense, read_state_dict(file), is_head=lambda key: False, source=str(file)
        )
    return dense.eval()


def _resolve_max_length(asked, folder: TextFolder, tokenizer, limit: int) -> int:
    if asked is not None:
        if isinstance(asked, bool) or not 1 <= asked <= limit:
            raise ValueError(
                f"max_length={asked!r} is out of range: this backbone reads 1 to "
                f"{limit} tokens. Write max_length={limit} or None."
            )
        return int(asked)
    own = min(folder.max_length or tokenizer.model_max_length, limit)
    return own if own < ABSURD_LENGTH else FALLBACK_LENGTH


@contextmanager
def _quiet():
    """No bars, log lines or warnings of transformers inside; as before, after."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with quiet_hub(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(level)
            if bars:
                logging.enable_progress_bar()
