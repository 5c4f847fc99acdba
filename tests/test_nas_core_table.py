"""Tables that a spreadsheet opens: no cell is a formula, and every text reads back as it was."""

from __future__ import annotations

import ast
import csv
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nas.core.table import guard, read_table, table_columns, unguard, write_table
from space.errors import InputError
from tests.test_architecture import modules

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


@dataclass(frozen=True)
class Inner:
    lo: float
    note: str = ""


@dataclass(frozen=True)
class Line:
    count: int
    text: str
    flag: bool
    share: float | None
    inner: Inner | None
    label: str | None = "none"

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count is {self.count}")


SHARES = st.none() | st.floats(allow_nan=False)
LINES = st.builds(
    Line,
    count=st.integers(0),
    text=TEXTS,
    flag=st.booleans(),
    share=SHARES,
    inner=st.none() | st.builds(Inner, lo=st.floats(allow_nan=False), note=TEXTS),
    label=st.none() | TEXTS.filter(bool),
)


@given(st.lists(LINES, max_size=4))
def test_rows_read_back_equal_and_hold_no_formula(tmp_path_factory, rows: list[Line]) -> None:
    path = tmp_path_factory.mktemp("t") / "t.csv"
    write_table(path, rows, Line)
    assert read_table(path, Line) == rows
    with open(path, newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    assert header == list(table_columns(Line)) == ["count", "text", "flag", "share", "lo", "note", "label"]
    assert not any(line[at].startswith(RUN) for line in lines for at in (1, 5, 6))


def test_what_a_spreadsheet_makes_of_a_table_reads_as_before(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xef\xbb\xbfmore,flag,text,count,share\r\nx,TRUE,a,3.0,1E+2\r\n\r\n")
    assert read_table(path, Line) == [Line(3, "a", True, 100.0, None)]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("", "t.csv line 1: got an empty file, want the columns count, text"),
        ("count,text\n", "t.csv line 1: got no column flag, want"),
        ("count,text,flag\n1,a\n", "t.csv line 2: got 2 cells, want 3 cells"),
        ("count,text,flag\n1.5,a,True\n", "t.csv line 2: count: got 1.5, want an integer"),
        ("count,text,flag\n,a,True\n", "t.csv line 2: count: got nothing, want an integer"),
        ("count,text,flag\n1,a,2\n", "t.csv line 2: flag: got 2, want True or False"),
        ("count,text,flag,share\n1,a,True,b\n", "t.csv line 2: share: got b, want a number"),
        ('count,text,flag\n1,"a\nb",True\n-1,a,True\n', "t.csv line 4: got count is -1, want"),
        ('count,text,flag\n1,"a', "t.csv line 1: got unexpected end of data, want a readable"),
        ("count,text,flag\n1,\udcff,True\n", "t.csv line 1: got 'utf-8' codec can't decode"),
    ],
)
def test_a_bad_table_is_refused_in_one_line(tmp_path: Path, text: str, want: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError) as refused:
        read_table(path, Line, name="t.csv")
    assert str(refused.value).startswith(want)
    assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match="No such file"):
        read_table(tmp_path / "absent.csv", Line)


def test_nothing_writes_a_table_but_the_one_writer() -> None:
    """`nas.measure.measurement_table` writes one line at a time, guarded by hand."""
    own = {"nas.core.table", "nas.measure.measurement_table"}
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("writer", "DictWriter"):
                theirs = isinstance(node.value, ast.Name) and node.value.id == "csv"
                assert not theirs or module in own, f"{module} writes cells unguarded"
