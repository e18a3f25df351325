"""ImageFeaturizer as its users meet it."""

from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import polars as pl
import pytest
from PIL import Image
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import FeatureUnion, make_pipeline

from sklearn_transfer import ImageFeaturizer, backbone_from_module, cache_info
from sklearn_transfer.exceptions import (
    BackboneChangedError,
    ImageSizeWarning,
    UnreadableRowsError,
    UnreadableRowsWarning,
)
from sklearn_transfer.featurizers import image as image_module

RANDOM = "resnet18@random"


def small(**given) -> ImageFeaturizer:
    """A featurizer that is quick and says the same on every machine."""
    defaults = {"backbone": RANDOM, "image_size": 64, "precision": "float32"}
    return ImageFeaturizer(**{**defaults, **given})


def test_features_are_the_network_s_own(images):
    """The vector is what torchvision's own network feeds its last Linear."""
    import torch
    from torchvision.models import resnet18

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = resnet18().eval()
    net.fc = torch.nn.Identity()
    same_size = [image.resize((64, 64)) for image in images]
    pixels = torch.stack([torch.from_numpy(np.array(i)) for i in same_size])
    x = pixels.permute(0, 3, 1, 2).float() / 255
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        expected = net((x - mean) / std).numpy()
    found = small(cache=None).fit_transform(same_size)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def containers(paths, images):
    """The same pictures in everything that X may be."""
    arrays = [np.asarray(image) for image in images]
    as_bytes = []
    for path in paths:
        with open(path, "rb") as file:
            as_bytes.append(file.read())
    objects = np.empty(len(arrays), object)
    objects[:] = arrays
    return {
        "paths": paths,
        "array of str": np.array(paths),
        "column of objects": np.array(paths, object)[:, None],
        "tuple": tuple(paths),
        "Series": pd.Series(paths, index=range(5, 5 + len(paths))),
        "DataFrame": pd.DataFrame({"path": paths}),
        "polars Series": pl.Series(paths),
        "polars DataFrame": pl.DataFrame({"path": paths}),
        "bytes": as_bytes,
        "PIL": images,
        "arrays": arrays,
        "object array": objects,
        "channels first": [a.transpose(2, 0, 1) for a in arrays],
        "floats": [a / 255 for a in arrays],
    }


def test_every_container_gives_equal_features(image_files, images):
    found = {
        name: small(cache=None).fit_transform(X)
        for name, X in containers(image_files, images).items()
    }
    for name, features in found.items():
        np.testing.assert_allclose(
            features, found["paths"], rtol=1e-5, atol=1e-6, err_msg=name
        )


def test_order_batch_and_repeats_do_not_change_a_row(images):
    whole = small(cache=None).fit_transform(images)
    order = np.array([3, 0, 3, 11, 5])
    some = small(cache=None, batch_size=2).fit_transform([images[i] for i in order])
    np.testing.assert_allclose(some, whole[order], rtol=1e-5, atol=1e-6)


def test_each_distinct_image_is_encoded_once(image_files, tmp_path):
    store = tmp_path / "store"
    X = [*image_files, image_files[0]]
    y = np.arange(len(X)) % 2
    model = make_pipeline(small(cache=store), LogisticRegression(max_iter=1000))
    GridSearchCV(model, {"logisticregression__C": [0.1, 1, 10]}, cv=3).fit(X, y)
    cross_val_score(clone(model), X[::-1], y, cv=2)
    assert cache_info(store).misses == len(image_files)


def test_two_workers_encode_each_row_once(image_files, tmp_path):
    store = tmp_path / "store"
    y = np.arange(len(image_files)) % 2
    model = make_pipeline(small(cache=store), LogisticRegression(max_iter=1000))
    grid = {"logisticregression__C": [0.1, 1]}
    cold = GridSearchCV(model, grid, cv=3, n_jobs=2).fit(image_files, y)
    assert cache_info(store).misses == len(image_files)
    alone = GridSearchCV(clone(model), grid, cv=3).fit(image_files, y)
    np.testing.assert_array_equal(
        cold.cv_results_["mean_test_score"], alone.cv_results_["mean_test_score"]
    )
    assert cache_info(store).misses == len(image_files)


def test_a_grid_over_layers_encodes_once(images, tmp_path):
    y = np.arange(len(images)) % 2
    model = make_pipeline(small(cache=tmp_path), LogisticRegression(max_iter=1000))
    grid = {"imagefeaturizer__layers": ["last", "layer2", ["layer1", "last"], "all"]}
    GridSearchCV(model, grid, cv=2, error_score="raise").fit(images, y)
    assert cache_info(tmp_path).misses == len(images)


