"""What runs in processes of its own: one that has loaded torch forks them all."""

from __future__ import annotations

import _thread
import ctypes
import functools
import gc
import json
import multiprocessing
import os
import pickle
import signal
import sqlite3
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil

# What a first fit loads: it takes seconds, and the server is to have it already.
import sklearn.linear_model  # noqa: F401
import torch
import torch._inductor.utils
from sklearn.model_selection import GridSearchCV

import sklearn_transfer.training.tune  # noqa: F401
from sklearn_transfer import (
    ImageClassifier,
    ImageFeaturizer,
    TextClassifier,
    cache_info,
)
from sklearn_transfer.running import parallel, passes
from sklearn_transfer.running.device import Runner
from sklearn_transfer.store.notices import BYTES_VARIABLE
from sklearn_transfer.store.session import SESSION_VARIABLE, open_store
from sklearn_transfer.training.network import TunedNetwork
from tests.fine_tuning_data import remarks, stripes, text_model

# The server imports this file, and each child is a fork of it: 10 ms, not 5 s.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.stress.workers"])
SIZE = 16
K = 2  # the boundary at which prefixes are stored, of 8 kB each
PLENTY = 10**9
# Seconds after which a child hangs; no promise is about it.
PATIENCE = 600.0


class Child:
    """A function in a process of its own; ``result`` is what it gives or raises."""

    def __init__(self, function: Callable, *arguments):
        self.pipe, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(
            target=_tell, args=(theirs, function, arguments), daemon=True
        )
        self.process.start()
        theirs.close()

    def result(self):
        """What the function gave, and the warnings that its user would see."""
        if not self.pipe.poll(PATIENCE):
            raise TimeoutError("the child hangs")
        found, told, error = self.pipe.recv()
        self.process.join(PATIENCE)
        assert error is None, error
        return found, told

    def kill(self) -> None:
        """kill -9, whatever it is doing."""
        self.process.kill()
        self.process.join(PATIENCE)
        self.pipe.close()


def _tell(pipe, function, arguments) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            answer, error = function(*arguments), None
        except BaseException:
            answer, error = None, traceback.format_exc()
    told = [f"{w.category.__name__}: {w.message}" for w in caught]
    with warnings.catch_warnings():
        pipe.send((answer, told, error))


# -- pictures and what is computed of them -------------------------------------


def pictures(n: int, seed: int, size: int = SIZE) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, size, size, 3), np.uint8)


def featurizer(cache, **parameters) -> ImageFeaturizer:
    """Gives stored rows whole: every tap of the network, in order."""
    given = {"image_size": SIZE, "precision": "float32", "layers": "all"} | parameters
    return ImageFeaturizer("embedded@random", cache=cache, **given)


def classifier(cache, **parameters) -> ImageClassifier:
    """Stores features for its probe, and prefixes to train from."""
    given = {
        "freeze_depth": K,
        "image_size": SIZE,
        "precision": "float32",
        "max_epochs": 2,
        "early_stopping": False,
        "random_state": 0,
        **parameters,
    }
    return ImageClassifier("embedded@random", cache=cache, **given)


def encode(kind: str, X, cache) -> tuple[list[bytes], np.ndarray]:
    """Keys and stored form of each picture: features, or activations at ``K``."""
    f = featurizer(cache, batch_size=32).fit(X)
    rows = f._rows(X)
    digests, _ = f._digests(rows)
    if kind == "prefix":
        found = f._prefixes(rows, digests, K, PLENTY)
        return f._request.prefix_keys(digests, K), np.stack(found._rows)
    return f._request.keys(digests), f.transform(X)


def agree(kind: str, found, truth) -> bool:
    """Prefixes to the last bit; features to rounding, for their batches differ."""
    if kind == "prefix":
        return np.array_equal(found, truth)
    return np.allclose(found, truth, rtol=1e-4, atol=1e-6)


@contextmanager
def counting(counter):
    """Count pictures that go through the network in shared memory."""
    plain = {name: getattr(Runner, name) for name in ("taps", "until")}

    def counted(name):
        def run(self, batch, *more):
            found = plain[name](self, batch, *more)
            with counter.get_lock():
                counter.value += len(batch)
            return found

        return run

    for name in plain:
        setattr(Runner, name, counted(name))
    try:
        yield
    finally:
        for name, function in plain.items():
            setattr(Runner, name, function)


# -- one writes and is killed, another reads -----------------------------------


def write(kind: str, cache: str, n: int, seed: int, encoded) -> None:
    with counting(encoded):
        encode(kind, pictures(n, seed), cache)


