"""What the package's speed, memory and accuracy are held against, one script each.

    python -m benchmarks                    all of them, in processes of their own
    python -m benchmarks images texts       some
    python -m benchmarks.images --quick     one, at a size that only shows it works

They need the folder of real data beside the repository (``--data`` for another
place) and, for ``peers``, ``pip install -e ".[bench]"``.
"""

from __future__ import annotations

import os

# Before any Hugging Face import: neither side of a comparison looks at the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
