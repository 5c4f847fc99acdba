"""Every benchmark has a help, and answers bad input in one line before it writes or trains anything."""

from __future__ import annotations

from argparse import Namespace
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import contract

TABLE = str(Path("results/search_efficiency_table.csv").resolve())
OUT = ["--out", "t.csv"]
FLAGS = {
    "baselines.__main__": [*OUT, "--work", "w"],
    "contract": ["--runs", "runs", "--out", "out", "--cache-dir", "cache"],
    "faults.__main__": [*OUT, "--folder", "w"],
    "gpu": ["--out", "w"],
    "inheritance": [*OUT, "--work", "w"],
    "labels.__main__": [],
    "pareto": [],
    "proxy": [*OUT, "--work", "w"],
    "strategies.__main__": OUT,
    "throughput.__main__": [],
    "timing.__main__": [],
}
CASES = [
    ("baselines.__main__", "--targets 5M 5M", "--targets"),
    ("baselines.__main__", "--targets many", "--targets"),
    ("baselines.__main__", "--budget-hours 0", "--budget-hours"),
    ("baselines.__main__", "--seeds 0", "--seeds"),
    ("baselines.__main__", "--effort extreme", "--effort"),
    ("contract", "--data no-such-data", "no-such-data"),
    ("contract", "--effort extreme", "--effort"),
    ("faults.__main__", "--only rain", "--only: got rain"),
    ("faults.__main__", "--tries 0", "--tries: got 0"),
    ("faults.__main__", "--jobs 0", "--jobs: got 0"),
    ("gpu", "--minutes 0", "--minutes: got 0"),
    ("gpu", "--device cpu", "--device cpu --tiny rehearses"),
    ("gpu", "--device cpu --tiny --only all", "--only: got all"),
    ("inheritance", "--archs 1", "--archs: got 1"),
    ("labels.__main__", "storage --records 0", "--records"),
    ("labels.__main__", "storage --repeats 5", "--repeats"),
    ("labels.__main__", "storage --batch -1", "--batch"),
    ("labels.__main__", "epoch --blocks 2", "--blocks"),
    ("labels.__main__", "epoch --threads 0", "--threads"),
    ("proxy", "--seeds 1", "--seeds: got 1"),
    ("proxy", "--archs 3", "--archs: got 3"),
    ("strategies.__main__", f"--table {TABLE} --target-params 2.5M", "--table: got"),
    ("strategies.__main__", "--table none.csv", "--table: got"),
    ("strategies.__main__", f"--table {TABLE} --free depth", "--free: got"),
    ("strategies.__main__", "--replays 1", "--replays: got"),
    ("timing.__main__", "gate --visits 3", "--visits: got 3"),
    ("timing.__main__", "predictor none.csv", "TABLE"),
]


@pytest.mark.parametrize(("module", "words", "said"), CASES)
def test_bad_input_is_one_line(
    module: str,
    words: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert import_module(f"benchmarks.{module}").main([*words.split(), *FLAGS[module]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1
    assert not {"t.csv", "w"} & {path.name for path in tmp_path.iterdir()}


def test_a_data_set_that_is_a_path_is_run_below_the_folder_of_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Path] = {}
    monkeypatch.setattr(contract, "contract", lambda *_, **settings: asked.update(settings))
    given = Namespace(runs=tmp_path, effort="smoke", cache_dir=None, max_images=None, min_speedup=1.5)
    for data in ("/data/my pictures", "torch/CIFAR10"):
        contract.run_or_resume(data, 3, given)
        assert asked["out"].parent == tmp_path


@pytest.mark.parametrize("module", FLAGS)
def test_every_benchmark_has_a_help(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        import_module(f"benchmarks.{module}").main(["--help"])
    assert ended.value.code == 0
    assert f"python -m benchmarks.{module.split('.')[0]}" in capsys.readouterr().out
