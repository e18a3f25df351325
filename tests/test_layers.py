"""Arrows point downward only, and torch stays in its folders."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import sklearn_transfer

PACKAGE = Path(sklearn_transfer.__file__).parent
# Lower may not import higher. A folder may import those of smaller rank.
RANK = {
    "exceptions": 0,
    "_locks": 0,
    "_memory": 0,
    "_sklearn": 0,
    "_threads": 0,
    "inputs": 1,
    "store": 1,
    "backbones": 2,
    "running": 3,
    "_show_versions": 4,
    "training": 4,
    "featurizers": 4,
    "fine_tuning": 5,
    "demo": 6,
    "__init__": 7,
    "__main__": 7,
}
MAY_IMPORT_TORCH = {"backbones", "running", "training"}
NO_TORCH_FILES = {
    "backbones/spec.py",
    "backbones/registry.py",
    "backbones/torchvision_names.py",
    "running/request.py",
    "running/encode.py",
}
FILES = sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py"))


def imports_of(file: str, top_level_only: bool = False) -> set[str]:
    """Full names of the modules that a file imports."""
    tree = ast.parse((PACKAGE / file).read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names.add(node.module)
    return names


def place(name: str) -> str:
    """The folder, or the file directly in the package, that a name lies in."""
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize("file", FILES)
def test_arrows_point_downward(file):
    here = file.split("/")[0].removesuffix(".py")
    for name in imports_of(file):
        there = place(name) if name.startswith("sklearn_transfer") else ""
        if there and there != here:
            assert RANK[there] < RANK[here], f"{file} imports {name}"


@pytest.mark.parametrize("file", FILES)
def test_torch_stays_in_its_folders(file):
    loads_torch = any(n.split(".")[0] == "torch" for n in imports_of(file, True))
    allowed = file.split("/")[0] in MAY_IMPORT_TORCH and file not in NO_TORCH_FILES
    assert allowed or not loads_torch, f"{file} imports torch at its top"


def test_sklearn_private_modules_stay_in_one_place():
    private = [
        (file, name)
        for file in FILES
        for name in imports_of(file)
        if name.startswith("sklearn.") and "._" in name and file != "_sklearn.py"
    ]
    assert private == []
