"""What scikit-learn asks of an estimator, asked of every public one.

The estimators are found in ``sklearn_transfer.__all__``: a new one is asked too.
"""

from __future__ import annotations

import doctest
import inspect
import itertools
import pickle
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from functools import cache

import numpy as np
import pandas as pd
import polars as pl
import pytest
from sklearn import config_context
from sklearn.base import BaseEstimator, clone
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils._param_validation import (
    generate_invalid_param_val,
    make_constraint,
)
from sklearn.utils.estimator_checks import parametrize_with_checks

from sklearn_transfer._sklearn import InvalidParameterError
from tests.contract_doubles import (
    ESTIMATORS,
    PUBLIC,
    data,
    doubles,
    parameters,
    quick,
    reads_images,
)

every_estimator = pytest.mark.parametrize("cls", ESTIMATORS)
FINE_TUNERS = [cls for cls in ESTIMATORS if "freeze_depth" in parameters(cls)]
every_fine_tuner = pytest.mark.parametrize("cls", FINE_TUNERS)


@cache
def fitted(cls):
    """A fitted estimator; tests that change it take a copy."""
    X, y = data(cls)
    return quick(cls).fit(X, y)


# --- scikit-learn's own checks ---------------------------------------------------

STEPS = "rows that are repeated make other minibatches, and those make other steps"


def expected_failures(estimator) -> dict[str, str]:
    """Of what is trained by steps: all else holds to the last digit asked for."""
    if getattr(estimator, "freeze_depth", "all") == "all":
        return {}
    return {"check_sample_weight_equivalence_on_dense_data": STEPS}


@parametrize_with_checks(
    doubles(), expected_failed_checks=expected_failures, xfail_strict=True
)
def test_sklearn_checks(estimator, check):
    asks_for_single_rows = check.func.__name__ == "check_methods_subset_invariance"
    with each_row_by_itself() if asks_for_single_rows else nullcontext():
        check(estimator)


@contextmanager
def each_row_by_itself():
    """Convolutions whose rounding does not depend on the batch.

    Libraries choose a way to multiply by the size of the batch, and with it the last
    digit of float32, which is all that the check would find.
    """
    import torch

    before = torch._C._get_mkldnn_enabled(), torch._C._get_nnpack_enabled()
    torch._C._set_mkldnn_enabled(False)
    torch._C._set_nnpack_enabled(False)
    yield
    torch._C._set_mkldnn_enabled(before[0])
    torch._C._set_nnpack_enabled(before[1])


def test_every_public_estimator_has_doubles():
    doubled = {base for double in doubles() for base in type(double).__mro__}
    assert ESTIMATORS
    assert set(ESTIMATORS) <= doubled
    # A public class that is no estimator would be asked nothing here.
    assert {found for found in PUBLIC if inspect.isclass(found)} == set(ESTIMATORS)


def test_no_check_is_skipped_by_tags():
    from sklearn.utils.estimator_checks import estimator_checks_generator

    plain = {type(model): set() for model in doubles()}
    for model in doubles():
        assert not model.__sklearn_tags__().no_validation
        assert not model.__sklearn_tags__()._skip_test
        for _, check in estimator_checks_generator(model, legacy=True):
            plain[type(model)].add(getattr(check, "func", check).__name__)
    asked_of_any_transformer = {
        "check_transformer_general",
        "check_methods_subset_invariance",
        "check_n_features_in_after_fitting",
        "check_estimators_pickle",
        "check_dict_unchanged",
    }
    for checks in plain.values():
        assert asked_of_any_transformer <= checks
        assert len(checks) > 35


@pytest.mark.parametrize("shuffled", [False, True])
@every_fine_tuner
def test_a_probe_depends_neither_on_order_nor_on_copies_for_weights(cls, shuffled):
    X, y = data(cls, 24)
    order = np.random.default_rng(0).permutation(24) if shuffled else np.arange(24)
    weights = 1 + np.arange(24) % 3
    repeated = quick(cls, freeze_depth="all").fit(
        [X[i] for i in np.repeat(np.arange(24), weights)], np.repeat(y, weights)
    )
    weighted = quick(cls, freeze_depth="all").fit(
        [X[i] for i in order], y[order], sample_weight=weights[order]
    )
    ask = "decision_function" if hasattr(cls, "decision_function") else "predict"
    found, expected = (getattr(model, ask)(X) for model in (weighted, repeated))
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.float64


