"""What the package's speed, memory and accuracy are held against, one script each.

    python -m benchmarks                    all of them, in processes of their own
    python -m benchmarks images texts       some
    python -m benchmarks.images --quick     one, at a size that only shows it works
    python -m benchmarks.epoch --part texts a part of one that has parts

They need the folder of real data beside the repository (``--data`` for another
place) and, for ``peers`` and ``epoch``, ``pip install -e ".[bench]"``. Two scripts
make what the package ships and are run by hand: ``train_embedded`` and ``defaults``.
"""

from __future__ import annotations

import os

# Before any Hugging Face import: neither side of a comparison looks at the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
