"""Weight files: found, fetched, read without running code, copied into a network."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from sklearn_transfer.exceptions import BackboneNotFoundError, WeightsError

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".pth.tar")
# Where training scripts put the tensors among other things.
NESTED_UNDER = ("state_dict", "model_state_dict", "model", "net")
SHOWN = 5


def offline() -> bool:
    """Whether HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids downloads."""
    values = (os.environ.get(k, "") for k in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(value.upper() in ("1", "ON", "YES", "TRUE") for value in values)


def is_weight_file(weights: str) -> bool:
    """Whether ``weights`` means a file: by its form, never by looking at the disk."""
    if weights.lower().endswith(WEIGHT_SUFFIXES):
        return True
    # "refs/pr/1" is how the Hugging Face hub names the revision of a pull request;
    # a file without suffix in a folder of that name is "./refs/file".
    is_revision = weights.startswith("refs/")
    return not is_revision and ("/" in weights or "\\" in weights)


@contextlib.contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Random initialisation that is the same each time and leaves no trace.

    ``torch.manual_seed`` would also reseed every GPU, which nothing restores.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def fetch(url: str, name: str) -> Path:
    """The checkpoint of ``url`` in torch.hub's folder, downloaded once, verified.

    Parameters
    ----------
    url : str
        Its file name holds the first digits of the content's sha256.
    name : str
        Backbone string without weights, for messages.

    Raises
    ------
    BackboneNotFoundError
        If the file is not there and downloading is forbidden or fails.
    WeightsError
        If the file is there and its content is not what its name says.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    expected = re.search(r"-([a-f0-9]{8,})\.", path.name)
    if path.is_file():
        _check_digest(path, expected[1] if expected else "", url)
        return path
    reason = "HF_HUB_OFFLINE forbids downloads"
    if not offline():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Not load_state_dict_from_url: it prints, and unpickles by default.
            torch.hub.download_url_to_file(
                url, str(path), expected and expected[1], progress=False
            )
            return path
        except (OSError, RuntimeError) as error:
            reason = f"downloading {url} failed ({error})"
    raise BackboneNotFoundError(
        f"The weights of {name!r}, {path.name}, are not in {path.parent}, and "
        f"{reason}. Connect to the network and try again, name a file you have "
        f"(backbone='{name}@/path/to/weights.safetensors'), or use the network that "
        "ships with the package (backbone='embedded')."
    )


def _check_digest(path: Path, expected: str, url: str) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(expected):
        raise WeightsError(
            f"{path} is damaged or another file: its sha256 starts with "
            f"{digest[: len(expected)]}, its name says {expected}. Delete it; it is "
            f"downloaded again from {url}."
        )


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read the named tensors of a weight file; code inside it never runs.

    Parameters
    ----------
    path : path
        A .safetensors file, or anything ``torch.load(weights_only=True)`` reads.
        Tensors below "state_dict", "model" and the like are found there.

    Raises
    ------
    BackboneNotFoundError
        If there is no such file.
    WeightsError
        If it holds no named tensors, or objects that only unpickling would give.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise BackboneNotFoundError(
            f"There is no weight file {path} (absolute: {path.absolute()}). Check the "
            "path after the '@' of backbone=."
        )
    content = _read(path)
    nested = next(
        (
            content[key]
            for key in NESTED_UNDER
            if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)
        ),
        content,
    )
    tensors = (
        {k: v for k, v in nested.items() if isinstance(v, Tensor)}
        if isinstance(nested, Mapping)
        else {}
    )
    if not tensors:
        raise WeightsError(
            f"{path} holds no named tensors but {type(content).__name__}. Write one "
            "with safetensors.torch.save_file(model.state_dict(), path)."
        )
    return tensors


def _read(path: Path) -> object:
    if path.suffix.lower() == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise WeightsError(
                f"{path} is not a safetensors file or is cut short: {error}"
            ) from error
    try:
        with warnings.catch_warnings():
            # It wonders aloud about files it then refuses.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch's own message advises weights_only=False, which runs the payload.
        raise WeightsError(
            f"{path} holds Python objects besides tensors, or is damaged. Loading them "
            "could run any code, so it is refused. Where you trust the file, convert "
            "it once: safetensors.torch.save_file(model.state_dict(), path), or "
            "torch.save(model.state_dict(), path)."
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise WeightsError(f"{path} is no PyTorch weight file: {error}") from error


def match_keys(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` under the module's own keys: a constant prefix is added or cut.

    Of all prefixes by which some key of the file becomes one of the module's, the
    one that explains most keys is taken; no prefix where none explains more.
    """
    keys = set(module.state_dict())
    plain = sum(key in keys for key in state)
    gains: Counter[tuple[str, str]] = Counter()
    for key in state:
        parts = key.split(".")
        for i in range(1, len(parts)):
            if ".".join(parts[i:]) in keys:
                gains["cut", ".".join(parts[:i]) + "."] += 1
    for key in keys:
        parts = key.split(".")
        for i in range(1, len(parts)):
            if ".".join(parts[i:]) in state:
                gains["add", ".".join(parts[:i]) + "."] += 1
    (action, prefix), gain = max(
        gains.items(), key=lambda item: item[1], default=(("add", ""), 0)
    )
    if gain <= plain:
        return dict(state)
    if action == "cut":
        return {key.removeprefix(prefix): t for key, t in state.items()}
    # A head may stand beside a body that lost its prefix: leave its keys alone.
    return {prefix + k if prefix + k in keys else k: t for k, t in state.items()}


@torch.no_grad()
def load_body(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    is_head: Callable[[str], bool],
    source: str,
) -> None:
    """Copy every tensor of the body from ``state`` into ``module``, in its dtype.

    Parameters
    ----------
    module : Module
    state : mapping of str to Tensor
        A constant prefix of its keys may be missing or extra. BatchNorm's counter
        ``num_batches_tracked`` may be absent.
    is_head : callable
        Says of a key, the module's or the file's, whether it belongs to a head.
        Such tensors may be absent, are copied where they fit and ignored else.
    source : str
        What is loaded into what, for messages.

    Raises
    ------
    WeightsError
        If a tensor of the body is absent or of another shape, or if the file
        holds tensors that are neither body nor head: it is of another network.
    """
    state = match_keys(module, state)
    own = module.state_dict()
    wrong = []
    for key, tensor in own.items():
        found = state.get(key)
        if found is not None and found.shape == tensor.shape:
            tensor.copy_(found)
        elif not is_head(key) and not key.endswith("num_batches_tracked"):
            shape = "absent" if found is None else tuple(found.shape)
            wrong.append(f"{key}: {shape}, needed {tuple(tensor.shape)}")
    n_wrong = len(wrong)
    extra = [key for key in state if key not in own and not is_head(key)]
    wrong += [f"{key}: {tuple(state[key].shape)}, not in the network" for key in extra]
    if wrong:
        shown = "".join(f"\n  {line}" for line in wrong[:SHOWN])
        more = f"\n  and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise WeightsError(
            f"{source}: the file is of another network. {n_wrong} of the network's "
            f"{len(own)} tensors are absent or of another shape, {len(extra)} in the "
            f"file are unknown:{shown}{more}\nName the network that the file was "
            "made for before the '@'; only the head may differ."
        )
