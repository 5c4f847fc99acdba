"""The label benchmarks at sizes that say nothing: they take turns, count rightly and draw."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from benchmarks import labels, labels_epoch, labels_students
from benchmarks.labels_stock import data_for, store_for
from nas.labels.reader import Replay


def test_ways_take_turns_and_the_first_round_is_left_out() -> None:
    calls: list[str] = []
    ways = {name: (lambda name=name: calls.append(name)) for name in "abc"}  # type: ignore[misc]
    found = labels_epoch.interleaved(ways, 2, 5, "cpu")
    assert {name: len(times) for name, times in found.items()} == {"a": 5, "b": 5, "c": 5}
    assert calls[:12] == [*"ccbbaa", *"aabbcc"]
    assert all(calls.count(name) == 12 for name in "abc")


def test_both_engines_replay_the_stock(tmp_path: Path) -> None:
    dataset = data_for(tmp_path, 16, 320)
    for engine in ("timm", "batched"):
        store = store_for(tmp_path, dataset, engine, epochs=1)
        assert store.spec.augment.engine == engine
        batches = labels_epoch.endless(Replay(dataset.train, store, 32, 0))
        epoch = len(Replay(dataset.train, store, 32, 0).batches(0))
        assert [next(batches).inputs.shape[1:] for _ in range(epoch + 1)] == [(3, 16, 16)] * (
            epoch + 1
        )


def test_summaries_are_means_with_their_range_and_can_be_drawn(tmp_path: Path) -> None:
    rows = [
        {
            "part": "topk",
            "student": "small",
            "way": "soft",
            "topk": k,
            "bytes_a_record": k + 4,
            "random_seed": s,
            "soft_loss": 3 - 0.1 * k + s,
            "top1": 0.1 * k + 0.01 * s,
        }
        for k in (1, 5)
        for s in (0, 1)
    ]
    lines = labels_students.summary(rows)
    assert [(line["topk"], line["seeds"]) for line in lines] == [(1, 2), (5, 2)]
    assert lines[0]["soft_loss"] == pytest.approx(3.4)
    assert (lines[0]["soft_loss_lo"], lines[0]["soft_loss_hi"]) == (2.9, 3.9)
    # One random seed: a rounded mean lies outside a range of no width.
    labels_students.draw(
        labels_students.summary([{**row, "soft_loss": 2.71336, "top1": 0.50713} for row in rows]),
        tmp_path / "g.png",
    )
    labels_students.draw(lines, tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 5000


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        [],
        ["weigh"],
        ["epoch", "--blocks", "2"],
        ["epoch", "--threads", "0"],
        ["students", "--seeds", "0"],
        ["students", "--images", "5"],
    ):
        assert labels.main(arguments) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.slow
def test_students_learn_in_all_three_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s.csv"
    arguments = [
        *("--images", "400", "--epochs", "1", "--seeds", "1", "--out", str(out)),
        *("--figure", str(tmp_path / "f.png"), "--cache-dir", str(tmp_path / "c")),
    ]
    assert labels.main(["students", *arguments]) == 0
    with open(out, newline="") as table:
        rows = list(csv.DictReader(table))
    assert [row["part"] for row in rows] == ["topk"] * 5 + ["truth"] * 3 + ["pretraining"] * 6
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(said["summary"]) == 14
