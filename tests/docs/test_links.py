"""What the texts point at exists: links, headings of links, and paths of the tree."""

import re
from pathlib import Path

import pytest

from tests.ranks import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(ROOT / top / "README.md" for top in ("launch", "benchmarks", "ds_configs", "examples")),
    *sorted((ROOT / "docs").glob("*.md")),
]
TOPS = "mlomae|data_ffcv|eval|launch|tests|benchmarks|docs|ds_configs|examples"
EXAMPLES = {"eval/nearest_mean.py", "data_ffcv/sources/listed.py"}  # what docs/extending.md adds
FENCED = re.compile(r"^```.*?^```$", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")
# a path from the root up to a file's suffix or a folder's slash; not a part of a longer path, and
# not one with a placeholder or a pattern in it
PATH = re.compile(rf"(?<![\w./-])(?:{TOPS})/(?:[\w.-]+/)*(?:[\w-]+\.\w+)?(?![\w/*{{<.-])")


def slug(heading: str) -> str:
    """How GitHub names the anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.M)}


def broken_links(page: Path) -> list[str]:
    """Relative links of a page that lead nowhere."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    broken = []
    for link in LINK.findall(text):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def missing_paths(text: str) -> list[str]:
    """Paths of the tree that a text names and that are not there."""
    return [path for path in PATH.findall(text) if path not in EXAMPLES and not exists(path)]


def exists(path: str) -> bool:
    return (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_are_in_the_tree(page: Path):
    assert missing_paths(page.read_text(encoding="utf-8")) == []


def test_what_is_missing_is_seen(tmp_path: Path):
    text = "`mlomae/nowhere.py`, `tests/none/`; eval/knn.py. launch/recipes/*.yaml, runs/docs/x.py"
    assert missing_paths(text) == ["mlomae/nowhere.py", "tests/none/"]
    page = tmp_path / "page.md"
    page.write_text("# A *b* c\n[x](page.md#a-b-c) [y](#none) [z](gone.md) [w](https://x.y)\n")
    assert broken_links(page) == ["#none", "gone.md"]


def test_where_is_what_has_six_lines():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"### Where to find things\n\n```\n(.*?)```", text, re.S)
    names = [line.split()[0] for line in block.splitlines()]
    assert names == ["entry", "loop", "task", "losses", "hypergradient", "checkpoint"]
    assert all(PATH.search(line) for line in block.splitlines())


def test_the_drawn_tree_is_the_tree():
    """Every folder of the packages is in README's tree, and nothing else is."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"## Repository layout\n\n```\n(.*?)```", text, re.S)
    drawn = re.findall(r"^( *)(\w+)/ ", block, re.M)
    packages = {path.parent.name for path in (ROOT / "mlomae").glob("*/__init__.py")}
    assert {name for indent, name in drawn if indent} == packages
    assert all((ROOT / name).is_dir() for indent, name in drawn if not indent)