def finish(kind: str, cache: str, n: int, seed: int):
    """All rows, and how many of them had to be computed and were stored."""
    before = cache_info(cache)
    _, rows = encode(kind, pictures(n, seed), cache)
    after = cache_info(cache)
    return before, after, rows


def read(pipe) -> int:
    """Serve orders (kind, cache, n, seed): give the truth, then read until told.

    The truth is computed without a cache. Gives how many rows were compared in all.
    """
    rng, n_compared = np.random.default_rng(0), 0
    while (order := pipe.recv()) is not None:
        kind, cache, n, seed = order
        keys, truth = encode(kind, pictures(n, seed), None)
        pipe.send(truth)
        store, wrong, place = open_store(cache), [], dict(zip(keys, truth, strict=True))
        while not pipe.poll(0.001):
            asked = [keys[i] for i in rng.integers(0, n, 64)]
            for key, row in store.get_many(asked, kind).items():
                n_compared += 1
                if not agree(kind, row, place[key]):
                    wrong.append(key)
        pipe.recv()
        pipe.send((wrong, store.broken))
    return n_compared


# -- many at once ---------------------------------------------------------------


def take_part(cache: str, n: int, order_seed: int, barrier, encoded):
    """All rows, asked for in an order of this process's own."""
    order = np.random.default_rng(order_seed).permutation(n)
    X = pictures(n, 0)[order]
    f = featurizer(cache, layers="last").fit(X)
    features = np.empty((n, f._n_features_out), np.float32)
    barrier.wait(PATIENCE)
    with counting(encoded):
        features[order] = f.transform(X)
    return features, open_store(cache).broken


# -- interrupted -----------------------------------------------------------------


def threads_left(before: int) -> int:
    """Threads of Python beyond those, once what is ending has ended."""
    deadline = time.monotonic() + 10
    while True:
        gc.collect()
        left = _thread._count() - before
        if left <= 0 or time.monotonic() > deadline:
            return left
        threading.Event().wait(0.01)


def claims_in(cache: str) -> list:
    (path,) = Path(cache).glob("v*/rows.sqlite")
    connection = sqlite3.connect(path)
    try:
        return connection.execute("SELECT owner FROM claims").fetchall()
    finally:
        connection.close()


class Interrupted:
    """Runs a job, and interrupts it after some seconds as Ctrl-C does."""

    def __init__(self):
        self.sent = 0.0
        signal.signal(signal.SIGALRM, self._send)

    def _send(self, number, frame):
        self.sent = time.monotonic()
        signal.default_int_handler(number, frame)  # Python's own for Ctrl-C

    def run(self, job: Callable, after: float) -> float | None:
        """Seconds from the signal to the end; None if the job was done before."""
        self.sent = 0.0
        try:
            signal.setitimer(signal.ITIMER_REAL, after)
            job()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            return time.monotonic() - self.sent
        return None


def interrupt(what: str, folder: str, n_rounds: int, side_by_side: int):
    """Interrupt a job on a fresh cache at a random moment, and do it again.

    So many batches run at the same time, each in a thread, as on that many cores.
    """
    parallel.workers_for = passes.workers_for = lambda device: side_by_side
    X, y = stripes(64)
    rng, interrupted = np.random.default_rng(side_by_side), Interrupted()

    def job(cache):
        if what == "transform":
            return featurizer(cache, batch_size=8).fit(X).transform(X)
        return classifier(cache, batch_size=16).fit(X, y).predict_proba(X)

    truth = job(None)
    for i in range(3):  # the first loads what all later ones find loaded
        started = time.monotonic()
        job(f"{folder}/warm-{i}")
        duration = time.monotonic() - started
    n_threads = _thread._count()
    seen, n_distinct = [], sum(cache_info(f"{folder}/warm-0")[i] for i in (0, 4))
    for i in range(5 * n_rounds + 20):
        if len(seen) == n_rounds:
            break
        cache, delay = f"{folder}/{i}", rng.uniform(0, duration)
        seconds = interrupted.run(functools.partial(job, cache), delay)
        if seconds is None:
            duration *= 0.9  # the machine is less busy than it was
            continue
        before = cache_info(cache)
        assert threads_left(n_threads) == 0
        assert not before.rows or not claims_in(cache), "claims outlived the interrupt"
        again = job(cache)
        after = cache_info(cache)
        assert np.allclose(again, truth, rtol=1e-4, atol=1e-5)
        # What was stored was not computed again, and nothing else is missing.
        assert after.rows + after.prefix_rows == n_distinct
        assert after.misses == n_distinct, (before, after)
        seen.append(seconds)
    return seen, duration


