"""Ctrl-C at any moment, and memory that runs out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import pytest

from sklearn_transfer.store.session import SESSION_VARIABLE

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")


@pytest.mark.parametrize("side_by_side", [1, 2])
@pytest.mark.parametrize("what", ["transform", "fit"])
def test_an_interrupt_at_any_moment(
    what, side_by_side, amount, outcome, start, tmp_path
):
    from tests.stress import workers

    n = amount(200, least=8)
    (seen, duration), told = start(
        workers.interrupt, what, str(tmp_path), n, side_by_side
    ).result()
    assert told == []
    assert len(seen) == n and max(seen) < 2.0
    # The job has dozens of batches; heard at its end, it would be a half.
    assert np.median(seen) < duration / 4
    outcome(
        "An interrupt ends fit and transform within two seconds or one batch, leaves "
        "no thread and no claim, and a later fit works and reuses what was stored",
        f"{len(seen)} at random moments of a {what} of {duration:.2f} s, "
        f"{side_by_side} batches at a time",
        f"ended after {np.median(seen):.3f} s, at most {max(seen):.2f} s",
    )


def stored_in(temporary: Path) -> int:
    """Bytes of the activations that a session has stored."""
    return sum(path.stat().st_size for path in temporary.glob("*/v*/segments/*"))


def sessions_in(temporary: Path) -> list[Path]:
    return list(temporary.glob("sklearn_transfer-*"))


class Searching:
    """A user's process that searches on two workers, told what to do line by line."""

    def __init__(self, temporary: Path, errors):
        environment = {k: v for k, v in os.environ.items() if k != SESSION_VARIABLE}
        self.temporary, self.relatives = temporary, []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.stress.workers", "interrupt"],
            cwd=ROOT,
            env=environment | {"PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )

    def interrupt(self, line: str, send) -> float:
        """Begin a search; interrupt it once it has stored; the time of that."""
        before = stored_in(self.temporary)
        self.process.stdin.write(line)
        self.process.stdin.flush()
        assert self.answer() == {"begun": True}
        self.wait_until(lambda: stored_in(self.temporary) > before)
        self.relatives += psutil.Process(self.process.pid).children(recursive=True)
        sent = time.monotonic()
        send(self.process.pid, signal.SIGINT)
        return sent

    def answer(self) -> dict:
        return json.loads(self.process.stdout.readline())

    def wait_until(self, condition) -> None:
        deadline = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


def test_an_interrupt_of_a_search_on_two_processes(amount, outcome, tmp_path):
    """By a signal to the process alone, and by Ctrl-C, which its workers get too."""
    temporary, n, seconds = tmp_path / "temporary", amount(10), []
    temporary.mkdir()
    with (tmp_path / "errors").open("w") as errors:
        user = Searching(temporary, errors)
    try:
        for i in range(n):
            sent = user.interrupt("search\n", (os.killpg, os.kill)[i % 2])
            told = user.answer()
            seconds.append(told["ended"] - sent)
            # What the workers had stored was not computed again.
            assert told["is_right"]
            assert told["computed"] == told["lacking"] < told["asked_for"]
        sent = user.interrupt("last\n", os.kill)
        # The session's folder goes with the last line of the user's program; the
        # interpreter then takes its time to leave.
        user.wait_until(lambda: not sessions_in(temporary))
        seconds.append(time.monotonic() - sent)
        assert user.process.wait(60) != 0
        assert "KeyboardInterrupt" in (tmp_path / "errors").read_text()
        _, orphans = psutil.wait_procs(user.relatives, timeout=20)
        assert len(user.relatives) >= 2 and orphans == []
        assert not sessions_in(temporary)
    finally:
        user.end()
    assert max(seconds) < 2.0, seconds
    outcome(
        "An interrupt of GridSearchCV(n_jobs=2): it ends within two seconds or one "
        "batch, leaves no process and no session store, and a later fit reuses what "
        "was stored",
        f"{len(seconds)} interrupts, by a signal to one process or to the whole group",
        f"ended after {np.median(seconds):.2f} s, at most {max(seconds):.2f} s",
    )


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_a_fit_where_gradients_were_left_off(mode, outcome, start):
    """As an interrupt may leave them, between two steps of torch's own code."""
    from tests.stress import workers

    alone = start(workers.fit_where_gradients_are_off, "enable_grad").result()[0]
    found = start(workers.fit_where_gradients_are_off, mode).result()[0]
    np.testing.assert_array_equal(found, alone)
    outcome("A fit works inside torch.no_grad()", mode, "the same result")


# -- memory that runs out ----------------------------------------------------------

ERRORS = {
    "MemoryError": MemoryError(),
    "torch on a CPU": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't "
        "allocate memory: you tried to allocate 1073741824 bytes."
    ),
}


@pytest.mark.parametrize("kind", list(ERRORS))
def test_a_failed_allocation_makes_batches_smaller(kind, amount, outcome, start):
    from tests.stress import workers

    # How many rows fit; at most so many are in one batch.
    limits = {"encode": 64, "train": 32, "train all": 32}
    n_tried, n_refused = 0, 0
    for what, batch in limits.items():
        truth, _, _ = start(
            workers.run_short_of_memory, what, batch, ERRORS[kind]
        ).result()[0]
        assert truth is not None
        n = amount(30, least=2)
        for most in np.unique(np.geomspace(0.5, batch - 1, n).astype(int)):
            (found, failure, refused), told = start(
                workers.run_short_of_memory, what, int(most), ERRORS[kind]
            ).result()
            assert refused
            n_tried, n_refused = n_tried + 1, n_refused + refused
            if most == 0:
                assert found is None and "does not fit in memory" in failure
                assert "shape (" in failure and "image_size" in failure
                continue
            np.testing.assert_allclose(found, truth, rtol=1e-3, atol=1e-5)
            assert all(line.startswith("MicroBatchWarning") for line in told)
    outcome(
        "A failed allocation in encoding or training: smaller batches and the same "
        "result, or a MemoryError that names the sizes",
        f"{n_tried} limits, {n_refused} refusals as {kind}",
        "results equal to 1e-5; one row too many is a MemoryError with its shape",
    )


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="RLIMIT_AS is Linux's")
@pytest.mark.skipif(
    tuple(map(int, version("torch").split(".")[:2])) < (2, 10),
    reason="convolutions of torch 2.9 crash where memory is refused",
)
def test_an_address_space_that_ends(outcome, start):
    """Not of training: torch's backward pass itself crashes where memory is refused."""
    from tests.stress import workers

    found = {}
    for megabytes in (100, 200, 400):
        line, told = start(workers.under_a_limit, megabytes * 2**20, 128, 192).result()
        is_error = line.startswith("MemoryError") and any(map(str.isdigit, line))
        assert told == [] and (line == "finite True" or is_error), (megabytes, line)
        found[megabytes] = "a MemoryError" if is_error else "done"
    assert "done" in found.values()
    outcome(
        "A failed allocation in encoding or training: smaller batches and the same "
        "result, or a MemoryError that names the sizes",
        "RLIMIT_AS with room of 100, 200 and 400 MB, 192 images in one batch",
        ", ".join(f"{megabytes} MB: {how}" for megabytes, how in found.items()),
    )
