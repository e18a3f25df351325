"""What is declared about the package is true: its dependencies and its types."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import sklearn_transfer

PACKAGE = Path(sklearn_transfer.__file__).parent
ROOT = PACKAGE.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
NEEDED = PROJECT["dependencies"]
EXTRAS = PROJECT["optional-dependencies"]
LOWEST = (ROOT / "tests" / "lowest.txt").read_text("utf-8")


def bounds(lines: Iterable[str]) -> dict[str, Version]:
    """The version that each requirement names, where it names one."""
    found = {}
    for requirement in map(Requirement, lines):
        for part in requirement.specifier:
            assert part.operator in (">=", "=="), requirement
            found[canonicalize_name(requirement.name)] = Version(part.version)
    return found


def names(lines: Iterable[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in lines}


def imported_by_the_package() -> set[str]:
    """Distributions that the package imports from, at a module's top or later."""
    modules = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add(node.module)
    modules = {module.partition(".")[0] for module in modules}
    theirs = modules - sys.stdlib_module_names - {"sklearn_transfer"}
    home = packages_distributions()
    return {canonicalize_name(home[module][0]) for module in theirs}


def test_the_lowest_supported_versions_are_the_ones_tested():
    pins = [line for line in re.sub("#.*", "", LOWEST).splitlines() if line.strip()]
    of_tests = [line for name in ("plots", "test", "timm") for line in EXTRAS[name]]
    declared, tested = bounds([*NEEDED, *of_tests]), bounds(pins)
    assert {name: tested.get(name) for name in declared} == declared
    assert not names(NEEDED) - tested.keys()


def test_what_is_imported_is_declared_and_the_other_way_round():
    imported = imported_by_the_package()
    optional = names(line for lines in EXTRAS.values() for line in lines)
    assert names(NEEDED) <= imported <= names(NEEDED) | optional


def test_type_checkers_are_told_that_there_are_types():
    """PEP 561: without the marker, they ignore every annotation."""
    assert (PACKAGE / "py.typed").is_file()
    marked = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert "py.typed" in marked["tool"]["setuptools"]["package-data"][PACKAGE.name]