# -- no room, and what is left on disk -------------------------------------------


def work_without_room(cache: str, largest_file: int | None):
    """Each result with the cache that fails, and without one."""
    # Else the budget, a tenth of the free space, would keep the disk from filling.
    os.environ[BYTES_VARIABLE] = str(PLENTY)
    X, y = stripes(160)
    if largest_file is not None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    jobs = {
        "transform": lambda cache: featurizer(cache).fit(X).transform(X),
        "again": lambda cache: featurizer(cache).fit(X).transform(X[::-1]),
        "fit": lambda cache: classifier(cache).fit(X, y).predict_proba(X),
        "probe": lambda cache: (
            classifier(cache, freeze_depth="all").fit(X, y).predict_proba(X)
        ),
    }
    return {name: (job(cache), job(None)) for name, job in jobs.items()}


def leave_files(cache: str, temporary: str):
    """Modes of all that lies there while a cache is in use, and what was unpickled."""
    os.umask(0)
    os.environ.pop(SESSION_VARIABLE, None)
    tempfile.tempdir = temporary
    X, y = stripes(64)
    Z, _ = stripes(64, seed=1)
    classifier(cache).fit(X, y)
    folder = open_store(cache).folder
    # A rebuilt index and the lock of whoever rebuilds are files too.
    open_store(cache).close()
    for path in folder.glob("v*/rows.sqlite*"):
        path.write_bytes(b"garbled")
    classifier(cache).fit(Z, y)
    unpickled = []

    def note(event, arguments):
        if event.startswith(("pickle.", "marshal.loads")):
            unpickled.append(event)

    sys.addaudithook(note)
    store, f = open_store(cache), featurizer(cache).fit(Z)
    rows = f._rows(Z)
    digests, _ = f._digests(rows)
    unpickled.clear()  # of imports
    assert len(store.get_many(f._request.keys(digests))) == 64
    assert len(store.get_many(f._request.prefix_keys(digests, K), "prefix")) == 64
    seen = list(unpickled)
    paths = [folder, *folder.rglob("*")]
    starts = [path.read_bytes()[:2] for path in paths if path.is_file()]
    seen += [start for start in starts if start[:1] == b"\x80" and start[1:] < b"\x06"]
    return {str(path): path.stat().st_mode for path in paths}, seen


# -- memory that runs out ---------------------------------------------------------


class Refusing:
    """Fails like an allocator where a network is given more than so many rows."""

    def __init__(self, most: int, error: BaseException):
        self.most, self.error, self.n_refused = most, error, 0

    def __call__(self, function: Callable, rows_of: Callable) -> Callable:
        def guarded(*arguments):
            if rows_of(*arguments) > self.most:
                self.n_refused += 1
                raise self.error
            return function(*arguments)

        return guarded


def run_short_of_memory(what: str, most: int, error: BaseException):
    """What a job gives where at most so many rows fit at once, and refusals."""
    refusing = Refusing(most, error)
    taps, until = Runner.taps, Runner.until
    forward = TunedNetwork.forward
    Runner.taps = refusing(taps, lambda runner, batch, *_: len(batch))
    # The first boundary is the input itself, which has to fit.
    Runner.until = refusing(until, lambda _, batch, k: len(batch) if k else 0)
    TunedNetwork.forward = refusing(forward, lambda net, h, *_: len(h))
    try:
        return short_of_memory_job(what), None, refusing.n_refused
    except MemoryError as failure:
        return None, str(failure), refusing.n_refused
    finally:
        Runner.taps, Runner.until = taps, until
        TunedNetwork.forward = forward


def short_of_memory_job(what: str):
    X, y = stripes(64)
    if what == "encode":
        return featurizer(None, batch_size=64).fit(X).transform(X)
    model = classifier(None, batch_size=32, freeze_depth=K if what == "train" else 0)
    return model.fit(X, y).predict_proba(X)


def under_a_limit(room: int, size: int, n: int) -> str:
    """Encode ``n`` rows in one batch with ``room`` bytes of address space to go."""
    import resource

    few = pictures(4, 1, size)
    featurizer(None, image_size=size).fit(few).transform(few)  # all is loaded
    X = pictures(n, 0, size)
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
    try:
        model = featurizer(None, image_size=size, batch_size=n).fit(X)
        return f"finite {bool(np.isfinite(model.transform(X)).all())}"
    except MemoryError as error:
        return f"MemoryError: {error}"


def fit_where_gradients_are_off(mode: str) -> np.ndarray:
    """Of a fit in a process where torch was left in such a mode."""
    X, y = stripes(32)
    with getattr(torch, mode)():
        return classifier(None).fit(X, y).predict_proba(X)