# --- parameters ------------------------------------------------------------------


@every_estimator
def test_constraints_cover_the_signature(cls):
    assert set(cls._parameter_constraints) == set(parameters(cls))


@every_estimator
def test_parameters_are_stored_untouched(cls):
    given = {name: object() for name in parameters(cls)}
    estimator = cls(**given)
    assert {name: id(value) for name, value in vars(estimator).items()} == {
        name: id(value) for name, value in given.items()
    }
    assert estimator.get_params() == given
    # set_params, and clone which copies what can be copied, store untouched too.
    again = cls().set_params(**given)
    assert vars(again) == given
    copied = clone(cls(verbose=1, pooling="avg", cache="/some/where"))
    assert (
        copied.get_params()
        == cls(verbose=1, pooling="avg", cache="/some/where").get_params()
    )
    with pytest.raises(ValueError, match="Invalid parameter 'no_such'"):
        estimator.set_params(no_such=1)


@every_estimator
def test_fit_leaves_parameters_and_data_as_they_were(cls):
    X, y = data(cls)
    model = quick(cls)
    before, copied = dict(model.get_params()), [np.copy(row) for row in X]
    y_before = y.copy()
    model.fit(X, y)
    model.transform(X)
    assert all(model.get_params()[name] is value for name, value in before.items())
    assert all(np.array_equal(row, copy) for row, copy in zip(X, copied, strict=True))
    np.testing.assert_array_equal(y, y_before)


class Nonsense:
    """No parameter is one of these."""


def invalid_values():
    """(class, parameter, value): what no constraint of the parameter allows."""
    for cls in ESTIMATORS:
        for name, allowed in cls._parameter_constraints.items():
            yield cls, name, Nonsense()
            for constraint in [] if allowed == "no_validation" else allowed:
                try:
                    value = generate_invalid_param_val(make_constraint(constraint))
                except NotImplementedError:  # a mere type: Nonsense is not of it
                    continue
                yield cls, name, value


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    list(invalid_values()),
    ids=lambda given: getattr(given, "__name__", None) or str(given)[:24],
)
def test_invalid_values_are_refused_by_name(cls, name, value):
    X, y = data(cls)
    model = quick(cls).set_params(**{name: value})
    fits = [model.fit] + ([model.partial_fit] if hasattr(model, "partial_fit") else [])
    for fit in fits:
        with pytest.raises(InvalidParameterError, match=rf"\b{name}\b"):
            fit(X, y)
    assert not hasattr(model, "stage_names_")


# Right in kind, and wrong in what they say: of these the error may come later.
WRONG = {
    "backbone": ["", "no_such_network", ":", "resnet18@no_such_weights"],
    "batch_size": [0, -1],
    "callbacks": [["x"], [Nonsense()]],
    "class_weight": [[1.0], {0: -1.0}, {0: "heavy"}, {0: float("nan")}, {7: 1.0}],
    "device": ["warp", "cuda:x", ""],
    "freeze_depth": [True, 99, -99, "no_such_stage"],
    "image_shape": [(8,), (0, 8), ("a", 8), (24, 24, 3, 1)],
    "image_size": [0, -1, True, (8,), (8, 8, 8), ("a", 8), (8, 2.5)],
    "layers": [[], [Nonsense()], 0, 99, True, ["no_such_stage"], "no_such_stage"],
    "lr": [float("nan"), float("inf"), -1.0],
    "max_length": [0, 1, 10_000],
    "scoring": ["no_such_score"],
    "value_range": [(1, 0), (0,), ("a", "b"), (0, float("nan")), (0, 0)],
}


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    [
        (cls, name, value)
        for cls in ESTIMATORS
        for name in parameters(cls)
        for value in WRONG.get(name, [])
    ],
    ids=lambda given: getattr(given, "__name__", None) or str(given)[:24],
)
def test_wrong_values_are_refused_by_name_and_leave_nothing(cls, name, value):
    X, y = data(cls)
    model = quick(cls).set_params(**{name: value})
    with pytest.raises((ValueError, OSError)) as caught:
        model.fit(X, y)
    named = str(value) if name in ("backbone", "scoring") else name
    assert named in str(caught.value)
    assert not hasattr(model, "net_")


