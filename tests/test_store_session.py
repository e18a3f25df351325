"""The session's folder: one for a tree of processes, private, gone in the end."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest

from sklearn_transfer.exceptions import CacheWarning
from sklearn_transfer.store import session
from sklearn_transfer.store.session import (
    BYTES_VARIABLE,
    SESSION_VARIABLE,
    cache_info,
    clear_cache,
    open_store,
)

ROOT = Path(__file__).parents[1]
NOTHING = (0, 0, 0, 0, 0, 0)
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and locks")

PRELUDE = """
import os, subprocess, sys
import numpy as np
from sklearn_transfer.store.session import cache_info, clear_cache, open_store
def put(n):
    store = open_store("session")
    store.put({bytes([n]) * 32: np.full(4, n, np.float32)})
    return str(store.folder)
def hold():
    print(flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """A temporary folder of the test's own, here and in its child processes."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    for name in (SESSION_VARIABLE, BYTES_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(session, "_stores", {})
    yield folder
    os.environ.pop(SESSION_VARIABLE, None)
    for store in session._stores.values():
        store.close()


def start(code: str, **environment: str) -> subprocess.Popen:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(child: subprocess.Popen) -> str:
    out, _ = child.communicate("end\n", timeout=60)
    assert child.returncode == 0
    return out


def kill(child: subprocess.Popen) -> None:
    child.send_signal(signal.SIGKILL)
    child.communicate()


def folders(temporary: Path) -> list[str]:
    return sorted(path.name for path in temporary.glob("sklearn_transfer-*"))


ROWS = {bytes([n]) * 32: np.full(4, n, np.float32) for n in range(1, 4)}


def test_what_cache_can_be(tmp_path):
    assert open_store(None) is None
    assert cache_info(None) == NOTHING
    clear_cache(None)
    with pytest.raises(TypeError, match="cache='session'"):
        open_store(3)
    for empty in ("", "  "):
        for asked in (open_store, cache_info, clear_cache):
            with pytest.raises(ValueError, match=r"names no folder.*cache=None"):
                asked(empty)
    assert open_store("session") is open_store("session")
    lasting = open_store(tmp_path / "features")
    assert open_store(str(tmp_path / "x" / ".." / "features")) is lasting
    assert lasting is not open_store("session")
    assert lasting.folder == tmp_path / "features"
    assert open_store("~/features").folder == Path.home() / "features"


def test_asking_makes_nothing(temporary, tmp_path):
    assert cache_info() == NOTHING
    assert cache_info(tmp_path / "features") == NOTHING
    clear_cache()
    assert not folders(temporary)
    assert not (tmp_path / "features").exists()


def test_info_and_clear_see_what_was_stored(tmp_path):
    for cache in ("session", tmp_path / "features"):
        store = open_store(cache)
        store.put(ROWS)
        store.count(hits=2)
        assert cache_info(cache) == (3, 48, 2, 3, 0, 0)
        clear_cache(cache)
        assert cache_info(cache) == NOTHING
        assert store.get_many(ROWS) == {}


def test_the_budget_can_be_set_by_environment(tmp_path, monkeypatch):
    monkeypatch.setenv(BYTES_VARIABLE, "40")
    for cache in ("session", tmp_path / "features"):
        with pytest.warns(CacheWarning, match="budget of 40 bytes"):
            open_store(cache).put(ROWS)
        assert 0 < cache_info(cache).bytes <= 40
    monkeypatch.delenv(BYTES_VARIABLE)
    open_store("session").put(ROWS)
    assert cache_info().rows == 3
    monkeypatch.setenv(BYTES_VARIABLE, "2 GB")
    with pytest.raises(ValueError, match="digits"):
        open_store("session")


@posix
def test_the_folder_is_private_and_handed_down(temporary):
    store = open_store("session")
    store.put(ROWS)
    assert folders(temporary) == [store.folder.name]
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    assert os.environ[SESSION_VARIABLE] == str(store.folder)
    assert finish(start("print(put(9), cache_info().rows)")).split() == [
        str(store.folder),
        "4",
    ]
    # The child has ended and took nothing with it.
    assert len(store.get_many([*ROWS, bytes([9]) * 32])) == 4


@posix
@pytest.mark.parametrize("kind", ["name", "owner", "open", "link", "file", "relative"])
def test_a_folder_that_is_not_ours_is_not_believed(temporary, monkeypatch, kind):
    ours = session._folder_of(os.getpid())
    named = temporary / "sub" / ours.name
    named.parent.mkdir()
    if kind == "name":
        named = temporary / "somewhere"
    elif kind == "owner":
        named = temporary / f"sklearn_transfer-{os.getuid()}-{os.getpid()}-1"
    elif kind == "open":
        named.mkdir(mode=0o755)
    elif kind == "link":
        (temporary / "target").mkdir(mode=0o700)
        named.symlink_to(temporary / "target")
    elif kind == "file":
        named.write_text("")
    else:
        named = Path(ours.name)
    monkeypatch.setenv(SESSION_VARIABLE, str(named))
    assert open_store("session").folder == ours


def test_a_folder_named_by_environment_may_still_be_made(temporary, monkeypatch):
    named = temporary / "sub" / session._folder_of(os.getpid()).name
    named.parent.mkdir()
    monkeypatch.setenv(SESSION_VARIABLE, str(named))
    store = open_store("session")
    store.put(ROWS)
    assert store.folder == named and named.is_dir()


@posix
def test_someone_elses_folder_under_our_name_is_not_used(temporary):
    ours = session._folder_of(os.getpid())
    (temporary / "target").mkdir(mode=0o700)
    ours.symlink_to(temporary / "target")
    store = open_store("session")
    with pytest.warns(CacheWarning, match="not a private folder"):
        store.put(ROWS)
    assert store.get_many(ROWS) == {}
    assert not list((temporary / "target").iterdir())


@posix
def test_workers_started_before_find_the_session(temporary):
    code = """
from joblib import Parallel, delayed
def environment():
    return os.environ.get("SKLEARN_TRANSFER_SESSION")
with Parallel(n_jobs=2) as parallel:
    assert set(parallel(delayed(environment)() for _ in range(4))) == {None}
    used = set(parallel(delayed(put)(n) for n in range(1, 9)))
    assert cache_info().rows == 8
    assert used == {put(9)}
    assert set(parallel(delayed(cache_info)() for _ in range(4))) == {cache_info()}
assert sys.modules.get("sklearn_transfer.store.session")
print(*used)
"""
    used = finish(start(code)).split()
    assert len(used) == 1
    assert not folders(temporary)


@posix
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_every_kind_of_worker_finds_the_session(temporary, tmp_path, method):
    script = tmp_path / "script.py"
    main = f"""
if __name__ == "__main__":
    import multiprocessing
    with multiprocessing.get_context("{method}").Pool(1) as pool:
        folder = pool.apply(put, (1,))
    assert os.path.basename(folder).split("-")[2] == str(os.getpid()), folder
    assert cache_info().rows == 1
    assert put(2) == folder
    print("ok")
"""
    script.write_text(PRELUDE + main)
    code = f"sys.exit(subprocess.run([sys.executable, {str(script)!r}]).returncode)"
    assert finish(start(code)) == "ok\n"
    assert not folders(temporary)


@posix
def test_the_folder_outlives_forked_children_and_goes_with_its_owner(temporary):
    code = """
folder = put(1)
child = os.fork()
if not child:
    put(2)
    sys.exit(0)  # runs the hooks of an orderly end
assert os.waitpid(child, 0)[1] == 0
assert cache_info().rows == 2 and os.path.isdir(folder)
"""
    finish(start(code))
    assert not folders(temporary)


@posix
def test_the_session_of_a_killed_process_is_swept(temporary):
    dead, living = start("put(1); hold()"), start("put(1); hold()")
    for child in (dead, living):
        child.stdout.readline()
    assert len(folders(temporary)) == 2
    kill(dead)
    assert len(folders(temporary)) == 2
    finish(start("put(1)"))
    (left,) = folders(temporary)
    assert f"-{living.pid}-" in left
    finish(living)
    assert not folders(temporary)


@posix
def test_a_session_in_use_is_not_swept_though_its_owner_is_dead(temporary):
    owner = start("put(1); hold()")
    owner.stdout.readline()
    (folder,) = folders(temporary)
    user = start(
        "put(2); hold(); put(3); hold()", **{SESSION_VARIABLE: str(temporary / folder)}
    )
    user.stdout.readline()
    kill(owner)
    finish(start("put(1)"))
    assert folders(temporary) == [folder]
    kill(user)
    finish(start("put(1)"))
    assert not folders(temporary)


@posix
def test_only_own_folders_of_dead_processes_are_swept(temporary):
    gone = f"sklearn_transfer-{os.getuid()}-999999999-1"
    (temporary / "target").mkdir()
    (temporary / gone).symlink_to(temporary / "target")
    (temporary / f"{gone}0").mkdir(mode=0o755)
    (temporary / f"{gone}1").mkdir(mode=0o700)
    living = session._folder_of(os.getppid())  # its workers are gone for now
    living.mkdir(mode=0o700)
    open_store("session").put(ROWS)
    own = open_store("session").folder
    kept = [own.name, living.name, gone, f"{gone}0"]
    assert folders(temporary) == sorted(kept)


@posix
def test_after_the_owners_end_a_user_starts_a_session_of_its_own(temporary):
    owner = start("put(1); hold()")
    owner.stdout.readline()
    (folder,) = folders(temporary)
    os.environ[SESSION_VARIABLE] = str(temporary / folder)
    shared = open_store("session")
    assert shared.info().rows == 1
    finish(owner)
    assert not folders(temporary)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shared.put(ROWS)
        assert shared.get_many(ROWS) == {}
        assert not folders(temporary)
        own = open_store("session")
        own.put(ROWS)
    assert folders(temporary) == [own.folder.name]
    assert f"-{os.getpid()}-" in own.folder.name


def test_a_folder_that_vanishes_is_made_again(temporary):
    store = open_store("session")
    store.put(ROWS)
    shutil.rmtree(store.folder)
    store.put(ROWS)
    assert set(store.get_many(ROWS)) == set(ROWS)
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    assert not store.broken
