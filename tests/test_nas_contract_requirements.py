"""A run keeps what its requirements say, on several settings at once, here or on another device."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL_ARCH, Finished
from run_cases import Counting, one_calm_thread, settings, trials

from benchmarks.throughput.networks import sample
from nas.contract import contract
from nas.contract.__main__ import main
from nas.core.requirement import Setting
from nas.measure.device_table import OK, DeviceRow, fingerprint_columns, fingerprint_of, read_rows, write_rows
from nas.measure.fingerprint import take_fingerprint
from nas.measure.measurement import Throughput
from nas.measure.measurement_table import read_measurements
from space import Arch, Context, InputError, get_family
from tests._inline import InlineExecutor

FAMILY = get_family("tinyvit")
CTX = Context(img_size=32, num_classes=10)
SEED = FAMILY.arch(SMALL_ARCH)
REQUIRED = ("speedup>=0.8@cpu:b2", "latency_ms<=500@cpu:b1", "peak_mem_mb<=4000@cpu:b1")


@pytest.fixture(scope="module", autouse=True)
def calm() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        yield from one_calm_thread(patch)


def test_every_setting_is_measured_and_a_second_search_times_finalists_only(finished: Finished, tmp_path: Path) -> None:
    """Kept archs meet all requirements by interval; a cache answers the second run's questions."""
    given = settings(finished, require=REQUIRED, train_per_step=1, steps=1)
    first, second = Counting(), Counting()
    one = contract(**given, out=tmp_path / "one", executor=first)
    two = contract(**given, out=tmp_path / "two", executor=second)
    assert one.status == "reached"
    assert first.kinds.count("visit") >= 8
    assert first.kinds.count("peak_memory") >= 3
    assert second.kinds.count("visit") < first.kinds.count("visit"), "only the finalists are timed afresh"
    assert two.result["winner"] == one.result["winner"]
    verdicts = one.result["final"]["requirements"]
    assert len(verdicts) == len(REQUIRED)
    rows = trials(tmp_path / "one")
    assert {row["basis"] for row in rows} == {"measured"}
    for row in rows[1:]:
        if row["stage"] in ("kept", "proxy", "selection"):
            assert row["requirements"].count(": pass at ") == len(REQUIRED)
        if row["stage"] == "throughput" and row["state"] == "pruned":
            assert row["requirements"].count(": pass at ") < len(REQUIRED)
            # Settings are asked in turn: all but the last one's were met.
            assert ": pass at " not in row["requirements"] or "@cpu:eager:float32:b2: pass" in row["requirements"]
    measured = read_measurements(tmp_path / "one" / "measurements.csv")
    assert {r.measurement.batch for r in measured} == {1, 2}
    assert len({r.measurement.fingerprint for r in measured}) == 2
    report = (tmp_path / "one" / "report.md").read_text()
    assert all(text in report for text in ("speedup>=0.8@cpu", "peak_mem_mb<=4000@cpu"))


@pytest.mark.parametrize("text", ["latency_ms<=0.001@cpu:b1", "speedup>=400@cpu:b2"])
def test_a_requirement_that_nothing_meets_is_refused_before_training(
    text: str, finished: Finished, tmp_path: Path
) -> None:
    executor = Counting()
    with pytest.raises(InputError, match=text.partition(">")[0].partition("<")[0]) as caught:
        contract(**settings(finished, require=(text,)), out=tmp_path / "run", executor=executor)
    assert "\n" not in str(caught.value)
    assert "train" not in executor.kinds
    assert not (tmp_path / "run").exists()


THERE = Setting("cpu", "onnxruntime", "float32", 1)


def elsewhere(name: str = "a board") -> dict[str, Any]:
    """The identity of a device that is not this one."""
    here = take_fingerprint("cpu", threads=4)
    board = replace(here, device_name=name, logical_cores=4, torch="none", timm="none")
    return fingerprint_columns(board.under(THERE, "onnxruntime 1.20.0", CTX.img_size))


def seconds_there(arch: Arch) -> float:
    """What an image takes on the board: a sum of parts, as of a real device."""
    parts = FAMILY.cost_terms_many(FAMILY.table([arch]), CTX)
    weights = np.random.default_rng(1).uniform(0.5, 2.0, len(parts))
    terms = np.array([float(np.asarray(p)[0]) for p in parts.values()])
    return float(1e-4 + 2e-10 * (terms * weights).sum())


def device_row(arch: Arch, name: str) -> DeviceRow:
    pace, ratio = 1.0 / seconds_there(arch), seconds_there(SEED) / seconds_there(arch)
    speed = {"images_per_s": pace, "images_per_s_lo": pace * 0.99, "images_per_s_hi": pace * 1.01}
    ratios = {"ratio": ratio, "ratio_lo": ratio * 0.995, "ratio_hi": ratio * 1.005}
    return DeviceRow(
        arch=name,
        family="tinyvit",
        key=FAMILY.key(arch, CTX),
        spec=json.dumps(FAMILY.to_dict(arch)),
        img_size=CTX.img_size,
        num_classes=CTX.num_classes,
        setting=THERE,
        threads=4,
        state=OK,
        throughput=Throughput(**speed, **ratios, coverage=0.95, blocks=12, passes=3, seconds=1.0, when=""),
        reference="seed@cpu:onnxruntime:float32:b1",
        **elsewhere(),
    )