# --- nothing loads before it is needed -------------------------------------------

HEAVY = {"torch", "torchvision", "skorch", "transformers", "tokenizers", "timm"}

GUARD = """
import sys

def forbid(event, args):
    if event.startswith(("socket.connect", "socket.getaddrinfo", "urllib.")):
        raise AssertionError(f"network: {event} {args}")
    weights = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".npz")
    if event == "open" and str(args[0]).endswith(weights):
        raise AssertionError(f"weights: {args[0]}")

sys.addaudithook(forbid)
"""


def modules_after(code: str) -> set[str]:
    """What a process has loaded that may open neither sockets nor weights."""
    tell = "print('LOADED', *{name.split('.')[0] for name in sys.modules})"
    run = [sys.executable, "-W", "error", "-c", f"{GUARD}\n{code}\n{tell}"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.partition("LOADED")[2].split())


LOOK_AT = """
    repr(model), str(model), model._repr_html_(), model._repr_mimebundle_()
    copied = clone(model)
    for one in (model, copied):
        one.set_params(**one.get_params())
        for name in dir(one):  # as tab completion does
            if not name.startswith("_"):
                hasattr(one, name)
"""


def test_looking_at_an_estimator_loads_nothing():
    names = ", ".join(cls.__name__ for cls in ESTIMATORS)
    loaded = modules_after(
        "import pickle\n"
        "from sklearn.base import clone\n"
        f"from sklearn_transfer import {names}\n"
        f"for model in [cls() for cls in ({names},)]:\n"
        "    model.set_params(backbone='org/no_such_model')\n"
        f"{LOOK_AT}"
        "    pickle.loads(pickle.dumps(model))\n"
    )
    assert "sklearn_transfer" in loaded
    assert not loaded & HEAVY


def test_unpickling_a_fitted_estimator_loads_nothing(tmp_path):
    for cls in ESTIMATORS:
        (tmp_path / cls.__name__).write_bytes(pickle.dumps(fitted(cls)))
    # net_ is what is built when first asked for.
    look = LOOK_AT.replace("startswith", "rstrip('_').startswith")
    look = look.replace('("_")', "('_') and name != 'net_'")
    loaded = modules_after(
        "import pickle\n"
        "from pathlib import Path\n"
        "from sklearn.base import clone\n"
        f"for file in Path({str(tmp_path)!r}).iterdir():\n"
        f"    model = pickle.loads(file.read_bytes())\n{look}"
        "    model.stage_names_, model.get_feature_names_out()\n"
        "    assert 'net_' not in vars(model)\n"
    )
    assert "sklearn_transfer" in loaded
    assert not loaded & HEAVY


def test_the_guard_of_these_tests_bites():
    for code in (
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "open('weights.safetensors')",
    ):
        with pytest.raises(AssertionError, match=r"network|weights"):
            modules_after(code)


@every_estimator
def test_a_representation_tells_what_was_changed(cls):
    model = cls(verbose=1, pooling="avg")
    assert repr(model) == f"{cls.__name__}(pooling='avg', verbose=1)"
    html = model._repr_html_()
    assert cls.__name__ in html and "pooling" in html
    assert "fitted" in fitted(cls)._repr_html_()


# --- documentation ---------------------------------------------------------------

# Each method of a small class need not have a story, links and an example of its
# own; values that are returned have names, as in scikit-learn; and "Probabilities"
# is no verb in the third person.
NOT_ASKED_OF_METHODS = {"ES01", "SA01", "EX01", "RT02", "SS05"}
# What the literature calls each published method, and where it is.
PUBLISHED = {
    "head_init": "2202.10054",  # LP-FT
    "l2_sp": "1802.01483",
    "label_smoothing": "1512.00567",
    "layer_decay": "1801.06146",  # ULMFiT
    "lora_rank": "2106.09685",
    "mixup": "1710.09412",
    "optimizer": "1711.05101",  # AdamW
    "schedule": "1608.03983",  # cosine
    "unfreeze_every": "1801.06146",
}


