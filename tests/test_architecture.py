"""The house stands: imports follow the arrows of docs/architecture.md, and no others."""

from __future__ import annotations

import ast
import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("space", "nas", "benchmarks")
VALUES = {
    "nas.cells", "nas.config", "nas.cpus", "nas.files", "nas.jobs", "nas.rates", "nas.requirement",
    "nas.seals",
}  # fmt: skip
ENTRIES = {
    "nas.contract", "nas.evaluation", "nas.export", "nas.inherit", "nas.labels", "nas.train",
    "nas.train_flags", "nas.transfer", "nas.worker",
}  # fmt: skip

# room -> rooms of our own that it may import (itself aside); see docs/architecture.md
ROOMS: dict[str, set[str]] = {
    "space": set(),
    "nas.values": {"space"},
    "nas.data": {"space", "nas.values"},
    "nas.training": {"space", "nas.values"},
    "nas.exporting": {"space", "nas.values"},
    "nas.measure": {"space", "nas.values", "nas.exporting"},
    "nas.search": {"space", "nas.values"},
    "nas.distill": {"space", "nas.values", "nas.data", "nas.training"},
    "nas.trainer": {
        "space",
        "nas.values",
        "nas.data",
        "nas.training",
        "nas.distill",
        "nas.exporting",
    },
    "nas.probing": {
        "space",
        "nas.values",
        "nas.data",
        "nas.training",
        "nas.distill",
        "nas.exporting",
    },
    "nas.runner": {"space", "nas.values", "nas.data", "nas.training", "nas.distill", "nas.measure"},
    "nas.executor": {"space", "nas.values", "nas.runner"},
    "nas.report": {"space", "nas.values", "nas.search", "nas.measure"},
    "nas.driver": {
        "space",
        "nas.values",
        "nas.data",
        "nas.exporting",
        "nas.measure",
        "nas.search",
        "nas.executor",
        "nas.report",
    },
    "nas.entry": {
        "space",
        "nas.values",
        "nas.data",
        "nas.executor",
        "nas.runner",
        "nas.driver",
        "nas.report",
        "nas.exporting",
        "nas.measure",
        "nas.training",
        "nas.distill",
        "nas.trainer",
        "nas.probing",
    },
    "benchmarks": {"space", "nas"},
}


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = path
    return found


def room(module: str) -> str:
    if module == "nas":
        return "nas.values"  # a docstring
    head = module.split(".")[0]
    if head != "nas":
        return head
    if module in VALUES:
        return "nas.values"
    if module in ENTRIES:
        return "nas.entry"
    second = ".".join(module.split(".")[:2])
    if second in ROOMS:
        return second
    return "nas.driver"


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
            names = [
                f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names
            ]
        else:
            continue
        found |= {n for n in names if n.split(".")[0] in PACKAGES}
    return found - {module}


@pytest.mark.parametrize("module", modules())
def test_imports_follow_the_arrows(module: str) -> None:
    own = room(module)
    for target in imports(modules()[module], module):
        there = room(target)
        allowed = there == own or there in ROOMS[own]
        if own == "benchmarks":
            allowed = True
        assert allowed, f"{module} ({own}) imports {target} ({there})"


def test_there_are_no_circles_between_modules() -> None:
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


def test_nothing_outside_a_familys_file_knows_a_family_by_name() -> None:
    allowed = {"space.tinyvit", "space.vit", "nas.config", "nas.contract"}
    for module, path in modules().items():
        if module in allowed or module.startswith(("space._tinyvit", "space._vit", "benchmarks")):
            continue
        text = "\n".join(
            line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")
        )
        tree = ast.parse(text)
        for node in ast.walk(tree):
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
