"""Transfer learning that feels like scikit-learn.

Frozen pretrained networks as transformers, for any scikit-learn estimator, and
fine-tuned ones as classifiers and regressors.
Importing the package loads neither torch nor scikit-learn: each public name is
imported when it is first asked for (PEP 562).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from sklearn_transfer._show_versions import show_versions
    from sklearn_transfer.backbones.from_module import backbone_from_module
    from sklearn_transfer.backbones.registry import list_backbones
    from sklearn_transfer.featurizers.image import ImageFeaturizer
    from sklearn_transfer.featurizers.text import TextFeaturizer
    from sklearn_transfer.fine_tuning.image import ImageClassifier, ImageRegressor
    from sklearn_transfer.fine_tuning.text import TextClassifier, TextRegressor
    from sklearn_transfer.inputs.folders import load_image_folder
    from sklearn_transfer.store.session import cache_info, clear_cache

_HOME = {
    "ImageClassifier": "sklearn_transfer.fine_tuning.image",
    "ImageFeaturizer": "sklearn_transfer.featurizers.image",
    "ImageRegressor": "sklearn_transfer.fine_tuning.image",
    "TextClassifier": "sklearn_transfer.fine_tuning.text",
    "TextFeaturizer": "sklearn_transfer.featurizers.text",
    "TextRegressor": "sklearn_transfer.fine_tuning.text",
    "backbone_from_module": "sklearn_transfer.backbones.from_module",
    "cache_info": "sklearn_transfer.store.session",
    "clear_cache": "sklearn_transfer.store.session",
    "list_backbones": "sklearn_transfer.backbones.registry",
    "load_image_folder": "sklearn_transfer.inputs.folders",
    "show_versions": "sklearn_transfer._show_versions",
}

__all__ = [
    "ImageClassifier",
    "ImageFeaturizer",
    "ImageRegressor",
    "TextClassifier",
    "TextFeaturizer",
    "TextRegressor",
    "backbone_from_module",
    "cache_info",
    "clear_cache",
    "list_backbones",
    "load_image_folder",
    "show_versions",
]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
