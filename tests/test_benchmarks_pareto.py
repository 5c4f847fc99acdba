"""`python -m benchmarks.pareto` draws runs and tables, and answers bad input in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from synthetic_run import make_run

from benchmarks.pareto import main, read_series

TABLE = (
    "name,params,images_per_s,images_per_s_lo,images_per_s_hi,score\n"
    "21M,21198568,183,170,190,83.1\n11M,10996972,287,,,81.5\n5M,5392764,357,340,370,79.1\n"
)


def test_runs_together_and_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run", steps=2)]
    out = tmp_path / "out.png"
    assert main([*map(str, runs), "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["run: 17 archs", "run (2): 9 archs"]
    assert json.loads(lines[-1]) == {"out": str(out), "series": 2, "points": 26}
    assert Image.open(out).width >= 800
    drawn = [tmp_path / "1.svg", tmp_path / "2.svg"]
    for svg in drawn:
        assert main([str(runs[0]), "--out", str(svg)]) == 0
    assert drawn[0].read_bytes() == drawn[1].read_bytes()


def test_a_table_alone_and_beside_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, out = tmp_path / "t.csv", tmp_path / "out.png"
    table.write_text(TABLE)
    series, lower = read_series(table)
    assert not lower
    assert [p.label for p in series.points] == ["21M", "11M", "5M"]
    assert (series.points[0].speed_hi, series.points[1].speed_hi) == (190, None)
    assert main(["--csv", str(table), "--out", str(out)]) == 0
    table.write_text(TABLE.replace("score", "soft_loss"))
    assert read_series(table)[1]
    assert main([str(make_run(tmp_path / "run", steps=1)), "--csv", str(table), "--out", str(out)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["series"] == 2


def test_bad_input_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", steps=1)
    unscored = make_run(tmp_path / "unscored", steps=0, status=None)
    (unscored / "study.db").unlink()
    table, out = tmp_path / "t.csv", tmp_path / "out.png"
    table.write_text(TABLE)
    bad_tables = [
        "",
        "name,params\nx,1\n",
        "name,params,score\nx,1,1\n",
        TABLE.splitlines()[0] + "\n",
        TABLE.replace("183", "fast"),
        TABLE.replace("183", "nan"),
        TABLE.replace("21198568", "-1"),
        TABLE.replace("21198568", "inf"),
        TABLE.replace("83.1", ""),
        TABLE.replace(",83.1", ""),
        (run / "run.json").read_text(),
    ]
    cases = [
        [],
        ["no-such-folder"],
        [str(tmp_path)],
        [str(unscored)],
        [str(run), "--csv", str(table)],
        ["--csv", str(tmp_path / "none.csv")],
        ["--csv", str(tmp_path)],
    ]
    for number, text in enumerate(bad_tables):
        (tmp_path / f"{number}.csv").write_text(text)
        cases.append(["--csv", str(tmp_path / f"{number}.csv")])
    for case in cases:
        assert main([*case, "--out", str(out)]) == 2, case
        printed = capsys.readouterr()
        assert printed.out == ""
        assert len(printed.err.splitlines()) == 1, printed.err
        assert not out.exists()
    for bad in (tmp_path / "x.pdf", tmp_path / "none" / "x.png", tmp_path):
        assert main([str(run), "--out", str(bad)]) == 2
        assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize("runs", [1, 5])
def test_the_legend_stays_inside_the_figure(runs: int, tmp_path: Path) -> None:
    from nas.report.charts import run_chart
    from nas.report.figure import draw
    from nas.report.read import read_run

    folders = [make_run(tmp_path / f"a-long-name-of-a-run-{n}") for n in range(runs)]
    figure = draw(run_chart([read_run(folder) for folder in folders]))
    figure.canvas.draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
