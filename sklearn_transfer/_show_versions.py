"""What to paste into a bug report."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "sklearn-transfer",
    "scikit-learn",
    "skorch",
    "torch",
    "torchvision",
    "transformers",
    "sentence-transformers",
    "timm",
    "numpy",
    "Pillow",
    "joblib",
)


def show_versions() -> None:
    """Print the versions and devices that a bug report needs.

    Package versions come from their metadata; torch alone is imported, to name
    the device and the precision that ``"auto"`` means here.

    Examples
    --------
    >>> from sklearn_transfer import show_versions
    >>> show_versions()  # doctest: +ELLIPSIS
    <BLANKLINE>
    System
    ...
    """
    print("\nSystem")
    print(f"    python: {sys.version.split()[0]}")
    print(f"  platform: {platform.platform()}")
    print("\nPackages")
    for name in PACKAGES:
        print(f"{name:>22}: {_version(name)}")
    print("\nDevice")
    for key, value in _device_facts().items():
        print(f"{key:>22}: {value}")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _device_facts() -> dict[str, object]:
    import torch

    from sklearn_transfer.running.device import resolve_device, resolve_precision

    device = resolve_device("auto")
    facts = {
        "device": device,
        "precision": resolve_precision("auto", device),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        facts["GPU"] = torch.cuda.get_device_name(device)
    return facts
