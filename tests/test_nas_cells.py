"""Tables that a spreadsheet opens: no cell is a formula, and every text reads back as it was."""

from __future__ import annotations

import ast
import csv
import io
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from nas.core.table import Writer, guard, unguard
from nas.data import DataSpec, prepare
from nas.data.augment.presets import preset_spec
from nas.labels.request import disagreements
from nas.report.read import read_table
from tests.test_architecture import modules
from tests.test_nas_data_folders import tree

RUN = ("=", "+", "-", "@", "\t", "\r", "\n")
TEXTS = st.text(st.one_of(st.sampled_from("=+-@\t\r\n',\";ab1 "), st.characters(codec="utf-8")))


@given(TEXTS)
@example("'=1")
@example("''")
def test_a_guarded_text_is_no_formula_and_reads_back(text: str) -> None:
    guarded = guard(text)
    assert not guarded.startswith(RUN)
    assert unguard(guarded) == text
    assert guarded == text or guarded == "'" + text
    if not text.lstrip("'").startswith(RUN):
        assert guarded == text == unguard(text)  # older tables read as before


@given(st.one_of(st.integers(), st.floats(), st.none(), st.booleans()))
def test_numbers_stay_as_they_are(value: object) -> None:
    assert guard(value) is value


@given(st.lists(st.tuples(TEXTS, TEXTS, st.integers()), max_size=5))
def test_a_table_reads_back_and_holds_no_formula(rows: list[tuple[str, str, int]]) -> None:
    out = io.StringIO(newline="")
    writer = Writer(out, ("one", "two", "n"))
    writer.writeheader()
    writer.writerows(rows)
    header, *lines = csv.reader(io.StringIO(out.getvalue(), newline=""))
    assert header == ["one", "two", "n"]
    assert not any(cell.startswith(RUN) for line in lines for cell in line[:2])
    assert [(unguard(a), unguard(b), int(n)) for a, b, n in lines] == rows
    again = io.StringIO(newline="")
    Writer(again, ("one", "two", "n")).writerows(
        dict(zip(("one", "two", "n"), row, strict=True)) for row in rows
    )
    assert out.getvalue().endswith(again.getvalue())


@given(st.lists(st.text(st.sampled_from("=+-@'ab ,\""), min_size=1), min_size=1, max_size=4))
def test_the_reader_of_runs_takes_the_guard_off(tmp_path_factory, cells: list[str]) -> None:
    path = tmp_path_factory.mktemp("t") / "t.csv"
    names = [f"c{at}" for at in range(len(cells))]
    out = io.StringIO()
    Writer(out, names).writerows([names, cells])
    path.write_text(out.getvalue())
    assert read_table(path)[1] == [dict(zip(names, cells, strict=True))]


def test_names_of_images_and_classes_are_guarded_in_the_table_of_disagreements(
    tmp_path: Path,
) -> None:
    import torch

    root = tree(tmp_path / "d", each=6)
    (root / "a").rename(root / "=cmd()")
    (root / "b").rename(root / "@b")
    dataset = prepare(DataSpec(str(root), img_size=16), tmp_path / "cache")
    spec = preset_spec("default", dataset)
    logits = torch.tensor([[30.0, -30.0, 0.0]])
    table, count = disagreements(dataset, lambda x: logits.repeat(len(x), 1), spec, 0.5)
    rows = list(csv.reader(io.StringIO(table)))
    assert count == len(rows) - 1 > 0
    assert any(cell.startswith(("'@b", "'=cmd")) for row in rows for cell in row)
    assert not any(cell.startswith(RUN) for row in rows for cell in row)


def test_nothing_writes_a_table_but_the_one_writer() -> None:
    """`nas.measure.measurement_table` writes one line at a time, guarded by hand."""
    own = {"nas.core.table", "nas.measure.measurement_table"}
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("writer", "DictWriter"):
                theirs = isinstance(node.value, ast.Name) and node.value.id == "csv"
                assert not theirs or module in own, f"{module} writes cells unguarded"
