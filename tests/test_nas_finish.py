"""The final comparison is paired; the console shows a bar on a terminal and lines elsewhere."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from safetensors.numpy import save_file

from nas.contract.final import nearest_published
from nas.contract.plan import few_images
from nas.contract.run_folder import RunFolder
from nas.contract.seed import weak_teacher_notes
from nas.core.per_image import paired_difference
from nas.core.progress import Console
from nas.report.read import read_run
from nas.report.text import report
from space import Context, get_family


@pytest.mark.parametrize("seed", range(5))
def test_the_paired_difference_is_that_of_the_accuracies_with_its_interval(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 5, 300)
    hit = rng.integers(0, 2, (2, 300)).astype(bool)
    predictions = np.where(hit, truth, (truth + 1) % 5)
    for name, predicted in zip("ab", predictions, strict=True):
        (tmp_path / name).mkdir()
        arrays = {"predicted": predicted, "truth": truth, "soft_loss": np.zeros(300, dtype=np.float32)}
        save_file(arrays, tmp_path / name / "test.safetensors")
    found = paired_difference(tmp_path / "a", tmp_path / "b", "top1", 5)
    a, b = hit
    assert found["difference"] == pytest.approx(a.mean() - b.mean())
    # Far from 0 and 1 the score interval is nearly the normal one of McNemar's counts: (n01 + n10) / n - d^2.
    n01, n10, n = int((~a & b).sum()), int((a & ~b).sum()), 300
    d = (n10 - n01) / n
    se = math.sqrt(((n01 + n10) / n - d * d) / (n - 1))
    assert found["hi"] - found["lo"] == pytest.approx(2 * 1.959963984540054 * se, rel=0.02)
    same = paired_difference(tmp_path / "a", tmp_path / "a", "top1", 5)
    assert (same["difference"], same["hi"]) == pytest.approx((0.0, 1.96**2 / (300 + 1.96**2)), rel=0.01)
    # With classes of equal size the balanced accuracy differs as the accuracy does, nearly.
    other = paired_difference(tmp_path / "a", tmp_path / "b", "balanced_accuracy", 5)
    assert other["lo"] < other["difference"] < other["hi"]
    assert other["hi"] - other["lo"] == pytest.approx(found["hi"] - found["lo"], rel=0.2)


@pytest.mark.parametrize(
    ("family", "seed", "img_size", "params", "beside"),
    [
        ("tinyvit", "21M", 224, 5_000_000, "5M"),
        ("tinyvit", "21M", 224, 12_000_000, "11M"),
        ("tinyvit", "11M", 224, 9_500_000, "5M"),  # not itself
        ("tinyvit", "5M", 224, 2_500_000, "5M"),  # nothing is smaller
        ("vit", "deit_small", 48, 5_600_000, "deit_tiny"),  # has no token to start from
        ("vit", "deit_small_distilled", 48, 5_800_000, "deit_tiny_distilled"),
        ("vit", "vit_base_patch8", 48, 20_000_000, "vit_small_patch8"),  # 32 does not fill 48
        ("vit", "deit_tiny", 36, 3_000_000, "deit_tiny"),  # nothing fits: the seed itself
    ],
)
def test_a_winner_is_compared_with_a_published_contraction_of_its_seed(
    family: str, seed: str, img_size: int, params: int, beside: str
) -> None:
    of, ctx = get_family(family), Context(img_size, 10)
    config = SimpleNamespace(family=family, seed=seed)
    run = SimpleNamespace(config=config, context=ctx, seed_arch=of.seed(seed))
    assert nearest_published(cast(Any, run), params) == (beside, of.seed(beside))


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


def test_notes_are_kept_once_in_run_json_and_told_by_the_report(finished: Any, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    folder = RunFolder(run)
    before = json.loads(folder.run_json.read_text())
    folder.add_notes(["seed: warning: left is right", "labels: 3 images skipped"])
    folder.add_notes(["labels: 3 images skipped"])
    after = json.loads(folder.run_json.read_text())
    assert after == {**before, "notes": [*before["notes"], "seed: warning: left is right", "labels: 3 images skipped"]}
    told = report(read_run(run))
    assert all(told.count(note) == 1 for note in ("warning: left is right", "abels: 3 images skipped"))
    RunFolder(tmp_path).add_notes(["of a plan"])
    assert not (tmp_path / "run.json").exists()


def test_few_training_images_are_told_in_one_line() -> None:
    def of(*sizes: int) -> str | None:
        labels = np.repeat(np.arange(len(sizes)), sizes)
        many = type("Images", (), {"labels": labels, "__len__": lambda self: len(labels)})()
        classes = tuple("abcdef"[: len(sizes)])
        return few_images(
            cast(Any, SimpleNamespace(train=many, labelled=True, num_classes=len(sizes), classes=classes))
        )

    assert of(100, 100) is None
    assert "199 training images are few" in str(of(100, 99))
    assert "400 training images, 9 of class 'b' are few" in str(of(391, 9))
    assert "2 training images, 1 of class 'a'" in str(of(1, 1))


def test_a_bar_on_a_terminal_lines_in_a_pipe_and_nothing_when_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    assert drive(io.StringIO()) == "first\nlast\n"
    assert drive(Terminal(), quiet=True) == ""
    assert capsys.readouterr() == ("", "")
    for text, told in (("warning: \u2192", True), ("seed: warning: x", True), ("a warning: x", False)):
        Console(stream=io.StringIO(), quiet=True).line(text)
        assert bool(capsys.readouterr().err) == told
        Console(stream=io.StringIO(), quiet=True, warns=False).line(text)
        assert not capsys.readouterr().err
    shown = drive(Terminal())
    assert all(word in shown for word in ("first", "last", "left", "100%"))


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
def test_a_teacher_no_better_than_its_student_is_told(teacher: float, error: float, seed: float, weak: bool) -> None:
    lines = weak_teacher_notes({"holdout_top1": teacher, "holdout_top1_se": error}, {"top1": seed})
    assert bool(lines) == weak
    assert all("does not stand above the seed" in line for line in lines)