def public_methods(cls) -> list[str]:
    """Methods whose words are ours."""
    found = {name: inspect.getattr_static(cls, name) for name in dir(cls)}
    return [
        name
        for name, method in found.items()
        if name[0] != "_"
        and inspect.isfunction(method)
        and method.__module__.startswith("sklearn_transfer")
    ]


def documented():
    for cls in ESTIMATORS:
        yield cls, None
        for name in public_methods(cls):
            yield cls, name


@pytest.mark.parametrize(("cls", "method"), list(documented()))
def test_docstrings_are_numpydoc(cls, method):
    validate = pytest.importorskip("numpydoc.validate").validate
    path = f"{cls.__module__}.{cls.__name__}" + (f".{method}" if method else "")
    asked_not = NOT_ASKED_OF_METHODS if method else set()
    errors = [error for error in validate(path)["errors"] if error[0] not in asked_not]
    assert errors == []


@every_estimator
def test_docstrings_give_shapes_defaults_errors_and_sources(cls):
    text = inspect.getdoc(cls)
    for name, parameter in inspect.signature(cls).parameters.items():
        shown = parameter.default
        shown = f'"{shown}"' if isinstance(shown, str) else repr(shown)
        line = next(row for row in text.splitlines() if row.startswith(f"{name} : "))
        assert line.endswith(f"default={shown}"), line
        if name in PUBLISHED:
            assert f"arXiv:{PUBLISHED[name]}" in text, name
    assert "\nReferences\n----" in text
    for name in public_methods(cls):
        method = getattr(cls, name)
        asks = set(inspect.signature(method).parameters)
        if "X" in asks:
            assert "X : array-like of shape (n_samples,)" in method.__doc__, name
            assert "\n        Raises\n" in method.__doc__, name
        if name not in ("fit", "partial_fit", "to_module"):
            assert "shape (n_" in method.__doc__.partition("Returns")[2], name


@every_estimator
def test_fitted_attributes_are_documented(cls):
    text = inspect.getdoc(cls).partition("\nAttributes\n")[2]
    rows = text.partition("\nSee Also\n")[0].splitlines()
    known = {name for row in rows for name in row.partition(" : ")[0].split(", ")}
    known = {name for name in known if name.endswith("_") and " " not in name}
    has = {name for name in vars(fitted(cls)) if not name.startswith("_")}
    has = {name for name in has if name.endswith("_")}
    assert has <= known
    for name in known - {"n_features_in_", "feature_names_in_"}:
        getattr(fitted(cls), name)


@every_estimator
def test_the_docstring_has_an_example_that_shows_something(cls):
    # They are run where pytest collects the package with --doctest-modules.
    (found,) = doctest.DocTestFinder(recurse=False).find(cls, cls.__name__)
    assert any(cls.__name__ in example.source for example in found.examples)
    assert found.examples[-1].want


# --- what comes out --------------------------------------------------------------


@every_estimator
def test_set_output_gives_frames_of_named_columns(cls):
    X, _ = data(cls)
    model = pickle.loads(pickle.dumps(fitted(cls)))
    plain = model.transform(X)
    names = list(model.get_feature_names_out())
    assert (plain.dtype, plain.shape) == (np.float32, (12, len(names)))
    assert len(set(names)) == len(names)
    assert all(name.startswith(cls.__name__.lower()) for name in names)
    column = pd.Series(X, index=range(100, 112), name="row")
    for library, kind in (("pandas", pd.DataFrame), ("polars", pl.DataFrame)):
        model.set_output(transform=library)
        frame = model.transform(column)
        assert isinstance(frame, kind)
        assert list(frame.columns) == names
        np.testing.assert_array_equal(frame.to_numpy(), plain)
        assert isinstance(clone(model).fit(*data(cls)).transform(X), kind)
    assert list(model.set_output(transform="pandas").transform(column).index) == list(
        range(100, 112)
    )
    model.set_output(transform="default")
    assert isinstance(model.transform(X), np.ndarray)
    with config_context(transform_output="polars"):
        assert isinstance(clone(quick(cls)).fit(*data(cls)).transform(X), pl.DataFrame)


