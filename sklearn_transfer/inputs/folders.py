"""A folder of class folders, as paths and labels."""

from __future__ import annotations

import os

import numpy as np

from sklearn_transfer.inputs.files import readable_suffixes

_SPLITS = frozenset({"train", "test", "val", "valid", "validation"})


def load_image_folder(path) -> tuple[np.ndarray, np.ndarray]:
    """List the images in a folder that holds one sub-folder a class.

    Nothing is opened: files are chosen by their suffix, recursively within each
    class folder. Hidden files and folders (".name") are skipped.

    Parameters
    ----------
    path : str or path-like
        Folder with class sub-folders.

    Returns
    -------
    paths : ndarray of str, shape (n,)
        Sorted by class, then by path.
    labels : ndarray of str, shape (n,)
        Name of the class folder of each path.

    Raises
    ------
    FileNotFoundError, NotADirectoryError
        If ``path`` is no folder.
    ValueError
        If there is no class folder, no image in any of them, or if the
        sub-folders are splits ("train", "test") rather than classes.

    Examples
    --------
    >>> import os, tempfile
    >>> from PIL import Image
    >>> from sklearn_transfer.inputs.folders import load_image_folder
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("ant", "bee"):
    ...         os.mkdir(os.path.join(folder, name))
    ...         Image.new("RGB", (8, 8)).save(os.path.join(folder, name, "1.png"))
    ...     paths, labels = load_image_folder(folder)
    >>> [os.path.basename(p) for p in paths], labels.tolist()
    (['1.png', '1.png'], ['ant', 'bee'])
    """
    root = os.fsdecode(path)
    with os.scandir(root) as entries:
        classes = sorted(e.name for e in entries if e.is_dir() and _is_shown(e.name))
    if not classes:
        raise ValueError(
            f"{root!r} has no sub-folder; one folder a class is needed, for example "
            f"{os.path.join(root, 'ant', '1.jpg')!r}."
        )
    if all(_is_split(root, name) for name in classes):
        raise ValueError(
            f"The sub-folders of {root!r} are splits, not classes. Write "
            f"load_image_folder({os.path.join(root, classes[-1])!r})."
        )
    suffixes = readable_suffixes()
    paths, labels = [], []
    for name in classes:
        found = sorted(_images_below(os.path.join(root, name), suffixes))
        paths += found
        labels += [name] * len(found)
    if not paths:
        raise ValueError(
            f"No image below the {len(classes)} sub-folders of {root!r}. Files are "
            "chosen by suffix, such as .jpg, .png, .tif or .webp."
        )
    return np.array(paths), np.array(labels)


def _is_shown(name: str) -> bool:
    return not name.startswith(".")


def _is_split(root: str, name: str) -> bool:
    """Whether this is a "train" or "test" folder that holds folders only."""
    if name.lower() not in _SPLITS:
        return False
    with os.scandir(os.path.join(root, name)) as entries:
        inside = [entry.is_dir() for entry in entries if _is_shown(entry.name)]
    return bool(inside) and all(inside)


def _images_below(folder: str, suffixes: frozenset[str]):
    # A class folder may be a link; links further down are not followed, because
    # they can form loops.
    for parent, folders, files in os.walk(folder):
        folders[:] = filter(_is_shown, folders)
        for name in files:
            if _is_shown(name) and os.path.splitext(name)[1].lower() in suffixes:
                yield os.path.join(parent, name)
