"""The models that a run writes: the best of every step and the winner, as plain timm models."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nas.contract.state import Incumbent, Run
from nas.core.io import read_json, write_atomic
from nas.core.table import Writer
from nas.export.save import write_model
from nas.measure.measurement import Measurement

COUNTS = ("key", "params", "params_1000", "macs")
PACE = ("ratio", "ratio_lo", "ratio_hi")  # images/s of different moments do not compare
LOSS = ("soft_loss", "soft_loss_se")
SCORE = (*LOSS, "top1", "top1_se", "metric", "metric_se", "epochs")
MODELS_COLUMNS = ("file", "kind", "step", *COUNTS, *PACE, *SCORE)
"""Columns of `models.csv`; `kind` is `proxy` (trained so far as its step did) or `final`. `metric` is the run's own
where that is not top-1."""
PASSING = ("load", "when", "seconds")
"""Fields of a measurement that describe its moment, not the model."""


def _write(run: Run, of: Incumbent, weights: Path, score: Mapping[str, Any], role: str, stem: Path) -> None:
    """Write an incumbent's model with its measurement of a role; weights that are gone write nothing."""
    if not weights.exists():  # removed when a run has finished; a replay may have scores only
        return
    measured = run.timings.measure(of.arch, role, reference=run.seed_arch)
    assert isinstance(measured, Measurement)
    throughput = {k: v for k, v in measured.to_dict().items() if k not in PASSING}
    write_model(
        stem,
        weights.read_bytes(),
        family=run.family,
        arch=of.arch,
        ctx=run.context,
        dataset=run.dataset,
        score=score,
        throughput={**throughput, "reference": run.key(run.seed_arch)},
    )


def write_milestone(run: Run, step: int, best: Incumbent) -> None:
    """Write the best of a step as `models/<step>-<parameters>.*`, and `models.csv` anew."""
    row = next(r for r in run.study.rows if (r.step, r.key) == (best.step, best.key))
    stem = run.folder.path / "models" / f"{step:02d}-{row.params}"
    if not stem.with_name(f"{stem.name}.json").exists():
        score = {name: getattr(row, name) for name in SCORE}
        score = {"kind": "proxy", "step": step, **score, "holdout_n": len(run.dataset.holdout.labels)}
        _write(run, best, best.weights, score, "gate", stem)
    write_models_table(run.folder.path)


def write_best(run: Run, best: Incumbent | None, final: Mapping[str, Any] | None) -> None:
    """Write `best.json` and `best.safetensors`, with the final weights where there are any."""
    if best is None or best.key == run.key(run.seed_arch):
        return
    stem = run.folder.path / "best"
    if final is None:
        score = {"kind": "proxy", "soft_loss": best.soft_loss, "holdout_n": len(run.dataset.holdout.labels)}
        _write(run, best, best.weights, score, "gate", stem)
        return
    winner = final["winner"]
    score = {name: winner[name] for name in (*LOSS, "metric", "metric_se", "holdout_top1", "test_n")}
    score |= {"kind": "final", "test_top1": winner["top1"], "test_top1_se": winner["top1_se"]}
    _write(run, best, run.folder.job_folder(f"final-{best.key}") / "weights.safetensors", score, "final", stem)


def write_models_table(folder: Path) -> None:
    """Write `models.csv` from the models in `models/`, and the winner if there is one."""
    out = io.StringIO()
    writer = Writer(out, MODELS_COLUMNS)
    writer.writeheader()
    for path in [*sorted((folder / "models").glob("*.json")), folder / "best.json"]:
        if path.exists():
            model = read_json(path, "a model of a run")
            file = str(path.with_suffix(".safetensors").relative_to(folder))
            writer.writerow({**model, **model["throughput"], **model["score"], "file": file})
    write_atomic(folder / "models.csv", out.getvalue().encode())
