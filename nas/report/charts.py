"""The Pareto chart of runs: its points, axes and notes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nas.report.figure import Chart, Kind, Point, Series
from nas.report.read import RunFiles, number, section
from nas.report.tables import short_count, significant
from nas.search.study import Trial

SCORE_LABEL = "proxy soft loss, nats (axis turned: up is better)"


def run_chart(runs: Sequence[RunFiles]) -> Chart:
    """Chart the scored candidates of one or several runs together.

    Throughput is drawn relative to the seed, which is timed in alternation; as images/s only where a scored candidate
    has no such ratio.
    """
    relative = all(
        row.ratio is not None for run in runs for row in run.trials if row.step and row.soft_loss is not None
    )
    series = tuple(run_series(run, relative) for run in runs)
    seeds = {run.seed_name for run in runs}
    seed = f"the seed {seeds.pop()}" if len(seeds) == 1 else "each run's own seed"
    return Chart(
        series=series,
        title=_title(runs),
        speed_label=f"throughput relative to {seed}" if relative else "throughput, images/s",
        score_label=SCORE_LABEL,
        lower_is_better=True,
        notes=_notes(runs, relative),
    )


def run_series(run: RunFiles, relative: bool) -> Series:
    """Collect the scored candidates of one run, each arch once, where it was kept if it was."""
    keys = dict.fromkeys(row.key for row in run.trials if row.soft_loss is not None)
    found = (run.candidate(key) for key in keys)
    points = tuple(_point(run, row, relative) for row in found if row is not None)
    return Series(run.folder.name, points, tuple(row.key for row in run.path))


def conditions_line(run: RunFiles) -> str:
    """Return the conditions of the throughput measurements in one line."""
    config = run.config
    device = section(run.run, "fingerprint").get("device_name") or config.get("device") or "?"
    threads, batch, size = config.get("threads"), config.get("bench_batch"), run.img_size
    parts = [
        str(device),
        counted(threads, "thread") if threads else None,
        f"batch {batch}" if batch else None,
        config.get("bench_dtype"),
        f"{size} px" if size else None,
        config.get("bench_runtime") or "eager",
    ]
    return ", ".join(str(part) for part in parts if part)


def counted(number_of: Any, what: str) -> str:
    """Write `1 thread`, `2 threads`."""
    return f"{number_of} {what}" + ("" if number_of == 1 else "s")


def _point(run: RunFiles, row: Trial, relative: bool) -> Point:
    assert row.soft_loss is not None
    error, name = row.soft_loss_se, "ratio" if relative else "images_per_s"
    speed, lo, hi = (getattr(row, name + end) for end in ("", "_lo", "_hi"))
    return Point(
        key=row.key,
        label=_label(run, row),
        params=row.params,
        score=row.soft_loss,
        score_lo=None if error is None else row.soft_loss - error,
        score_hi=None if error is None else row.soft_loss + error,
        speed=1.0 if relative and row.step == 0 and speed is None else speed,
        speed_lo=lo,
        speed_hi=hi,
        kind=_kind(run, row),
    )


def _kind(run: RunFiles, row: Trial) -> Kind:
    if row.step == 0:
        return "seed"
    if run.result.get("status") == "reached" and row.key == run.result.get("winner"):
        return "winner"
    if row.baseline.startswith("published"):
        return "published"
    return "uniform" if row.baseline == "uniform" else "candidate"


def _label(run: RunFiles, row: Trial) -> str:
    kind = _kind(run, row)
    if kind == "seed":
        return f"seed {run.seed_name}"
    if kind == "published":
        return "published " + row.baseline.partition(":")[2]
    return kind if kind == "winner" else row.name


def _title(runs: Sequence[RunFiles]) -> str:
    if len(runs) > 1:
        return f"Contraction: {len(runs)} runs"
    config = runs[0].config
    target = number(config, "target_params")
    aim = "" if target is None else f" to {short_count(target)} parameters"
    return f"Contraction of {runs[0].seed_name}{aim}, on {config.get('data', '?')}"


def _notes(runs: Sequence[RunFiles], relative: bool) -> tuple[str, ...]:
    images = {run.holdout_images for run in runs}
    count = images.pop() if len(images) == 1 else None
    holdout = "the holdout" if count is None else f"{count} holdout images"
    score = (
        f"Score: soft loss against the teacher on {holdout} after a short distillation (the seed: its full one); bars "
        "\u00b11 s.e."
    )
    what = "ratio of alternating blocks over several processes" if relative else "mean over several processes"
    speed = f"Throughput: {what} with its 95 % interval. "
    if len(runs) == 1:
        speed += conditions_line(runs[0]) + "."
        seed = runs[0].seed
        if relative and seed is not None and seed.images_per_s is not None:
            speed += f" Seed: {significant(seed.images_per_s)} images/s."
    elif len({_text(run, "fingerprint", "id") for run in runs}) > 1:
        speed += "Runs of different devices or software: compare ratios with care."
    # The random seed cuts the holdout, so the same data may still be other images.
    cuts = {(_text(run, "dataset", "fingerprint"), run.config.get("random_seed")) for run in runs}
    other = "Runs of different images or cuts: losses compare within a colour only."
    return (score, speed, other) if len(cuts) > 1 else (score, speed)


def _text(run: RunFiles, part: str, name: str) -> str:
    return str(section(run.run, part).get(name))
