"""Reports tell what the run's files hold, for finished and unfinished runs alike."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from synthetic_run import CONFIG, RUN, SEED_KEY, as_saved_by_a_spreadsheet, make_run

from nas.contract.checks import make_config, with_absolute_paths
from nas.contract.flags import build_parser as contract_parser
from nas.core.config import RunConfig
from nas.core.settings import parsed
from nas.export.load import find_network
from nas.report import final_table, next_commands, status, write_report
from nas.report.charts import run_chart
from nas.report.figure import Point, Series, draw, front, png_bytes, svg_bytes
from nas.report.read import read_run
from nas.report.tables import duration, markdown, percent, plain, short_count, with_interval
from nas.report.text import stop_counts
from nas.search.study import Study
from nas.train.train_flags import read_flags
from space import InputError

FILES = ("report.md", "pareto.png", "pareto.svg")


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_finished_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_report(run)
    text = (run / "report.md").read_text()
    result = json.loads((run / "result.json").read_text())
    winner = result["final"]["winner"]
    for needed in (
        f"{winner['params']:,}",
        "4.10x fewer than the seed",
        "93.1 +- 1.3 %",
        "on 359 images",
        "+2.0 points [-0.4, +4.4]",
        "no difference from the published 5M",
        "287 holdout images",
        "AMD EPYC family 25/1/1",
        "batch 32, float32, 48 px",
        "it is not accuracy",
        "at least 1.5x the seed's throughput",
        "![",
        "out of memory | 4 |",
        "1,234,567",
        "python -m nas.export",
        "strict=True",
        "0.4123 and 0.4322",
        "embed_dims[2] 384->256",
    ):
        assert needed in text, needed
    table = final_table(run)
    assert [line.split()[0] for line in table.splitlines()[:4]] == ["model", "seed", "winner", "published"]
    assert all(len(line) <= 100 for line in table.splitlines()[:4])
    lines = status(run)
    assert lines.splitlines()[0].endswith(": reached")
    assert "4 of 4 steps done, 32 candidates decided (16 complete, 12 pruned, 4 failed)" in lines


@pytest.mark.parametrize("status", ["reached", "stuck"])
def test_what_to_do_next_names_a_family_that_is_not_the_default(tmp_path: Path, status: str) -> None:
    run = make_run(tmp_path / "run")
    edit(run / "run.json", config={**CONFIG, "family": "vit"})
    edit(run / "result.json", status=status)
    write_report(run)
    (command,) = (line for line in (run / "report.md").read_text().splitlines() if "nas.contract --seed" in line)
    assert " --family vit" in command


@pytest.mark.parametrize(
    ("lo", "hi", "words"),
    [
        (0.01, 0.03, "the winner is better than the published 5M"),
        (-0.03, -0.01, "the winner is worse than the published 5M"),
        (0.0, 0.0, "right on the very same images"),
        (-0.01, 0.03, "no difference from the published 5M that this test could see"),
    ],
)
def test_the_comparison_claims_what_its_interval_allows(tmp_path: Path, lo: float, hi: float, words: str) -> None:
    run = make_run(tmp_path / "run", steps=1)
    final = json.loads((run / "result.json").read_text())["final"]
    edit(run / "result.json", final={**final, "paired": {"difference": (lo + hi) / 2, "lo": lo, "hi": hi}})
    assert words in final_table(run)


@pytest.mark.parametrize("status_word", [None, "stuck", "stopped"])
@pytest.mark.parametrize("steps", [0, 2])
def test_an_unfinished_run(tmp_path: Path, status_word: str | None, steps: int) -> None:
    run = make_run(tmp_path / "run", steps=steps, status=status_word)
    write_report(run)
    text = (run / "report.md").read_text()
    assert all((run / name).stat().st_size > 1000 for name in FILES[1:])
    assert f"# 21M to 5M parameters: {status_word or 'unfinished'}" in text
    assert "strict=True" not in text
    lines = status(run)
    if status_word is None:
        assert f"steps {steps + 1} to 4, the final training and test" in lines
        assert f"--resume {run}" in lines
    assert "model" in final_table(run)


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    """Nothing but run.json, and that almost empty."""
    (tmp_path / "run.json").write_text(json.dumps({"schema": 1, "config": {}}))
    write_report(tmp_path)
    assert "the seed is not trained yet" in status(tmp_path)
    assert final_table(tmp_path)


def test_reporting_changes_no_file_of_the_run_and_repeats_to_the_byte(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=2)
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    write_report(run)
    first = {name: (run / name).read_bytes() for name in FILES}
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before | first
    # In another process: no identifier may hang on hash seeds or on the clock.
    again = tmp_path / "again"
    shutil.copytree(run, again)
    for name in FILES:
        (again / name).unlink()
    code = "import sys; from pathlib import Path; from nas.report import write_report as w; "
    subprocess.run([sys.executable, "-c", code + "w(Path(sys.argv[1]))", str(again)], check=True)
    for name in FILES[1:]:
        assert (again / name).read_bytes() == first[name]
    assert b"<dc:date>" not in first["pareto.svg"]


@pytest.mark.parametrize(
    "case", ["run.json []", "run.json {", "result.json nonsense", "study.db no database", "study.db"]
)
def test_damaged_runs_are_refused_in_one_line(tmp_path: Path, case: str) -> None:
    run, (name, _, data) = make_run(tmp_path / "run", steps=1), case.partition(" ")
    assert status(run)
    (run / name).unlink()
    if data:
        (run / name).write_text(data)
    with pytest.raises(InputError) as caught:
        status(run)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "none", tmp_path, tmp_path / "file"):
        with pytest.raises(InputError, match="RUN"):
            status(path)


def test_no_table_is_read_back(tmp_path: Path) -> None:
    """Whatever a spreadsheet makes of them, or nothing at all."""
    run = make_run(tmp_path / "run", steps=2)
    before = status(run), final_table(run)
    study = Study(run / "study.db", create=False)
    for name, write in (("trials.csv", study.write_csv), ("steps.csv", study.write_steps)):
        write(run / name)
        as_saved_by_a_spreadsheet(run / name)
    study.close()
    (run / "models.csv").write_text("x")
    assert (status(run), final_table(run)) == before
    write_report(run)


def test_chart_holds_every_scored_arch_once_with_its_interval(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run"))
    chart = run_chart([run])
    (series,) = chart.series
    rows = {row.key: row for row in run.trials if row.soft_loss is not None}
    assert sorted(point.key for point in series.points) == sorted(rows)
    kinds = [point.kind for point in series.points]
    assert [kinds.count(kind) for kind in ("seed", "winner", "published", "uniform")] == [1, 1, 1, 4]
    for point in series.points:
        row = rows[point.key]
        assert point.score_hi == (row.soft_loss or 0.0) + (row.soft_loss_se or 0.0)
        seed = row.key == SEED_KEY
        assert (point.speed, point.speed_hi) == ((1.0, None) if seed else (row.ratio, row.ratio_hi))
    assert series.path == tuple(run.result["path"])
    assert any("287 holdout images" in note for note in chart.notes)
    counts = stop_counts(run, most=3)
    assert sum(count for _, count in counts) == len(run.trials) - 1
    assert counts[-1][0] == "other reasons"
    words = "throughput (pruned): not surely as fast as 1.100 to 1.400x the seed (required): 1.013 to 1.213 [1.0, 1.9]"
    assert counts[1] == (words, 12)


@pytest.mark.parametrize("ended", ["reached", "stopped"])
def test_images_per_s_of_a_table_are_of_one_moment(tmp_path: Path, ended: str) -> None:
    """The machine was five times slower when the seed was timed first: every row is the ratio times one pace."""
    run = make_run(tmp_path / "run", status=ended)
    files = read_run(run)
    timed = files.path[-1]
    if ended == "reached":
        final = files.result["final"]
        for side, slower in (("winner", 1), ("published", 3)):
            final[side] |= {name: final[side][name] / slower for name in final[side] if name.startswith("images_per_s")}
        edit(run / "result.json", final=final)
    rows = [
        line.split("  ") for line in final_table(run).splitlines()[1:4] if line.startswith(("seed", "win", "pub", "be"))
    ]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    seed_pace = float(cells[0][3])
    assert seed_pace == pytest.approx((timed.images_per_s or 0) / (timed.ratio or 1), rel=0.01)
    for row in cells[1:]:
        speed, ratio = (float(row[at].split()[0]) for at in (3, 4))
        assert speed == pytest.approx(seed_pace * ratio, rel=0.02)


ODD_NAMES = ("a b", "-x", "ünï", "it's", "5M", "{}", "a;b$c", "~me", "auto", "x:y")


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize("ended", ["reached", "stuck", "stopped", "unverified", None])
def test_what_to_do_next_is_a_command_that_parses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, ended: str | None
) -> None:
    """Whatever the folders are called, with the data and the settings of the run."""
    monkeypatch.chdir(tmp_path)
    folder, data = Path(name), tmp_path / "data" / name
    data.mkdir(parents=True)
    make_run(folder, status=ended)
    (folder / "best.safetensors").write_bytes(b"")
    same: dict[str, Any] = {"data": str(data), "max_images": 120, "max_corrupt": 0.2, "pixel_cache": False}
    same |= {"splits": "train=a b,test=c", "classes": "leaf", "annotations": str(data / "list.csv")}
    more: dict[str, Any] = {"racing": False, "beam": 1, "random_seed": 3}
    more |= {"freeze": ["window_sizes"], "require": ["latency_ms<=900@cpu:b1"]}
    config = {**CONFIG, "img_size": 64, **same, **more}
    edit(folder / "run.json", config=config, dataset={**RUN["dataset"], "classes": 10})
    commands = next_commands(folder)
    assert any(shlex.split(command)[2] == "nas.contract" for command in commands)
    for command in commands:
        python, dash_m, module, *argv = shlex.split(command)
        assert (python, dash_m) == ("python", "-m")
        if module == "nas.train":
            given = read_flags(argv)
            assert find_network(given.arch, "--arch").origin == str((folder / "best.json").resolve())
            assert {name: getattr(given, name) for name in same} == same
            assert (given.img_size, given.data_seed) == (48, 3)
            assert Path(given.init).exists()
            assert not Path(given.out).exists()
        elif module == "nas.contract":
            parsed_flags = vars(contract_parser().parse_args(argv))
            if "resume" in parsed_flags or "status" in parsed_flags:
                assert Path(parsed_flags.get("resume", parsed_flags.get("status"))).resolve() == folder.resolve()
                continue
            named = [field.name for field in fields(RunConfig)]
            flags = {key: value for key, value in parsed_flags.items() if key in named}
            planned = make_config(parsed(RunConfig, with_absolute_paths(flags)))
            kept = same | {name: tuple(value) if isinstance(value, list) else value for name, value in more.items()}
            assert {name: getattr(planned, name) for name in kept} == kept
        elif module == "nas.export":
            assert Path(argv[0]).resolve() == folder.resolve()
            assert not argv[0].startswith("-")


def test_what_to_do_next_can_be_done(tmp_path: Path) -> None:
    """No full training without true classes, no target below what a contraction can reach, images for every class."""
    run = make_run(tmp_path / "run")
    assert len(next_commands(run)) == 3
    edit(run / "run.json", dataset={**RUN["dataset"], "labelled_by": "resnet18"})
    assert not any("nas.train" in command for command in next_commands(run))
    edit(
        run / "run.json",
        dataset={**RUN["dataset"], "classes": 1000},
        config={**CONFIG, "effort": "smoke", "max_images": 800},
    )
    assert all("--max-images 4000" in command for command in next_commands(run)[1:])
    edit(run / "run.json", config={**CONFIG, "target_params": 1000})
    assert len(next_commands(run)) == 2


def test_the_figure_is_legible_at_800_px(tmp_path: Path) -> None:
    """Up is better, both panels share the score, names cover no point, text is >= 9 px high."""
    chart = run_chart([read_run(make_run(tmp_path / "run"))])
    figure = draw(chart)
    left, right = figure.axes
    assert left.yaxis_inverted()
    assert right.yaxis_inverted()
    assert left.get_xscale() == "log"
    assert len(left.get_xticks()) >= 3
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    for axes in (left, right):
        names = {text.get_text() for text in axes.texts}
        assert {"seed 21M", "winner"} <= names <= {"seed 21M", "winner", "published 11M"}
        boxes = [text.get_window_extent(renderer) for text in axes.texts]
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[i + 1 :])
            for point in chart.series[0].points:
                x = point.params if axes is left else point.speed
                assert x is not None
                assert not box.contains(*axes.transData.transform((x, point.score)))
    image = Image.open(io.BytesIO(png_bytes(figure)))
    shrink = 800 / image.width
    for text in (*left.texts, *right.texts, *left.get_xticklabels(), *figure.texts):
        assert text.get_fontsize() / 72 * figure.dpi * shrink >= 9
    frame = figure.bbox
    for text in (*figure.texts, left.xaxis.label, right.xaxis.label, left.yaxis.label):
        box = text.get_window_extent(renderer)
        assert frame.x0 <= box.x0
        assert box.x1 <= frame.x1
        assert frame.y0 <= box.y0
        assert box.y1 <= frame.y1
    pixels = np.asarray(image.convert("L"))
    assert 0.005 < (pixels < 200).mean() < 0.3


def test_figures_of_odd_contents_draw() -> None:
    """No throughput, one point, equal points, five decades of parameters."""
    from nas.report.figure import Chart

    def chart(points: list[Point]) -> Chart:
        return Chart((Series("s", tuple(points)),), "t", "speed", "score", False)

    same = [Point("a", "a", 5e6, 0.5), Point("b", "b", 5e6, 0.5)]
    wide = [Point(str(i), str(i), 10.0**i, i, speed=i, kind="named") for i in range(3, 9)]
    for points in ([], same[:1], same, wide, wide[:1]):
        figure = draw(chart(points))
        assert svg_bytes(figure).startswith(b"<?xml")


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=30), st.booleans(), st.booleans())
@settings(derandomize=True, deadline=None)
def test_front_is_the_set_that_nothing_beats(points: list[tuple[float, float]], x_lower: bool, y_lower: bool) -> None:
    """Against the naive definition."""

    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        x = (b[0] - a[0]) * (1 if x_lower else -1)
        y = (b[1] - a[1]) * (1 if y_lower else -1)
        return x >= 0 and y >= 0 and (x > 0 or y > 0)

    wanted = {p for p in points if not any(beats(q, p) for q in points)}
    found = front(points, x_lower=x_lower, y_lower=y_lower)
    assert set(found) == wanted
    assert len(found) == len(wanted)


def test_numbers_as_people_read_them() -> None:
    assert short_count(5_392_764) == "5.39M"
    assert [short_count(n) for n in (999, 999_499, 999_500, 999_999, 999_999_999)] == ["999", "999k", "1M", "1M", "1G"]
    assert short_count(None) == with_interval(None, 1, 2) == percent(None) == duration(None) == "-"
    assert with_interval(1.934, 1.88, 1.971, "x") == "1.93x [1.88, 1.97]"
    assert with_interval(1234.5, None, 3) == "1,234"
    assert percent(0.9317, 0.0134) == "93.2 +- 1.3 %"
    assert [duration(s) for s in (42, 190, 7500)] == ["42 s", "3 min 10 s", "2 h 5 min"]
    assert markdown(("a", "b"), [["x|y", "1"]]).splitlines()[2] == "| x\\|y | 1 |"
    assert plain(("a", "b"), [["xyz", "1"], ["", "10"]]).splitlines() == ["a     b", "xyz   1", "     10"]
