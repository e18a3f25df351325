"""What an import may load; seconds are for the benchmark, not for a test."""

from __future__ import annotations

import subprocess
import sys

import pytest

import sklearn_transfer
from tests.test_layers import FILES, MAY_IMPORT_TORCH, NO_TORCH_FILES

ESTIMATORS = ("Featurizer", "Classifier", "Regressor")
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


@pytest.mark.parametrize(
    "name",
    [name for name in sklearn_transfer.__all__ if name.endswith(ESTIMATORS)],
)
def test_an_unfitted_estimator_loads_no_torch(name):
    code = f"""
import pickle
from sklearn.base import clone
from sklearn_transfer import {name}
model = pickle.loads(pickle.dumps(clone({name}().set_params(device="cpu"))))
repr(model), model._repr_html_(), [getattr(model, n, None) for n in dir(model)]
"""
    assert not loaded_after(code) & set(HEAVY)


def test_no_module_loads_torch_but_those_that_run_networks():
    light = [
        "sklearn_transfer." + file.removesuffix(".py").replace("/", ".")
        for file in FILES
        if file.split("/")[0] not in MAY_IMPORT_TORCH or file in NO_TORCH_FILES
        if not file.endswith(("__init__.py", "__main__.py"))
    ]
    assert len(light) > 40
    code = f"import importlib\nfor name in {light}: importlib.import_module(name)"
    assert not loaded_after(code) & set(HEAVY)


def test_every_public_name_is_there():
    for name in sklearn_transfer.__all__:
        assert getattr(sklearn_transfer, name).__module__.startswith(
            "sklearn_transfer."
        )
    with pytest.raises(AttributeError, match="no attribute 'ImageFeaturiser'"):
        sklearn_transfer.ImageFeaturiser  # noqa: B018
