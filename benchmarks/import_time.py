"""Seconds to import the package. Peer: ``import sklearn`` alone."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks._common import DATA, Figure, run_alone

OURS = "import sklearn_transfer"
OURS_USED = "from sklearn_transfer import ImageFeaturizer, TextFeaturizer"
PEER = "import sklearn"
PEER_USED = "from sklearn.linear_model import LogisticRegression"
MEASURE = """
import sys, time
start = time.perf_counter()
{statement}
print(time.perf_counter() - start, "torch" in sys.modules)
"""


def main(quick: bool = False, data: Path = DATA) -> list[Figure]:
    statements = (OURS, PEER, OURS_USED, PEER_USED)
    seconds: dict[str, list[float]] = {s: [] for s in statements}
    loads_torch = dict.fromkeys(statements, False)
    with tempfile.TemporaryDirectory() as folder:
        environment = _environment(folder)
        for i in range(2 if quick else 8):
            for statement in statements:
                took, torch_there = _measure(statement, environment)
                loads_torch[statement] |= torch_there
                if i:  # the first round compiles and fills the file cache
                    seconds[statement].append(took)
    took = {s: statistics.median(values) for s, values in seconds.items()}
    return [
        Figure(
            f"`{OURS}`: more than the peer by",
            f"{took[OURS]:.3f} s",
            f"{took[PEER]:.3f} s (`{PEER}`)",
            took[OURS] - took[PEER],
            "s",
            at_most=0.05,
        ),
        Figure(
            "both estimators imported: more than the peer by",
            f"{took[OURS_USED]:.3f} s",
            f"{took[PEER_USED]:.3f} s (`{PEER_USED}`)",
            took[OURS_USED] - took[PEER_USED],
            "s",
        ),
        Figure(
            "of the two imports, those that load torch",
            "",
            "",
            float(loads_torch[OURS] + loads_torch[OURS_USED]),
            at_most=0,
        ),
    ]


def _environment(folder: str) -> dict[str, str]:
    """As after an installation: both sides find compiled files."""
    environment = dict(os.environ, PYTHONPYCACHEPREFIX=folder)
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment


def _measure(statement: str, environment: dict[str, str]) -> tuple[float, bool]:
    code = MEASURE.format(statement=statement)
    command = [sys.executable, "-c", code]
    out = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout
    took, torch_there = out.split()
    return float(took), torch_there == "True"


if __name__ == "__main__":
    run_alone(main, __doc__, needs_data=False)
