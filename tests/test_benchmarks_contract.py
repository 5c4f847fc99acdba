"""`python -m benchmarks.contract` refuses bad input; its interval is tested with the estimates."""

from __future__ import annotations

import pytest

from benchmarks.contract import main


@pytest.mark.parametrize("arguments", [["--data", "no-such-data"], ["--effort", "extreme"]])
def test_bad_input_is_one_line(
    arguments: list[str], tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path_factory.mktemp("results")
    folders = ["--runs", str(base / "runs"), "--out", str(base / "out")]
    assert main([*arguments, *folders, "--cache-dir", str(base / "cache")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
