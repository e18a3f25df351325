"""How much is done, and the table of docs/reliability.md that a run writes."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from sklearn_transfer._show_versions import _version
from tests.stress import SHARE

# The file whose table is written anew, between these two lines.
FILE_VARIABLE = "SKLEARN_TRANSFER_RELIABILITY"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
PACKAGES = ("torch", "scikit-learn", "skorch", "numpy", "Pillow", "transformers")


class Outcome(NamedTuple):
    """One line of the table."""

    promise: str
    test: str
    tried: str
    found: str
    seconds: float


_outcomes: list[Outcome] = []
# Tests that told no outcome: they failed, or were skipped for this reason.
_others: dict[str, str] = {}


@pytest.fixture
def amount() -> Callable[..., int]:
    """How often something is done: its share of the full count.

    ``amount(full, least=1)`` gives an int of at least ``least``: so much that the
    test still means something.
    """

    def share_of(full: int, least: int = 1) -> int:
        return max(least, round(full * SHARE))

    return share_of


@pytest.fixture
def outcome(request) -> Callable[[str, str | int, str], None]:
    """Tells what was found: ``outcome(promise, tried, found)``.

    Called at a test's end, after its asserts, once a promise. Tests of one promise
    share its words, and stand side by side in the table.
    """
    started = time.perf_counter()

    def tell(promise: str, tried: str | int, found: str) -> None:
        tried = f"{tried:,}" if isinstance(tried, int) else tried
        seconds = time.perf_counter() - started
        _outcomes.append(Outcome(promise, request.node.nodeid, tried, found, seconds))

    return tell


@pytest.fixture
def start():
    """Starts functions of workers.py in processes; whatever happens, they end."""
    from tests.stress.workers import Child

    children = []

    def start_child(function, *arguments) -> Child:
        children.append(Child(function, *arguments))
        return children[-1]

    yield start_child
    for child in children:
        if child.process.is_alive():
            child.kill()


def pytest_configure():
    path = os.environ.get(FILE_VARIABLE)
    if path:
        _around_the_table(Path(path))  # better now than after half an hour


def pytest_runtest_logreport(report):
    if not report.nodeid.startswith("tests/stress/"):
        return
    if report.failed:
        _others[report.nodeid] = f"**FAILED** in its {report.when}"
    elif hasattr(report, "wasxfail"):
        _others[report.nodeid] = f"**known to fail**: {report.wasxfail}"
    elif report.skipped:
        _others[report.nodeid] = "not tried: " + _reason(report)


def _reason(report) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else "skipped"
    return text.removeprefix("Skipped: ")


def pytest_sessionfinish(exitstatus):
    path = os.environ.get(FILE_VARIABLE)
    finished = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    if path and finished:
        before, after = _around_the_table(Path(path))
        Path(path).write_text(f"{before}{BEGIN}\n{_table()}{END}{after}", "utf-8")


def _around_the_table(path: Path) -> tuple[str, str]:
    """What stands before and after the table."""
    try:
        before, rest = path.read_text("utf-8").split(BEGIN)
        _, after = rest.split(END)
    except (OSError, ValueError) as error:
        raise pytest.UsageError(
            f"{FILE_VARIABLE}={path} has to name a file with one line {BEGIN!r} and "
            f"after it one line {END!r}, such as docs/reliability.md ({error})."
        ) from error
    return before, after


def _table() -> str:
    """The outcomes by promise in the order of the tests, and of what machine."""
    lines = [
        f"\n{_circumstances()}\n",
        "| promise | test | tried | outcome | seconds |",
        "|---|---|---|---|---:|",
    ]
    told = [o for o in _outcomes if o.test not in _others]
    order = list(dict.fromkeys(o.promise for o in told))
    said = ""
    for o in sorted(told, key=lambda o: order.index(o.promise)):
        promise = "" if o.promise == said else o.promise  # once for all its tests
        said = o.promise
        cells = promise, _link(o.test), o.tried, o.found, f"{o.seconds:.0f}"
        lines.append(_row(cells))
    lines += [
        _row(("", _link(test), "", why, "")) for test, why in sorted(_others.items())
    ]
    return "\n".join(lines) + "\n\n"


def _row(cells) -> str:
    escaped = (" ".join(cell.split()).replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def _link(test: str) -> str:
    """The test's name, linked to its file."""
    path, _, name = test.partition("::")
    return f"[`{Path(path).stem}::{name}`](../{path})"


def _circumstances() -> str:
    versions = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    command = "make stress" if SHARE == 1 else f"the tests at {SHARE:g} of the counts"
    return (
        f"Written by `{command}` on {time.strftime('%Y-%m-%d')}: {_processor()}, "
        f"{os.cpu_count()} cores, {_memory()}, {platform.system()} "
        f"{platform.release()}, Python {platform.python_version()}, {versions}."
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    return names[0].strip() if names else platform.machine()


def _memory() -> str:
    n_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{n_bytes / 2**30:.0f} GiB of memory"
