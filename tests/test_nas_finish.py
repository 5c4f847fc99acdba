"""The final comparison is paired; the console shows a bar on a terminal and lines elsewhere."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from nas.finish import paired_difference
from nas.progress import Console
from nas.stage import weak_teacher


@pytest.mark.parametrize("seed", range(5))
def test_the_paired_difference_is_that_of_the_accuracies_with_its_interval(
    seed: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 2, (2, 300)).astype(np.uint8)
    save_file({"correct": a}, tmp_path / "a.safetensors")
    save_file({"correct": b}, tmp_path / "b.safetensors")
    found = paired_difference(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert found["difference"] == pytest.approx(a.mean() - b.mean())
    # McNemar's counts give the same variance: (n01 + n10) / n - d^2.
    n01, n10, n = int(((a == 0) & (b == 1)).sum()), int(((a == 1) & (b == 0)).sum()), 300
    d = (n10 - n01) / n
    se = math.sqrt(((n01 + n10) / n - d * d) / (n - 1))
    assert found["hi"] - found["lo"] == pytest.approx(2 * 1.959963984540054 * se)
    same = paired_difference(tmp_path / "a.safetensors", tmp_path / "a.safetensors")
    assert (same["difference"], same["lo"], same["hi"]) == (0.0, 0.0, 0.0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drive(stream: io.StringIO, quiet: bool = False) -> str:
    console = Console(stream=stream, quiet=quiet)
    console.line("first")
    console.count("reading")
    console.advance(3)
    console.stop()
    console.start(10.0)
    console.describe("a job")
    for _ in range(20):  # more than was expected: the bar stops at its end
        console.advance(1.0)
        console.refresh()
    console.extend(5.0)
    console.line("last")
    console.stop()
    return stream.getvalue()


def test_a_bar_on_a_terminal_lines_in_a_pipe_and_nothing_when_quiet() -> None:
    assert drive(io.StringIO()) == "first\nlast\n"
    assert drive(Terminal(), quiet=True) == ""
    shown = drive(Terminal())
    assert "first" in shown
    assert "last" in shown
    assert "left" in shown
    assert "100%" in shown


@pytest.mark.parametrize(
    ("teacher", "error", "seed", "weak"),
    [
        (0.99, 0.01, 0.975, False),  # both at 97 % or more
        (0.97, 0.01, 0.99, False),
        (0.90, 0.01, 0.88, False),  # above by two standard errors
        (0.90, 0.01, 0.895, True),
        (0.96, 0.01, 0.99, True),
        (0.50, 0.02, 0.60, True),
    ],
)
def test_a_teacher_no_better_than_its_student_is_told(
    teacher: float, error: float, seed: float, weak: bool
) -> None:
    said = weak_teacher({"holdout_top1": teacher, "holdout_top1_se": error}, {"top1": seed})
    assert bool(said) == weak
    assert all("does not stand above the seed" in line for line in said)
