"""What keeps the project small and its names apart: sizes, class names, the documents."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [p for top in ("space", "nas", "benchmarks") for p in (ROOT / top).rglob("*.py")]
TESTS = list((ROOT / "tests").rglob("*.py"))
PAGES = list((ROOT / "docs").glob("*.md"))


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize(
    ("paths", "most"),
    [
        (SOURCES, 450),
        (TESTS, 700),
        (PAGES, 150),
        ([ROOT / "README.md"], 120),
        ([ROOT / "CHANGELOG.md"], 40),
        ([ROOT / "results" / "README.md"], 150),
    ],
    ids=["sources", "tests", "pages", "readme", "changelog", "results"],
)
def test_no_file_is_long(paths: list[Path], most: int) -> None:
    long = {str(p.relative_to(ROOT)): lines_of(p) for p in paths if lines_of(p) > most}
    assert long == {}


def test_the_readme_fits_a_screen_or_three_and_there_are_six_pages() -> None:
    assert (ROOT / "README.md").stat().st_size <= 8 * 1024
    assert len(PAGES) <= 6


def test_no_two_classes_share_a_name() -> None:
    names: Counter[str] = Counter()
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names.update(n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef))
    assert [name for name, count in names.items() if count > 1] == []


def test_every_module_and_package_says_what_it_is() -> None:
    for path in SOURCES:
        said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert said is not None, path
        assert len(said.split()) >= 3, path


def test_the_formatter_decides() -> None:
    skips = sum(p.read_text(encoding="utf-8").count("# fmt: " + "skip") for p in SOURCES + TESTS)
    assert skips <= 15


FOREIGN = {"--nproc-per-node", "--class-map", "--address", "--resources"}
"""Flags of other tools that the documents name."""


def test_every_flag_that_the_documents_name_exists() -> None:
    known = set(FOREIGN)
    for node in (n for path in SOURCES for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("--"):
            known.add(node.value)
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call):
            name = ast.unparse(node.target).replace("_", "-")
            known |= {f"--{name}", f"--no-{name}"} if ast.unparse(node.value.func).endswith("setting") else set()
    for page in (ROOT / "README.md", *PAGES):
        named = re.findall(r"(?<![\w-])--[a-z0-9]+(?:-[a-z0-9]+)*(?![\w-])", page.read_text(encoding="utf-8"))
        assert set(named) <= known, page.name


def test_nothing_large_is_tracked() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    assert [p for p in listed if (ROOT / p).is_file() and (ROOT / p).stat().st_size > 1 << 20] == []