@pytest.mark.parametrize("library", [pd, pl], ids=["pandas", "polars"])
@every_estimator
def test_one_column_has_a_name_and_more_have_none(cls, library, image_files):
    X, y = data(cls)
    X = image_files if reads_images(cls) else X
    table = library.DataFrame({"what": list(X)})
    model = quick(cls).fit(table, y)
    assert model.n_features_in_ == 1
    np.testing.assert_array_equal(model.feature_names_in_, ["what"])
    plain = quick(cls).fit(list(X), y)
    assert not {"n_features_in_", "feature_names_in_"} & set(vars(plain))
    np.testing.assert_array_equal(model.transform(table), plain.transform(list(X)))
    np.testing.assert_array_equal(
        model.get_feature_names_out(), plain.get_feature_names_out()
    )
    with pytest.raises(ValueError, match="feature names should match"):
        model.transform(library.DataFrame({"else": list(X)}))
    with pytest.raises(ValueError, match="ColumnTransformer"):
        quick(cls).fit(library.DataFrame({"what": list(X), "more": list(X)}), y)


# --- metadata --------------------------------------------------------------------


@config_context(enable_metadata_routing=True)
@every_estimator
def test_what_can_be_routed_is_what_methods_take(cls):
    routing = cls().get_metadata_routing()
    for name in ("fit", "partial_fit", "predict", "transform"):
        if not hasattr(cls, name):
            continue
        takes = set(inspect.signature(getattr(cls, name)).parameters)
        found = set(getattr(routing, name).requests)
        assert found == takes - {"self", "X", "y"}, name
        assert hasattr(cls, f"set_{name}_request") == bool(found)


def metadata(cls) -> dict[str, dict]:
    """What fit may be given, each such that it changes what is learned."""
    X_val, y_val = data(cls, 8, seed=3)
    return {
        "sample_weight": {"sample_weight": np.where(np.arange(24) < 6, 20.0, 1.0)},
        "groups": {"groups": np.arange(24) // 8},
        "X_val, y_val": {"X_val": X_val, "y_val": y_val},
    }


COUNT = itertools.count()


def ever_better(estimator, X, y):
    """A scorer that keeps the last weights, and so what these rows taught."""
    return next(COUNT)


SPLITS = {
    "early_stopping": True,
    "validation_fraction": 0.3,
    "scoring": ever_better,
    "lr": 0.01,
}


@pytest.mark.parametrize("routed", [False, True], ids=["given", "routed"])
@pytest.mark.parametrize("what", ["sample_weight", "groups", "X_val, y_val"])
@every_fine_tuner
def test_metadata_reaches_the_fit_inside_a_pipeline(cls, what, routed):
    X, y = data(cls, 24)
    given = metadata(cls)[what]
    expected = quick(cls, **SPLITS).fit(X, y, **given).transform(X)
    model = quick(cls, **SPLITS)
    with config_context(enable_metadata_routing=routed):
        steps = [("same", FunctionTransformer()), ("model", model)]
        if routed:
            model.set_fit_request(**dict.fromkeys(given, True))
            pipeline = Pipeline(
                steps, transform_input=["X_val"] if "X_val" in given else None
            )
            pipeline.fit(X, y, **given)
        else:
            pipeline = Pipeline(steps).fit(
                X, y, **{f"model__{name}": value for name, value in given.items()}
            )
        np.testing.assert_array_equal(pipeline.transform(X), expected)
    without = quick(cls, **SPLITS).fit(X, y).transform(X)
    assert np.abs(without - expected).max() > 0


@config_context(enable_metadata_routing=True)
@every_fine_tuner
def test_metadata_nobody_asked_for_is_refused(cls):
    X, y = data(cls)
    pipeline = Pipeline([("model", quick(cls))])
    with pytest.raises(ValueError, match=r"sample_weight.*not explicitly set"):
        pipeline.fit(X, y, sample_weight=np.ones(12))
    assert isinstance(pipeline, BaseEstimator)
