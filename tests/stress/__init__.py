"""Faults and long runs: one code for `make test` and, at full counts, `make stress`.

conftest.py            how much is done, and the table of docs/reliability.md
workers.py             what runs in processes of its own
test_store_faults.py   full disks, damaged files, weights that are programs
test_processes.py      killed writers, many writers, equal results everywhere
test_interrupts.py     Ctrl-C, and memory that runs out
test_steady_state.py   hundreds of fits, thousands of transforms, threads
"""

from __future__ import annotations

import os

# Of the full counts; `make test` does a fiftieth, `make stress` sets 1.
SHARE = float(os.environ.get("SKLEARN_TRANSFER_STRESS", 1 / 50))
