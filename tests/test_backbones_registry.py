"""One loaded backbone for each network, and another where its files changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from sklearn_transfer.backbones import registry
from sklearn_transfer.backbones.embedded.network import EmbeddedResNet
from sklearn_transfer.backbones.registry import load_image_backbone, load_text_backbone
from sklearn_transfer.backbones.spec import BackboneSpec
from tests.test_backbones_transformers import make_sentence_model, save_model


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch):
    monkeypatch.setattr(registry, "_loaded", type(registry._loaded)())


@pytest.fixture(scope="session")
def plain(tmp_path_factory) -> Path:
    with torch.random.fork_rng(devices=[]):
        return save_model("bert", tmp_path_factory.mktemp("registry") / "bert")


@pytest.fixture
def model(plain, tmp_path) -> Path:
    """The folder of a small model, to change."""
    return shutil.copytree(plain, tmp_path / "model")


def load_text(backbone, prompt=None):
    return load_text_backbone(str(backbone), None, prompt)


def overwrite(path: Path, content: bytes, later: int = 1) -> None:
    """In place: the same inode, and a folder that does not look touched."""
    before, folder = path.stat(), path.parent.stat()
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()
    # Explicitly later, however coarse the clock of the file system.
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + later))
    assert path.stat().st_ino == before.st_ino
    assert path.parent.stat().st_mtime_ns == folder.st_mtime_ns


# --- files that change ------------------------------------------------------------


def test_what_did_not_change_is_loaded_once(model):
    once = load_text(model)
    assert load_text(model) is once
    assert load_text(model, prompt="the cat ") is not once
    assert load_text(model) is once


def test_weights_overwritten_in_a_folder_are_noticed(model):
    before = load_text(model)
    seen = registry.fingerprint(before)
    path = model / "model.safetensors"
    tuned = {k: t + 1 for k, t in load_file(path).items()}
    overwrite(path, save(tuned, {"format": "pt"}))
    after = load_text(model)
    assert after is not before
    assert registry.fingerprint(after) != seen


def test_a_module_s_folder_overwritten_is_noticed(plain, tmp_path):
    pooling = ("Pooling", {"pooling_mode": "mean"}, None)
    folder = make_sentence_model(plain, tmp_path / "sentence", pooling)
    before = load_text(folder)
    overwrite(folder / "1_Pooling" / "config.json", b'{"pooling_mode": "max"}')
    assert load_text(folder).readout.poolings != before.readout.poolings


@pytest.mark.parametrize("change", ["size", "inode", "name"])
def test_each_sign_of_another_file_counts(tmp_path, change):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"12345678")
    spec, times = BackboneSpec("hf", str(tmp_path)), file.stat()
    before = registry._identity(spec)
    assert registry._identity(spec) == before
    if change == "size":
        overwrite(file, b"1234", later=0)
    elif change == "inode":
        (tmp_path.parent / "new").write_bytes(b"87654321")
        os.utime(tmp_path.parent / "new", ns=(times.st_atime_ns, times.st_mtime_ns))
        os.replace(tmp_path.parent / "new", file)
    else:
        file.rename(tmp_path / "model-2.safetensors")
    assert registry._identity(spec) != before


def test_what_no_loader_reads_is_not_watched(model):
    once = load_text(model)
    (model / ".git").mkdir()
    (model / ".git" / "index").touch()
    deep = model / "a" / "b" / "c"
    deep.mkdir(parents=True)
    (deep / "file").touch()
    (model / "gone").symlink_to(model / "nowhere")
    assert load_text(model) is once


def test_a_folder_that_holds_itself_has_an_end(model):
    (model / "round").symlink_to(model)
    assert load_text(model) is load_text(model)


def test_a_weight_file_below_the_home_folder_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    with torch.random.fork_rng(devices=[]):
        state = EmbeddedResNet().state_dict()
    path = tmp_path / "mine.safetensors"
    save_file(state, path)
    backbone = "embedded@~/mine.safetensors"
    before = load_image_backbone(backbone)
    assert load_image_backbone(backbone) is before
    assert load_image_backbone(f"embedded@{path}") is before
    overwrite(path, save({k: t + 1 for k, t in state.items()}))
    after = load_image_backbone(backbone)
    assert registry.fingerprint(after) != registry.fingerprint(before)


# --- where a path leads -----------------------------------------------------------


def test_a_relative_path_follows_the_working_directory(plain, tmp_path, monkeypatch):
    one = shutil.copytree(plain, tmp_path / "one" / "model")
    two = shutil.copytree(plain, tmp_path / "two" / "model")
    for path in one.iterdir():  # told apart by their place alone
        (two / path.name).unlink()
        os.link(path, two / path.name)
    monkeypatch.chdir(tmp_path / "one")
    first = load_text("./model")
    monkeypatch.chdir(tmp_path / "two")
    assert load_text("./model") is not first
    assert load_text("../one/model") is first
    assert load_text(one) is first


def test_a_hub_s_id_is_a_folder_only_where_one_lies(tmp_path, monkeypatch):
    spec = BackboneSpec("hf", "org/name", "refs/pr/1")
    (tmp_path / "elsewhere" / "refs" / "pr").mkdir(parents=True)
    (tmp_path / "elsewhere" / "refs" / "pr" / "1").touch()
    (tmp_path / "elsewhere" / "org").mkdir()
    (tmp_path / "elsewhere" / "org" / "name").touch()  # a file, which is no model
    monkeypatch.chdir(tmp_path)
    on_the_hub = registry._identity(spec)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert registry._identity(spec) == on_the_hub
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert registry._identity(spec) != on_the_hub


def test_a_folder_may_have_an_at_sign_in_its_path(plain, tmp_path, monkeypatch):
    folder = shutil.copytree(plain, tmp_path / "me@home" / "bert@2")
    expected = load_text(plain).fingerprint()
    monkeypatch.chdir(folder.parent)
    names = (str(folder), f"hf:{folder}", "./bert@2", "bert@2", "hf:bert@2")
    loaded = {load_text(name) for name in names}
    assert len(loaded) == 1
    assert loaded.pop().fingerprint() == expected
    untrained = {load_text(f"{name}@random") for name in names}
    assert len(untrained) == 1
    assert untrained.pop().fingerprint() != expected


@pytest.mark.parametrize("text", ["", "hf:", "@random", "hf:@random"])
def test_an_empty_name_is_not_the_working_directory(text):
    with pytest.raises(ValueError, match=r"\[source:\]name\[@weights\]"):
        load_text(text)


# --- processes --------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_child_forked_while_another_thread_loads_can_load():
    code = (
        "import os, signal, threading, warnings\n"
        "from sklearn_transfer.backbones import registry\n"
        "warnings.simplefilter('ignore', DeprecationWarning)\n"
        "loading, done = threading.Event(), threading.Event()\n"
        "def load():\n"
        "    loading.set()\n"
        "    done.wait()\n"
        "other = threading.Thread(target=registry._remember, args=(('a',), load))\n"
        "other.start()\n"
        "loading.wait()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    signal.alarm(20)\n"  # ends a child that hangs
        "    os._exit(registry._remember(('b',), lambda: 7))\n"
        "status = os.waitpid(pid, 0)[1]\n"
        "done.set()\n"
        "other.join()\n"
        "assert os.waitstatus_to_exitcode(status) == 7, status\n"
    )
    root = str(Path(registry.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
