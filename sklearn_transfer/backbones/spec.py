"""What is asked of a backbone, as plain values: strings, recipes, boundaries.

Nothing here imports torch, so that estimators can validate, hash and print
their parameters without loading it.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from sklearn_transfer.backbones.torchvision_names import TORCHVISION_WEIGHTS

SOURCES = ("embedded", "torchvision", "timm", "hf")
EMBEDDED = "embedded"
# transformers ids without an organisation; any other id is "organisation/name".
BARE_HF_IDS = frozenset(
    "albert-base-v2 bert-base-cased bert-base-multilingual-cased bert-base-uncased "
    "bert-large-uncased distilbert-base-cased distilbert-base-uncased distilgpt2 "
    "distilroberta-base gpt2 gpt2-large gpt2-medium gpt2-xl roberta-base "
    "roberta-large xlm-roberta-base xlm-roberta-large".split()
)
POOLINGS = ("auto", "avg", "max", "cls", "last", "flatten")


@dataclass(frozen=True)
class BackboneSpec:
    """One network and its weights, as ``[source:]name[@weights]`` names them.

    Parameters
    ----------
    source : {"embedded", "torchvision", "timm", "hf"}
    name : str
        Name within the source; for "hf" also the path of a local folder.
    weights : str or None
        An enum name, "random", the path of a weight file, or for "hf" a
        revision. None stands for the source's own default.
    """

    source: str
    name: str
    weights: str | None = None

    def __str__(self) -> str:
        if self.source == EMBEDDED:
            text = EMBEDDED
        else:
            text = f"{self.source}:{self.name}"
        return text if self.weights is None else f"{text}@{self.weights}"


def parse_backbone(text: str) -> BackboneSpec:
    """Read ``[source:]name[@weights]``.

    A bare name means, in this order: the embedded network, a torchvision name,
    a transformers id (it contains "/", is a folder or a known id such as
    "gpt2"), a timm name. What is installed plays no part, so installing an
    extra never changes what a string means.

    Raises
    ------
    ValueError
        If the text is empty or names nothing, or another embedded network than
        the one there is.
    """
    head, colon, rest = text.partition(":")
    source, body = (head, rest) if colon and head in SOURCES else (None, text)
    name, at, weights = body.rpartition("@") if "@" in body else (body, "", "")
    if not name or (at and not weights):
        raise ValueError(
            f"backbone={text!r} is not of the form '[source:]name[@weights]'. "
            "Write for example 'resnet18', 'torchvision:resnet18@random' or "
            "'sentence-transformers/all-MiniLM-L6-v2'."
        )
    spec = BackboneSpec(source or _guess_source(name), name, weights or None)
    if spec.source == EMBEDDED and name != EMBEDDED:
        raise ValueError(
            f"backbone={text!r}: there is one embedded network, and {name!r} is no "
            f"name of it. Write {EMBEDDED!r}, or {body!r} if you mean a network of "
            "that name."
        )
    if spec.source == "torchvision":
        return _with_pinned_weights(spec, text)
    return spec


def _guess_source(name: str) -> str:
    if name == EMBEDDED:
        return EMBEDDED
    if name in TORCHVISION_WEIGHTS:
        return "torchvision"
    # A folder is recognised by its separator, never by looking at the disk:
    # a folder that happens to be called "resnet50d" must not change a meaning.
    if "/" in name or "\\" in name or name in BARE_HF_IDS:
        return "hf"
    return "timm"


def _with_pinned_weights(spec: BackboneSpec, text: str) -> BackboneSpec:
    if spec.name not in TORCHVISION_WEIGHTS:
        import difflib

        near = difflib.get_close_matches(spec.name, TORCHVISION_WEIGHTS, n=3)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(
            f"backbone={text!r}: torchvision has no classification network "
            f"{spec.name!r}.{hint} list_backbones('torchvision') names them all."
        )
    if spec.weights is not None:
        return spec
    return BackboneSpec(spec.source, spec.name, TORCHVISION_WEIGHTS[spec.name][0])


@dataclass(frozen=True)
class TextRecipe:
    """How a text becomes tokens; part of every key, so plain values only.

    Parameters
    ----------
    max_length : int
        Longest sequence in tokens, special tokens included.
    tokenizer : str
        sha256 of the tokenizer's serialised state.
    prompt : str
        Put before every text; "" for none.
    """

    max_length: int
    tokenizer: str
    prompt: str = ""


def resolve_layers(layers, stage_names: Sequence[str]) -> tuple[int, ...]:
    """Stage numbers, 1 .. N, that ``layers`` asks for, in order.

    Parameters
    ----------
    layers : "last", "all", str, int or sequence of str and int
        A stage name; a number counts from 1, a negative one from the end.
    stage_names : sequence of str

    Raises
    ------
    ValueError
        If a name or number is not a stage (the message lists the names), or if a
        stage is asked for twice: its columns would have the same names.
    """
    n = len(stage_names)
    if isinstance(layers, str) and layers == "last":
        return (n,)
    if isinstance(layers, str) and layers == "all":
        return tuple(range(1, n + 1))
    single = isinstance(layers, (str, int)) or not isinstance(layers, Iterable)
    wanted = [layers] if single else list(layers)
    if not wanted:
        raise ValueError("layers is empty; write layers='last' for the usual vector.")
    stages = tuple(_resolve_layer(layer, stage_names) for layer in wanted)
    twice = next((k for k in stages if stages.count(k) > 1), None)
    if twice is not None:
        each_once = [stage_names[k - 1] for k in dict.fromkeys(stages)]
        raise ValueError(
            f"layers={layers!r} asks for the stage {stage_names[twice - 1]!r} "
            f"{stages.count(twice)} times. Write layers={each_once}."
        )
    return stages


def _resolve_layer(layer, stage_names: Sequence[str]) -> int:
    n = len(stage_names)
    if isinstance(layer, str):
        if layer == "last":
            return n
        if layer in stage_names:
            return list(stage_names).index(layer) + 1
    elif hasattr(layer, "__index__") and not isinstance(layer, bool):
        number = layer.__index__()
        if 1 <= number <= n:
            return number
        if -n <= number <= -1:
            return n + 1 + number
    raise ValueError(
        f"layers={layer!r} is not a stage of this backbone. Its {n} stages are "
        f"{', '.join(map(repr, stage_names))}; write a name, a number from 1 to "
        f"{n} (or -1 to -{n}), 'last', 'all', or a list of these."
    )


def resolve_freeze_depth(freeze_depth, stage_names: Sequence[str]) -> int:
    """How many stages from the front ``freeze_depth`` freezes, 0 .. N.

    Parameters
    ----------
    freeze_depth : "all", str or int
        A number freezes the first so many, 0 none; -j all but the last j. A stage
        name freezes up to and including that stage; "all" freezes all N.
    stage_names : sequence of str

    Raises
    ------
    ValueError
        If it is no such name or number; the message lists the names.

    Examples
    --------
    >>> resolve_freeze_depth("layer1", ["stem", "layer1", "layer2"])
    2
    >>> resolve_freeze_depth(-1, ["stem", "layer1", "layer2"])
    2
    """
    names, n = list(stage_names), len(stage_names)
    if isinstance(freeze_depth, str):
        if freeze_depth == "all":
            return n
        if freeze_depth in names:
            return names.index(freeze_depth) + 1
    elif not isinstance(freeze_depth, (bool, np.bool_)):
        with suppress(TypeError):
            number = operator.index(freeze_depth)
            if -n <= number <= n:
                return number if number >= 0 else n + number
    raise ValueError(
        f"freeze_depth={freeze_depth!r} is no depth of this backbone. Its {n} stages "
        f"are {', '.join(map(repr, names))}; write a name to freeze up to and "
        f"including that stage, a number from 0 to {n} to freeze so many, -1 to -{n} "
        "to leave so many at the end trainable, or freeze_depth='all'."
    )


def fingerprint_text(*parts: object) -> str:
    """Sha256, in hexadecimal, of the parts' representations in order."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()
