"""What the benchmark of our timings is made of: its load, its spreads by level, its rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.timing.__main__ import gate_row, main, other_methods, ratio_of
from benchmarks.timing.load import busy_core
from benchmarks.timing.simulate import spread_by_level
from tests.run_cases import table


def test_the_load_takes_time_of_a_core() -> None:
    with busy_core(0) as process:
        stat = Path(f"/proc/{process.pid}/stat")
        if stat.exists():
            before = int(stat.read_text().split()[13])
            while int(stat.read_text().split()[13]) == before:
                assert process.poll() is None
    assert process.poll() is not None, "it ends with the block"


@pytest.mark.parametrize("level", ["copy_sd", "process_sd", "minute_sd", "block_sd"])
def test_each_level_of_the_spread_is_told_apart(level: str) -> None:
    """Noise of one level is found there, and hardly elsewhere."""
    rng, sd = np.random.default_rng(0), 0.1

    def noise(of: str) -> float:
        return sd * float(rng.standard_normal()) if of == level else 0.0

    recorded = []
    for _ in range(12):
        minute, processes = noise("minute_sd"), []
        for _ in range(12):
            process, copies = noise("process_sd"), []
            for _ in range(2):
                copy = noise("copy_sd")
                copies.append(np.array([minute + process + copy + noise("block_sd") for _ in range(6)]))
            processes.append(copies)
        recorded.append(processes)
    found = spread_by_level(recorded)
    assert found[level] == pytest.approx(sd, rel=0.4)
    for other in found.keys() - {level}:
        # Medians of six blocks vary too: their spread is in that of the copies.
        assert found[other] <= (0.06 if level == "block_sd" else 0.05), other


def test_methods_agree_on_what_does_not_vary() -> None:
    visit = {"copies": [[[1.0, 2.0]] * 6], "timm": 2.0, "torch": [2.0, 2.0, 2.0]}
    assert ratio_of(visit["copies"][0]) == 2.0  # type: ignore[index]
    assert [middle for middle, _, _ in other_methods([visit] * 4).values()] == pytest.approx([2.0] * 5)


@pytest.mark.parametrize(
    ("bound", "outcome", "errors"), [(1.05, "pass", 1.0), (0.95, "pass", 0.0), (0.95, "fail", 1.0)]
)
def test_errors_of_the_gate_are_what_the_true_ratio_forbids(bound: float, outcome: str, errors: float) -> None:
    row = gate_row("none", bound, [(outcome, 4, 1.0)] * 10)
    assert (row["errors"], row["trials"], row["undecided"]) == (errors, 10, 0)


def test_simulated_coverage_is_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "coverage.csv"
    assert main(["coverage", "--trials", "20", "--out", str(out)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == len(table(out)) == 42


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "gate --live 1 --live-loaded 1 --visits 4 --max-visits 4 --img-size 32 --batch 1",
        "repeat --measurements 2 --minutes 0 --visits 4 --max-visits 4 --img-size 32 --batch 1",
        "variance --rounds 2 --processes 2 --blocks 2 --img-size 32 --batch 1 --way-threads 1",
    ],
)
def test_each_part_runs_for_real(command: str, tmp_path: Path) -> None:
    out = tmp_path / "table.csv"
    assert main([*command.split(), "--threads", "1", "--out", str(out)]) == 0
    assert len(table(out)) >= 4