# -- hundreds of fits --------------------------------------------------------------


def use_of_resources() -> tuple[int, int, int]:
    """Bytes that this process alone holds, its threads, its files."""
    gc.collect()
    # What was freed goes back to the system, or chance would decide what is held.
    ctypes.CDLL(None).malloc_trim(0)
    process = psutil.Process()
    threads_left(1)  # an ended thread takes a moment to leave the process
    memory = process.memory_full_info()
    return memory.uss, process.num_threads(), process.num_fds()


def repeat(what: str, cache: str, n: int, n_looks: int):
    """Resources after each of so many equal parts of ``n`` fits or transforms."""
    X, y = stripes(40)
    f = featurizer(cache, layers="last").fit(X)
    depths = [K, "all", 0]

    def once(i: int):
        if what == "transform":
            f.transform(X[i % 37 : i % 37 + 1 + i % 3])
        else:
            model = classifier(cache, freeze_depth=depths[i % 3], random_state=i)
            model.fit(np.roll(X, i % 4, axis=0), np.roll(y, i % 4)).predict(X[:8])
            pickle.dumps(model)

    for i in range(max(12, n // 10)):
        once(i)
    looks, done = [], 0
    for look in range(1, n_looks + 1):
        while done < look * n // n_looks:
            once(done)
            done += 1
        looks.append((done, *use_of_resources()))
    return looks


# -- the same everywhere -------------------------------------------------------------


def predict_proba(modality: str, cache) -> tuple[np.ndarray, bool]:
    """Of a model fitted here, and whether global random states stayed as they were."""
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    if modality == "images":
        X, y = stripes(60)
        model = classifier(cache, freeze_depth=3, mixup=0.2, dropout=0.2)
    else:
        X, y = remarks(40)
        model = TextClassifier(
            text_model(), max_epochs=2, random_state=0, cache=cache, dropout=0.1
        )
    found = model.fit(X, y).predict_proba(X)
    after = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    return found, before == after


# -- a user's own process -----------------------------------------------------------
# Not a child of anything: with a session of its own, and workers of joblib's.


def say(**told) -> None:
    print(json.dumps(told), flush=True)


def noting(folder: str, estimator, X, y) -> float:
    """A scorer that notes which process it runs in, and how many threads that has."""
    name = Path(folder) / f"{os.getpid()}"
    name.write_text(f"{torch.get_num_threads()}")
    return estimator.score(X, y)


def search(n_jobs: int, epochs: int, scoring=None, seed: int = 0):
    grid = {"freeze_depth": [3, "all"], "batch_size": [8, 16]}
    X, y = stripes(32, seed=seed)
    model = classifier("session", max_epochs=epochs)
    found = GridSearchCV(model, grid, cv=2, n_jobs=n_jobs, scoring=scoring)
    return found.fit(X, y)


def compare_searches(folder: str) -> None:
    """One search on one process and on two; torch's threads in each."""
    alone = search(1, 1)
    together = search(2, 1, functools.partial(noting, folder))
    X, _ = stripes(32)
    gap = np.abs(alone.predict_proba(X) - together.predict_proba(X)).max()
    workers = {path.name: int(path.read_text()) for path in Path(folder).iterdir()}
    say(
        alone=str(alone.best_params_),
        together=str(together.best_params_),
        gap=float(gap),
        here=torch.get_num_threads(),
        workers={pid: n for pid, n in workers.items() if int(pid) != os.getpid()},
    )


def interrupted_searches() -> None:
    """A search on new pictures for each line; the last interrupt is not caught."""
    for seed, line in enumerate(sys.stdin):
        say(begun=True)
        if line == "last\n":
            search(2, 10_000, seed=seed)
        try:
            search(2, 10_000, seed=seed)
            ended = None
        except KeyboardInterrupt:
            ended = time.monotonic()
        X, y = stripes(32, seed=seed)
        truth = classifier(None).fit(X, y).predict_proba(X)
        before = cache_info()
        found = classifier("session").fit(X, y).predict_proba(X)
        after = cache_info()
        say(
            ended=ended,
            is_right=bool(np.allclose(found, truth, rtol=1e-4, atol=1e-5)),
            computed=after.misses - before.misses,
            lacking=after.rows + after.prefix_rows - before.rows - before.prefix_rows,
            asked_for=2 * len(X),  # features and prefixes
        )


if __name__ == "__main__":
    {"compare": compare_searches, "interrupt": interrupted_searches}[sys.argv[1]](
        *sys.argv[2:]
    )