@pytest.fixture(scope="module")
def device_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("device") / "device.csv"
    nets = sample(FAMILY, SEED, CTX, 60, band=400_000, random_seed=0)
    archs = [net.arch for net in nets if net.arch is not None]
    names = ["seed" if arch == SEED else f"net{i}" for i, arch in enumerate(archs)]
    write_rows(path, [device_row(a, n) for a, n in zip(archs, names, strict=True)])
    return path


@pytest.fixture(scope="module")
def unverified(finished: Finished, device_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "there"
    given = settings(finished, device_table=[device_table], min_speedup=1.2, train_per_step=1)
    outcome = contract(**given, out=folder, executor=InlineExecutor())
    assert (outcome.status, outcome.exit_code) == ("unverified", 3)
    return folder


def test_with_a_device_table_nothing_is_timed_here_and_nothing_promised(unverified: Path) -> None:
    """Predictions decide which archs are looked at; the finalists are named, with the command."""
    assert not (unverified / "measurements.csv").exists()
    result = json.loads((unverified / "result.json").read_text())
    assert "benchmarks.throughput --arch" in result["message"]
    assert "--runtime onnxruntime" in result["message"]
    assert result["final"] is None
    rows = trials(unverified)
    assert {row["basis"] for row in rows} <= {"table", "predicted"}
    assert rows[0]["basis"] == "table", "the seed was measured there"
    for row in rows[1:]:
        assert float(row["ratio_lo"]) <= float(row["ratio"]) <= float(row["ratio_hi"])
    named = json.loads((unverified / "finalists.json").read_text())["finalists"]
    assert named
    kept = {row["label"] for row in rows if row["stage"] == "kept" and row["step"] == "2"}
    assert {each["label"] for each in named} <= kept
    # What was not looked at as too slow is what the board says, within the predictor's own error.
    for each in named:
        truth = seconds_there(SEED) / seconds_there(FAMILY.arch(each["arch"]))
        middle, lo, hi = each["predicted_ratio"]
        assert lo * 0.97 <= truth <= hi * 1.03
        assert middle == pytest.approx(truth, rel=0.1)


def test_the_finalists_own_rows_finish_the_run(
    unverified: Path, finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of another device or too slow ones do not; those that meet the requirement do."""
    named = json.loads((unverified / "finalists.json").read_text())["finalists"]
    rows = [device_row(FAMILY.arch(each["arch"]), each["label"]) for each in named]
    resume = ["--resume", str(unverified), "--cache-dir", str(finished.cache), "--quiet"]

    assert main(resume) == 3, "without their rows it stays as it was"
    other = [replace(row, **elsewhere("another")) for row in rows]
    write_rows(tmp_path / "other.csv", other)
    assert main([*resume, "--final-measurements", str(tmp_path / "other.csv")]) == 2
    assert "fingerprint" in capsys.readouterr().err

    write_rows(tmp_path / "own.csv", rows)
    assert main([*resume, "--final-measurements", str(tmp_path / "own.csv")]) == 0
    result = json.loads((unverified / "result.json").read_text())
    winner = result["final"]["winner"]
    assert winner["basis"] == "table"
    assert winner["ratio"] == pytest.approx(next(row.measured.ratio for row in rows if row.key == winner["key"]))
    best = json.loads((unverified / "best.json").read_text())
    assert best["throughput"]["runtime"] == "onnxruntime"


def test_a_table_of_something_else_is_refused(
    device_table: Path, finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So is a requirement that a table cannot tell."""
    rows = read_rows(device_table, "t")
    larger = fingerprint_columns(replace(fingerprint_of(rows[0]), img_size=48))
    cases = {
        "another resolution": [replace(r, img_size=48, **larger) for r in rows],
        "another number of classes": [replace(r, num_classes=11) for r in rows],
        "no seed": [r for r in rows if r.arch != "seed"],
        "too few": [r for r in rows if r.arch == "seed"],
        "two devices": [*rows[:-1], replace(rows[-1], **elsewhere("another"))],
        "a wrong key": [replace(r, key="d1") for r in rows],
        "another family": [replace(r, family="resnet") for r in rows],
        "peak_mem_mb<=100@cpu:onnxruntime:b1": rows,
    }
    path, out = tmp_path / "table.csv", tmp_path / "run"
    for name, bad in cases.items():
        write_rows(path, bad)
        required = ["--require", name] if "@" in name else []
        flags = [*finished.flags, "--device-table", str(path), "--out", str(out), "--quiet", *required]
        assert main(flags) == 2, name
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert error.startswith("error: ")
        assert not required or "peak_mem_mb" in error
        assert not out.exists()
