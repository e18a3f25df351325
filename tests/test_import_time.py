"""What an import may load; seconds are for the benchmark, not for a test."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = (
    "torch",
    "torchvision",
    "transformers",
    "sentence_transformers",
    "skorch",
    "timm",
)


def loaded_after(code: str) -> set[str]:
    """Top-level modules in sys.modules of a fresh interpreter after ``code``."""
    code += "\nimport sys; print(*{name.split('.')[0] for name in sys.modules})"
    run = [sys.executable, "-W", "error", "-c", code]
    return set(
        subprocess.run(run, check=True, capture_output=True, text=True).stdout.split()
    )


def test_importing_the_package_loads_neither_torch_nor_sklearn():
    assert not loaded_after("import sklearn_transfer") & {*HEAVY, "sklearn", "numpy"}


@pytest.mark.parametrize(
    "code",
    [
        "ImageFeaturizer(); repr(ImageFeaturizer()); ImageFeaturizer()._repr_html_()",
        "dir(TextFeaturizer()); clone(TextFeaturizer().set_params(backbone='gpt2'))",
        "pickle.loads(pickle.dumps(ImageFeaturizer('resnet50')))",
        "list_backbones('torchvision'); cache_info()",
    ],
)
def test_nothing_but_fit_loads_torch(code):
    names = "ImageFeaturizer, TextFeaturizer, cache_info, list_backbones"
    before = (
        "import pickle; from sklearn.base import clone\n"
        f"from sklearn_transfer import {names}\n"
    )
    assert not loaded_after(before + code) & set(HEAVY)


def test_every_public_name_is_there():
    import sklearn_transfer

    for name in sklearn_transfer.__all__:
        assert getattr(sklearn_transfer, name).__module__.startswith(
            "sklearn_transfer."
        )
    with pytest.raises(AttributeError, match="no attribute 'ImageFeaturiser'"):
        sklearn_transfer.ImageFeaturiser  # noqa: B018