def test_layers_are_columns_in_the_order_asked(images):
    parts = {
        name: small(layers=name).fit_transform(images)
        for name in ("stem", "layer1", "layer2", "layer3", "layer4", "last")
    }
    np.testing.assert_array_equal(parts["layer4"], parts["last"])
    both = small(layers=["layer3", 1, -1]).fit(images)
    np.testing.assert_array_equal(
        both.transform(images),
        np.hstack([parts["layer3"], parts["stem"], parts["last"]]),
    )
    names = both.get_feature_names_out()
    assert names[0] == "imagefeaturizer_layer3_0"
    assert names[256] == "imagefeaturizer_stem_0"
    everything = small(layers="all").fit(images)
    assert everything.get_feature_names_out().shape == (64 + 64 + 128 + 256 + 512,)


@pytest.mark.parametrize(
    "layers, why", [("layer9", "layer9"), (0, "0"), (6, "6"), ([], "empty")]
)
def test_a_wrong_layer_names_the_stages(images, layers, why):
    with pytest.raises(ValueError, match=why):
        small(layers=layers).fit(images)


@pytest.mark.parametrize("pooling, width", [("avg", 512), ("max", 512)])
def test_pooling_of_the_last_map(images, pooling, width):
    found = small(pooling=pooling).fit_transform(images)
    assert found.shape == (len(images), width)
    flat = small(pooling="flatten").fit_transform(images)
    maps = flat.reshape(len(images), 512, -1)
    expected = maps.mean(2) if pooling == "avg" else maps.max(2)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_pooling_that_makes_no_sense_says_what_does(images):
    with pytest.raises(ValueError, match=r"feature map.*pooling='avg'"):
        small(pooling="cls").fit(images)


def test_set_output_keeps_the_index(images):
    X = pd.Series(images, index=[f"row{i}" for i in range(len(images))])
    frame = small().set_output(transform="pandas").fit_transform(X)
    assert list(frame.index) == list(X.index)
    assert frame.columns[0] == "imagefeaturizer0"
    polars = small().set_output(transform="polars").fit_transform(images)
    assert polars.shape == (len(images), 512)


def test_inside_column_transformer_and_union(image_files):
    table = pd.DataFrame({"picture": image_files, "size": range(len(image_files))})
    for selector in ("picture", ["picture"]):
        columns = ColumnTransformer(
            [("image", small(), selector)], remainder="passthrough"
        )
        assert columns.fit_transform(table).shape == (len(image_files), 513)
        assert columns.get_feature_names_out()[0] == "image__imagefeaturizer0"
    union = FeatureUnion([("a", small()), ("b", small(layers="layer1"))])
    assert union.fit_transform(image_files).shape == (len(image_files), 576)


def test_two_columns_say_which_line_to_write(image_files):
    table = pd.DataFrame({"picture": image_files, "size": range(len(image_files))})
    with pytest.raises(ValueError, match="ColumnTransformer"):
        small().fit(table)


def test_bad_rows_are_all_named_and_the_rest_is_kept(image_files, tmp_path):
    broken = tmp_path / "broken.png"
    with open(image_files[0], "rb") as whole:
        broken.write_bytes(whole.read()[:400])
    X = [*image_files[:3], str(broken), *image_files[3:], str(broken)]
    store = tmp_path / "store"
    featurizer = small(cache=store).fit(image_files)
    with pytest.raises(UnreadableRowsError, match=r"row 3 .*broken\.png") as caught:
        featurizer.transform(X)
    assert set(caught.value.rows) == {3, len(X) - 1}
    assert cache_info(store).rows == len(image_files)
    back = pickle.loads(pickle.dumps(caught.value))
    assert back.rows == caught.value.rows


def test_missing_files_are_named_before_anything_is_encoded(image_files, tmp_path):
    X = [*image_files, str(tmp_path / "absent.png")]
    with pytest.raises(UnreadableRowsError, match=r"row 12 .*absent\.png"):
        small(cache=tmp_path / "store").fit_transform(X)
    assert cache_info(tmp_path / "store").rows == 0


def test_many_bad_rows_make_a_short_message():
    digits = np.full((300, 64), 16.0)
    digits[7] = 1.0
    with pytest.raises(UnreadableRowsError, match=r"299 of 300") as caught:
        small(image_shape=(8, 8)).fit_transform(digits)
    text = str(caught.value)
    assert "row 0:" in text and "rows 21-299" in text and len(text) < 5000
    assert "value_range=(0, 16)" in text
    assert len(caught.value.rows) == 299


def test_nan_rows_on_request(image_files, tmp_path):
    X = [image_files[0], str(tmp_path / "absent.png"), image_files[1]]
    featurizer = small(on_error="nan").set_output(transform="pandas")
    with pytest.warns(
        UnreadableRowsWarning, match=r"1 of 3 images.*\n.*absent\.png"
    ) as caught:
        found = featurizer.fit_transform(X)
    assert caught[0].filename == __file__  # the user's line, not scikit-learn's
    assert np.isnan(found).all(axis=1).tolist() == [False, True, False]


