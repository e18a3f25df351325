"""From what the user wrote to a loaded backbone, kept for the process."""

from __future__ import annotations

import os
import stat
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

from sklearn_transfer._locks import ForkSafeLock
from sklearn_transfer.backbones.spec import (
    BARE_HF_IDS,
    EMBEDDED,
    SOURCES,
    BackboneSpec,
    parse_backbone,
)
from sklearn_transfer.backbones.torchvision_names import TORCHVISION_WEIGHTS

# Backbones kept loaded. A grid over a few networks should load each once;
# more would hold gigabytes that a finished search no longer needs.
KEPT = 4
# Levels of a model's folder whose files are watched: its own, those of its modules
# ("1_Pooling"), and one more. Deeper lies nothing that is loaded.
WATCHED_LEVELS = 3

_loaded: OrderedDict[tuple, object] = OrderedDict()
_fingerprints: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_lock = ForkSafeLock()


def list_backbones(kind: str | None = None) -> list[str]:
    """Names that ``backbone=`` takes.

    Any Hugging Face id or local folder is taken too ("organisation/name"); of
    those, only the few known by a bare name are listed.

    Parameters
    ----------
    kind : {"embedded", "torchvision", "timm", "hf", "image", "text"}, default=None
        One source, or all of one modality. None lists everything. timm's names
        are listed where timm is installed.

    Returns
    -------
    names : list of str
        Sorted within each source.

    Raises
    ------
    ValueError
        If ``kind`` is none of these.

    Examples
    --------
    >>> from sklearn_transfer import list_backbones
    >>> list_backbones("embedded")
    ['embedded']
    >>> "resnet50" in list_backbones("torchvision")
    True
    """
    names: dict[str, Callable[[], list[str]]] = {
        EMBEDDED: lambda: [EMBEDDED],
        "torchvision": lambda: sorted(TORCHVISION_WEIGHTS),
        "timm": _timm_names,
        "hf": lambda: sorted(BARE_HF_IDS),
    }
    groups = {"image": SOURCES[:3], "text": SOURCES[3:]}
    wanted = SOURCES if kind is None else groups.get(kind, (kind,))
    if wanted[0] not in names:
        raise ValueError(
            f"kind={kind!r} is none of {', '.join(map(repr, names))}, 'image', "
            "'text' or None."
        )
    return [name for source in wanted for name in names[source]()]


def _timm_names() -> list[str]:
    try:
        import timm
    except ImportError:
        return []
    return [f"timm:{name}" for name in timm.list_models()]


def load_image_backbone(backbone, image_size=None):
    """The StagedBackbone that an image estimator's parameters name.

    Parameters
    ----------
    backbone : str or ModuleBackbone
    image_size : int, (int, int) or None

    Raises
    ------
    ValueError
        If the name is unknown, or names a text network.
    BackboneNotFoundError
        If its files are not here and cannot be downloaded.
    """
    if not isinstance(backbone, str):
        return _remember((backbone, image_size), lambda: backbone.load(image_size))
    spec = parse_backbone(backbone)
    if spec.source == "hf":
        raise ValueError(
            f"backbone={backbone!r} names a text network (Hugging Face). For images "
            "write for example 'embedded', 'resnet50' or 'timm:convnext_atto'; texts "
            "are for the estimators whose names begin with Text."
        )
    key = (*_identity(spec), image_size)
    return _remember(key, lambda: _load_image(spec, image_size))


def load_text_backbone(backbone: str, max_length: int | None, prompt: str | None):
    """The StagedBackbone that a text estimator's parameters name.

    Raises
    ------
    ValueError
        If it names an image network.
    BackboneNotFoundError
        If its files are not here and cannot be downloaded.
    """
    from sklearn_transfer.backbones import from_transformers

    spec = _parse_text_backbone(backbone)
    if spec.source != "hf":
        raise ValueError(
            f"backbone={backbone!r} names an image network ({spec.source}). For texts "
            "write for example 'sentence-transformers/all-MiniLM-L6-v2' or the "
            "folder of a model; images are for the estimators whose names begin with "
            "Image."
        )
    key = (*_identity(spec), max_length, prompt)
    return _remember(
        key,
        lambda: from_transformers.load(spec.name, spec.weights, max_length, prompt),
    )


def fingerprint(backbone) -> str:
    """The fingerprint of a loaded backbone, computed once: it stays frozen."""
    with _lock.held():
        if backbone not in _fingerprints:
            _fingerprints[backbone] = backbone.fingerprint()
        return _fingerprints[backbone]


def _parse_text_backbone(backbone: str) -> BackboneSpec:
    """As ``parse_backbone``; where only texts can be, a folder needs no "./".

    The whole is tried first: a folder's path may hold an "@".
    """
    path = backbone.removeprefix("hf:")
    if _is_folder(path):
        return BackboneSpec("hf", path)
    is_folder = _is_folder(path.rpartition("@")[0])
    return parse_backbone(f"hf:{path}" if is_folder else backbone)


def _is_folder(path: str) -> bool:
    # "" would be the working directory.
    return bool(path) and os.path.isdir(os.path.expanduser(path))


def _load_image(spec: BackboneSpec, image_size):
    if spec.source == EMBEDDED:
        from sklearn_transfer.backbones.embedded.load import load

        return load(spec.weights, image_size)
    if spec.source == "torchvision":
        from sklearn_transfer.backbones import from_torchvision

        assert spec.weights is not None  # an enum is pinned where none was named
        return from_torchvision.load(spec.name, spec.weights, image_size)
    from sklearn_transfer.backbones import from_timm

    return from_timm.load(spec.name, spec.weights, image_size)


def _identity(spec: BackboneSpec) -> tuple:
    """The spec, and the state of the local files and folders that it names.

    What is written anew under the same name is another network. A path counts by
    where it leads: after os.chdir the same text may be another file, and another
    text the same.
    """
    from sklearn_transfer.backbones.weights import is_weight_file

    name, weights, watched = spec.name, spec.weights, []
    # What the loaders take for a path, and nothing else: a hub's id may be spelled
    # like a file that happens to lie here.
    if spec.source == "hf" and _is_folder(name):
        name = os.path.realpath(os.path.expanduser(name))
        watched.append(name)
    if weights is not None and is_weight_file(weights):
        weights = os.path.realpath(os.path.expanduser(weights))
        watched.append(weights)
    stamps = [tuple(_stamps(Path(path), WATCHED_LEVELS)) for path in watched]
    return (spec.source, name, weights, *stamps)


def _stamps(path: Path, levels: int) -> Iterator[tuple]:
    """Name, inode, size and time of the file, or of every file in the folder."""
    try:
        status = path.stat()
        is_folder = stat.S_ISDIR(status.st_mode)
        inside = sorted(path.iterdir()) if is_folder and levels else ()
    except OSError:
        return  # gone, or not to be read: if it is needed, loading says so
    if not is_folder:
        yield str(path), status.st_ino, status.st_size, status.st_mtime_ns
    for child in inside:
        if not child.name.startswith("."):  # .git, .cache
            yield from _stamps(child, levels - 1)


def _remember(key: tuple, load: Callable[[], object]):
    with _lock.held():
        if key not in _loaded:
            _loaded[key] = load()
            while len(_loaded) > KEPT:
                _loaded.popitem(last=False)
        _loaded.move_to_end(key)
        return _loaded[key]
