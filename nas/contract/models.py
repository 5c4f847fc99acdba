"""The models that a run writes: the best of every step and the winner, as plain timm models."""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nas.contract.state import Incumbent, Run
from nas.core.io import read_json, write_atomic, write_json
from nas.core.table import Writer
from nas.export.save import model_json, preprocessing_of
from nas.measure.measurement import Measurement

MODELS_COLUMNS = (
    "file",
    "kind",
    "step",
    "key",
    "params",
    "params_1000",
    "macs",
    "images_per_s",
    "images_per_s_lo",
    "images_per_s_hi",
    "ratio",
    "ratio_lo",
    "ratio_hi",
    "soft_loss",
    "soft_loss_se",
    "top1",
    "top1_se",
    "metric",
    "metric_se",
    "epochs",
)
"""Columns of `models.csv`; `kind` is `proxy` (trained so far as its step did) or `final`. `metric`
is the run's own where that is not top-1."""
PASSING = ("load", "when", "seconds")
"""Fields of a measurement that describe its moment, not the model."""


def write_model(
    run: Run, of: Incumbent, weights: Path, score: Mapping[str, Any], role: str, stem: Path
) -> dict[str, Any]:
    """Write `<stem>.safetensors` and `<stem>.json`: a plain timm model and its record.

    `role` names the measurement in the record. Returns the JSON.
    """
    measured = run.timings.measure(of.arch, role, reference=run.seed_arch)
    assert isinstance(measured, Measurement)
    target = stem.with_name(f"{stem.name}.safetensors")
    target.parent.mkdir(exist_ok=True)
    aside = target.with_name(f".{target.name}.tmp")
    shutil.copyfile(weights, aside)
    aside.replace(target)
    model = model_json(
        run.family,
        of.arch,
        run.context,
        classes=run.dataset.classes,
        sha256=hashlib.sha256(target.read_bytes()).hexdigest(),
        score=score,
        throughput={
            **{k: v for k, v in measured.to_dict().items() if k not in PASSING},
            "reference": run.key(run.seed_arch),
        },
        preprocessing=preprocessing_of(run.dataset),
    )
    write_json(stem.with_name(f"{stem.name}.json"), model)
    return model


def write_milestone(run: Run, step: int, best: Incumbent) -> None:
    """Write the best of a step as `models/<step>-<parameters>.*`, and `models.csv` anew."""
    row = next(r for r in run.study.rows if (r.step, r.key) == (best.step, best.key))
    stem = run.folder.path / "models" / f"{step:02d}-{row.params}"
    if not stem.with_name(f"{stem.name}.json").exists():
        score = {
            "kind": "proxy",
            "step": step,
            "soft_loss": row.soft_loss,
            "soft_loss_se": row.soft_loss_se,
            "top1": row.top1,
            "top1_se": row.top1_se,
            "metric": row.metric,
            "metric_se": row.metric_se,
            "epochs": row.epochs,
            "holdout_n": len(run.dataset.holdout.labels),
        }
        write_model(run, best, best.weights, score, "gate", stem)
    write_models_table(run.folder.path)


def write_best(run: Run, best: Incumbent | None, final: Mapping[str, Any] | None) -> None:
    """Write `best.json` and `best.safetensors`, with the final weights where there are any."""
    if best is None or best.key == run.key(run.seed_arch):
        return
    stem = run.folder.path / "best"
    if final is not None:
        weights = run.folder.job_folder(f"final-{best.key}") / "weights.safetensors"
        if weights.exists():  # removed when a run has finished
            write_model(run, best, weights, _score(final), "final", stem)
    elif best.weights.exists():  # a replay may have scores only
        images = len(run.dataset.holdout.labels)
        score = {"kind": "proxy", "soft_loss": best.soft_loss, "holdout_n": images}
        write_model(run, best, best.weights, score, "gate", stem)


def _score(final: Mapping[str, Any]) -> dict[str, Any]:
    winner = final["winner"]
    return {
        "kind": "final",
        "soft_loss": winner["soft_loss"],
        "soft_loss_se": winner["soft_loss_se"],
        "metric": winner["metric"],
        "metric_se": winner["metric_se"],
        "holdout_top1": winner["holdout_top1"],
        "test_top1": winner["top1"],
        "test_top1_se": winner["top1_se"],
        "test_n": winner["test_n"],
    }


def write_models_table(folder: Path) -> None:
    """Write `models.csv` from the models in `models/`, and the winner if there is one."""
    out = io.StringIO()
    writer = Writer(out)
    writer.writerow(MODELS_COLUMNS)
    for path in [*sorted((folder / "models").glob("*.json")), folder / "best.json"]:
        if path.exists():
            writer.writerow(_row(path, read_json(path, "a model of a run"), folder))
    write_atomic(folder / "models.csv", out.getvalue().encode())


def _row(path: Path, model: Mapping[str, Any], folder: Path) -> list[Any]:
    score, pace = model["score"], model["throughput"]
    values = {
        **{k: model[k] for k in ("key", "params", "params_1000", "macs")},
        **{k: v for k, v in pace.items() if k in MODELS_COLUMNS},
        **{k: v for k, v in score.items() if k in MODELS_COLUMNS},
        "file": str(path.with_suffix(".safetensors").relative_to(folder)),
    }
    return ["" if values.get(name) is None else values[name] for name in MODELS_COLUMNS]