def test_a_changed_weight_file_is_noticed(images, tmp_path):
    import torch
    from safetensors.torch import save_file
    from torchvision.models import resnet18

    path = tmp_path / "weights.safetensors"
    with torch.random.fork_rng():
        save_file(resnet18().state_dict(), path)
        featurizer = small(backbone=f"resnet18@{path}", cache=None).fit(images)
        featurizer.transform(images)
        save_file(resnet18().state_dict(), path)
    path.touch()
    with pytest.raises(BackboneChangedError, match="fingerprint"):
        featurizer.transform(images)


def test_parameters_changed_after_fit_need_a_new_fit(images):
    featurizer = small(cache=None).fit(images)
    with pytest.raises(BackboneChangedError, match="call fit again"):
        featurizer.set_params(image_size=96).transform(images)
    assert featurizer.fit(images).transform(images).shape == (len(images), 512)


def test_pickle_holds_no_weights_and_gives_the_same(images):
    featurizer = small().fit(images)
    state = pickle.dumps(featurizer)
    assert len(state) < 5_000
    np.testing.assert_array_equal(
        pickle.loads(state).transform(images), featurizer.transform(images)
    )


def test_stored_rows_need_no_torch(image_files, tmp_path):
    import subprocess
    import sys

    featurizer = small(cache=str(tmp_path / "store")).fit(image_files)
    expected = featurizer.transform(image_files)
    (tmp_path / "model.pkl").write_bytes(pickle.dumps((featurizer, image_files)))
    code = (
        "import pickle, sys, numpy\n"
        f"f, X = pickle.load(open({str(tmp_path / 'model.pkl')!r}, 'rb'))\n"
        f"numpy.save({str(tmp_path / 'found.npy')!r}, f.transform(X))\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "found.npy"), expected)


def test_random_weights_are_seeded_and_global_state_is_untouched(images):
    import torch

    np.random.seed(3)
    torch.manual_seed(3)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    once = small(cache=None).fit_transform(images)
    assert (np.random.get_state()[1] == before[0]).all()
    assert torch.equal(torch.get_rng_state(), before[1])
    from sklearn_transfer.backbones import registry

    registry._loaded.clear()
    np.testing.assert_array_equal(small(cache=None).fit_transform(images), once)


def test_bf16_stays_close_to_float32(images):
    exact = small(precision="float32").fit_transform(images)
    fast = small(precision="bfloat16").fit_transform(images)
    assert not np.array_equal(exact, fast)
    norms = np.linalg.norm(exact, axis=1) * np.linalg.norm(fast, axis=1)
    assert ((exact * fast).sum(1) / norms).min() > 0.995


def test_large_images_are_told_once_what_suits_them(monkeypatch):
    monkeypatch.setattr(image_module._advised, "_flag", False)
    X = [Image.new("RGB", (400, 300), colour) for colour in ("red", "blue")]
    with pytest.warns(ImageSizeWarning, match=r'ImageFeaturizer\("resnet50"\)'):
        ImageFeaturizer("embedded").fit(X)
    ImageFeaturizer("embedded").fit(X)  # warnings are errors: not a second time


def test_own_module(images):
    import torch
    from torch import nn

    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = nn.Sequential()
        body.add_module("first", nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
        body.add_module("second", nn.Sequential(nn.Conv2d(4, 5, 3), nn.ReLU()))
    spec = backbone_from_module(body, image_size=32)
    featurizer = clone(ImageFeaturizer(spec, layers="all", cache=None)).fit(images)
    assert featurizer.stage_names_ == ["first", "second"]
    found = featurizer.transform(images)
    assert found.shape == (len(images), 9)
    again = pickle.loads(pickle.dumps(featurizer)).transform(images)
    np.testing.assert_array_equal(found, again)


def test_a_bare_module_is_told_what_to_write(images):
    import torch

    with pytest.raises(ValueError, match=r"backbone_from_module\(net, image_size="):
        ImageFeaturizer(torch.nn.Conv2d(3, 4, 3)).fit(images)
    with pytest.raises(ValueError, match="image_size=True is not a number"):
        small(image_size=True).fit(images)


def test_columns_of_an_earlier_fit_are_forgotten(image_files):
    featurizer = small().fit(pd.DataFrame({"path": image_files}))
    assert list(featurizer.feature_names_in_) == ["path"]
    assert not hasattr(featurizer.fit(image_files), "feature_names_in_")


def test_text_names_are_refused_with_what_they_are_for(images):
    with pytest.raises(ValueError, match="names begin with Text"):
        ImageFeaturizer("sentence-transformers/all-MiniLM-L6-v2").fit(images)


def test_unknown_name_suggests_the_near_one(images):
    with pytest.raises(ValueError, match="resnet18"):
        ImageFeaturizer("torchvision:resnet81").fit(images)


def test_progress_is_silent_by_default_and_a_bar_when_asked(images, capfd):
    small(cache=None).fit_transform(images)
    assert capfd.readouterr() == ("", "")
    small(cache=None, verbose=1).fit_transform(images)
    out, err = capfd.readouterr()
    assert out == "" and "12/12" in err
