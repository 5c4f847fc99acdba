"""Imports follow the layers of docs/architecture.md, names are told apart, and all is installed."""

from __future__ import annotations

import ast
import fnmatch
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("space", "nas", "benchmarks")
LAYERS = (
    ("space",),
    ("nas.core",),
    ("nas.data", "nas.search", "nas.export", "nas.jobs"),
    ("nas.labels", "nas.measure"),
    ("nas.train",),
    ("nas.inherit",),
    ("nas.distill",),
    ("nas.report", "nas.transfer"),
    ("nas.contract",),
    ("benchmarks",),
)
"""A module imports its own package and lower layers only; a `__main__` may import anything."""
LAYER = {package: number for number, layer in enumerate(LAYERS) for package in layer}


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = path
    return found


def package_of(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "nas" else parts[0]


def imports(path: Path, module: str) -> set[str]:
    """Our own modules that a file imports anywhere, inside functions too."""
    known = modules()
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            names = [f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names]
        else:
            continue
        found |= {n for n in names if n.split(".")[0] in PACKAGES and n != "nas"}
    return found - {module}


@pytest.mark.parametrize("module", [m for m in modules() if m != "nas"])
def test_imports_follow_the_layers(module: str) -> None:
    own = package_of(module)
    for target in imports(modules()[module], module):
        assert not target.endswith("__main__"), f"{module} imports {target}"
        there = package_of(target)
        allowed = there == own or module.endswith("__main__") or LAYER[there] < LAYER[own]
        assert allowed, f"{module} imports {target}"


def test_there_are_no_cycles_between_modules() -> None:
    graph = {m: imports(p, m) for m, p in modules().items()}
    state: dict[str, int] = {}

    def visit(module: str, path: tuple[str, ...]) -> None:
        if state.get(module) == 2:
            return
        assert module not in path, " -> ".join((*path, module))
        for target in sorted(graph.get(module, ())):
            visit(target, (*path, module))
        state[module] = 2

    for module in graph:
        visit(module, ())


def test_no_module_lies_directly_in_nas_and_none_shares_its_name() -> None:
    assert [p.name for p in (ROOT / "nas").glob("*.py")] == ["__init__.py"]
    names = Counter(p.name for p in (ROOT / "nas").rglob("*.py"))
    shared = {"__init__.py", "__main__.py", "jobs.py"}
    assert [name for name, count in names.items() if count > 1 and name not in shared] == []


def test_nothing_outside_a_familys_files_names_a_family() -> None:
    own = ("space.tinyvit", "space.vit", "benchmarks")
    for module, path in modules().items():
        if module in ("nas.core.config", "nas.contract.__main__") or module.startswith(own):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and node.value in ("tinyvit", "vit"):
                raise AssertionError(f"{module} names a family")
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
                assert not {"space.tinyvit", "space.vit"} & set(names), module


def test_every_module_is_installed() -> None:
    """An editable install hides what a wheel would lack."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["packages"]["find"]["include"]
    for top in PACKAGES:
        for module in (ROOT / top).rglob("*.py"):
            folder = module.parent
            package = ".".join(folder.relative_to(ROOT).parts)
            assert any(fnmatch.fnmatch(package, pattern) for pattern in patterns), package
            assert (folder / "__init__.py").is_file(), f"{package} is no package"
