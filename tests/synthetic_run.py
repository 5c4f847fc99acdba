"""A made-up run folder for the tests of reports and figures: shapes as the driver writes them."""

from __future__ import annotations

import csv
import functools
import math
import random
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nas.core.io import write_json
from nas.search.study import StepRow, Study, Trial
from space import get_family

SEED_KEY = "d96-192-384-576_seed"


def _trial(step: int, key: str, params: int, rng: random.Random, parent: str, **more: Any) -> Trial:
    ratio = 1.0 if step == 0 else (21_000_000 / params) ** 0.7 * rng.uniform(0.9, 1.1)
    loss = 0.35 + 0.9 * math.exp(-params / 6e6) + rng.uniform(-0.05, 0.05)
    values: dict[str, Any] = {
        **{"step": step, "key": key, "label": key.replace("_", " "), "parent": parent},
        "moves": "" if step == 0 else "embed_dims[2] 384->256, depths[3] 2->1",
        **{"grid_steps": 3 * step, "baseline": ""},
        **{"params": params, "params_1000": params + 500_000, "macs": params * 11},
        **{"images_per_s": 180 * ratio, "images_per_s_lo": 150 * ratio, "images_per_s_hi": 190 * ratio},
        **{"soft_loss": loss, "soft_loss_se": 0.03, "top1": 1.2 - loss, "top1_se": 0.015},
        **{"seconds": rng.uniform(3, 9), "stage": "proxy", "state": "complete"},
    }
    if step:
        values |= {"ratio": ratio, "ratio_lo": ratio * 0.95, "ratio_hi": ratio * 1.04, "reference": SEED_KEY}
    return Trial(**{**values, **more})


def decided(steps: int) -> tuple[list[Trial], list[StepRow]]:
    """Return the trials and step rows of a run; the last trial is its winner."""
    rng = random.Random(7)
    rows = [_trial(0, SEED_KEY, 20_700_000, rng, "", stage="kept")]
    path = [SEED_KEY]
    finished = []
    unmeasured = dict.fromkeys(("soft_loss", "soft_loss_se", "top1", "top1_se"))
    for step in range(1, steps + 1):
        high = int(20_700_000 * (5.1 / 20.7) ** (step / 4))
        parent = path[-1]
        slow = {"stage": "throughput", "state": "pruned"}
        for i in range(3):
            reason = f"not surely as fast as 1.{step}00x the seed (required): 1.{i}13 [1.0, 1.9]"
            more = {**slow, **unmeasured, "reason": reason}
            rows.append(_trial(step, f"d{step}-{i}_slow", high - 9_000 * i, rng, parent, **more))
        oom = {"stage": "proxy", "state": "failed", "reason": "out of memory", **unmeasured}
        rows.append(_trial(step, f"d{step}_oom", high - 12_345, rng, parent, **oom))
        baselines = {0: "uniform", 1: "published:11M" if step == 2 else ""}
        for i in range(4):
            kept = {"stage": "kept"} if i == 3 else {"reason": "a kept one scored better"}
            params = int(high * (0.93 + 0.02 * i))
            more = {"baseline": baselines.get(i, ""), **kept}
            rows.append(_trial(step, f"d{step}-{i}_n2-{i}", params, rng, parent, **more))
        best = rows[-1]
        path.append(best.key)
        counts = {"candidates": 8, "too_slow": 3, "not_selected": 0, "failed": 1, "scored": 4, "kept": 1}
        chosen = {name: getattr(best, name) for name in ("params", "ratio", "soft_loss", "top1")}
        bounds: dict[str, Any] = {"band_lo": int(high * 0.8), "band_hi": high, "required": "1.2000x"}
        more = {"contractions": 1_234_567, "incumbent": best.key, "seconds": 61.5}
        finished.append(StepRow(step, **bounds, **counts, **chosen, **more))
    return rows, finished


@functools.cache
def _study(steps: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        study = Study(Path(folder) / "study.db", create=True)
        rows, finished = decided(steps)
        for row in rows:
            study.add(row, {"depths": [2, 2, 6, 2]}, {})
        for step in finished:
            study.add_step(step)
        study.close()
        return (Path(folder) / "study.db").read_bytes()


CONFIG = {
    **{"seed": "21M", "target_params": 5_000_000, "params_tolerance": 0.1, "min_speedup": 1.5, "min_throughput": None},
    **{"data": "digits", "effort": "normal", "steps": 4, "bench_batch": 32, "bench_dtype": "float32"},
    **{"device": "cpu", "threads": 2, "random_seed": 0},
    **{"proxy_init": "inherit", "final_epochs": 10, "proxy_epochs": 2},
}
RUN = {
    "schema": 1,
    "config": CONFIG,
    "git": "0123abc",
    "versions": {"torch": "2.15.0", "timm": "1.0.31"},
    "fingerprint": {"id": "6b98cd1216ad", "device_name": "AMD EPYC family 25/1/1"},
    "dataset": {"name": "digits", "img_size": 48, "fingerprint": "ff00", "holdout": 287},
    "teacher": {"id": "resnet10t", "holdout_top1": 0.97},
    "store": "abcd",
}


def make_run(folder: Path, *, steps: int = 4, status: str | None = "reached") -> Path:
    """Write a run of `steps` steps; `status` None leaves it unfinished (no result, no best)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.db").write_bytes(_study(steps))
    rows, finished = decided(steps)
    write_json(folder / "run.json", RUN)
    if status is None:
        return folder
    winner = asdict(rows[-1])
    result: dict[str, Any] = {
        "status": status,
        "exit_code": 0 if status == "reached" else 3,
        "message": {"reached": "the target is reached"}.get(status, f"{status}: time"),
        "winner": winner["key"],
        "finalists": [{"key": winner["key"], "soft_loss": 0.41234, "soft_loss_again": 0.43219}],
        "path": [SEED_KEY, *(step.incumbent for step in finished)],
    }
    if status == "reached":
        side = {name: winner[name] for name in ("key", "params", "macs", "soft_loss")}
        side |= {k: winner[k] for k in winner if k.startswith(("images_per_s", "ratio"))}
        side |= {"top1": 0.931, "top1_se": 0.0134, "test_n": 359}
        result["final"] = {
            **{"init": "inherit", "epochs": 10, "winner": {**side, "name": "winner"}},
            "published": {**side, "name": "5M", "params": 5_082_000, "top1": 0.911, "top1_se": 0.015},
            "paired": {"difference": 0.02, "lo": -0.004, "hi": 0.044, "n": 359.0},
        }
        family = get_family("tinyvit")
        best: dict[str, Any] = {"family": "tinyvit", "arch": family.to_dict(family.seed("5M"))}
        best |= {"params": winner["params"], "macs": winner["macs"], "img_size": 48, "num_classes": 10}
        best |= {"throughput": {"images_per_s": winner["images_per_s"]}, "score": {"top1": 0.931}}
        best |= {"classes": [str(i) for i in range(10)]}
        best |= {"timm": {"model": "tiny_vit_5m_224", "kwargs": {"num_classes": 10}}}
        write_json(folder / "best.json", best)
    write_json(folder / "result.json", result)
    return folder


def as_saved_by_a_spreadsheet(path: Path) -> None:
    """Rewrite a table with other line ends, quotes, order of columns and a byte order mark."""
    with path.open(newline="") as file:
        columns, *rows = csv.reader(file)
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, lineterminator="\r\n", quoting=csv.QUOTE_ALL)
        writer.writerows([line[::-1] for line in (columns, *rows)])
