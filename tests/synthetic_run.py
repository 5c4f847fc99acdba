"""A made-up run folder for the tests of reports and figures: shapes as the driver writes them."""

from __future__ import annotations

import csv
import json
import math
import random
from dataclasses import fields
from pathlib import Path
from typing import Any

from nas.report.read import Candidate, Step

SEED_KEY = "d96-192-384-576_seed"


def ledger_columns() -> list[str]:
    return ["trial", *(field.name for field in fields(Candidate))]


def _row(
    step: int, key: str, params: int, rng: random.Random, parent: str, **more: Any
) -> dict[str, Any]:
    ratio = 1.0 if step == 0 else (21_000_000 / params) ** 0.7 * rng.uniform(0.9, 1.1)
    loss = 0.35 + 0.9 * math.exp(-params / 6e6) + rng.uniform(-0.05, 0.05)
    return {
        "step": step,
        "key": key,
        "label": key.replace("_", " "),
        "parent": parent,
        "moves": "" if step == 0 else "embed_dims[2] 384->256, depths[3] 2->1",
        "notches": 3 * step,
        "anchor": "",
        "params": params,
        "params_1000": params + 500_000,
        "macs": params * 11,
        "images_per_s": 180 * ratio,
        "images_per_s_lo": 150 * ratio,
        "images_per_s_hi": 190 * ratio,
        "ratio": None if step == 0 else ratio,
        "ratio_lo": None if step == 0 else ratio * 0.95,
        "ratio_hi": None if step == 0 else ratio * 1.04,
        "reference": "" if step == 0 else SEED_KEY,
        "soft_loss": loss,
        "soft_loss_se": 0.03,
        "top1": 1.2 - loss,
        "top1_se": 0.015,
        "seconds": rng.uniform(3, 9),
        "stage": "proxy",
        "state": "complete",
        "reason": "",
        **more,
    }


def make_run(folder: Path, *, steps: int = 4, status: str | None = "reached") -> Path:
    """Write a run of `steps` steps; `status` None leaves it unfinished (no result, no best)."""
    rng = random.Random(7)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [_row(0, SEED_KEY, 20_700_000, rng, "", stage="kept")]
    path = [SEED_KEY]
    steps_rows = []
    unmeasured = dict.fromkeys(("soft_loss", "soft_loss_se", "top1", "top1_se"))
    for step in range(1, steps + 1):
        high = int(20_700_000 * (5.1 / 20.7) ** (step / 4))
        parent = path[-1]
        slow = {"stage": "throughput", "state": "pruned"}
        for i in range(3):
            reason = f"not surely as fast as 1.{step}00x the seed (required): 1.{i}13 [1.0, 1.9]"
            more = {**slow, **unmeasured, "reason": reason}
            rows.append(_row(step, f"d{step}-{i}_slow", high - 9_000 * i, rng, parent, **more))
        oom = {"stage": "proxy", "state": "failed", "reason": "out of memory", **unmeasured}
        rows.append(_row(step, f"d{step}_oom", high - 12_345, rng, parent, **oom))
        anchors = {0: "uniform", 1: "published:11M" if step == 2 else ""}
        for i in range(4):
            kept = {"stage": "kept"} if i == 3 else {"reason": "a kept one scored better"}
            params = int(high * (0.93 + 0.02 * i))
            more = {"anchor": anchors.get(i, ""), **kept}
            rows.append(_row(step, f"d{step}-{i}_n2-{i}", params, rng, parent, **more))
        path.append(f"d{step}-3_n2-3")
        steps_rows.append(
            {
                "step": step,
                "band_lo": int(high * 0.8),
                "band_hi": high,
                "required": "1.2000x",
                "contractions": 1_234_567,
                "shortlisted": 8,
                "too_slow": 3,
                "not_selected": 0,
                "failed": 1,
                "scored": 4,
                "kept": 1,
                "incumbent": path[-1],
                "params": rows[-1]["params"],
                "ratio": rows[-1]["ratio"],
                "soft_loss": rows[-1]["soft_loss"],
                "top1": rows[-1]["top1"],
                "seconds": 61.5,
            }
        )
    _write_csv(
        folder / "ledger.csv",
        ledger_columns(),
        [{"trial": number, **row} for number, row in enumerate(rows)],
    )
    _write_csv(folder / "steps.csv", [field.name for field in fields(Step)], steps_rows)
    config = {
        "seed": "21M",
        "target_params": 5_000_000,
        "params_tolerance": 0.1,
        "min_speedup": 1.5,
        "min_throughput": None,
        "data": "digits",
        "effort": "normal",
        "steps": 4,
        "bench_batch": 32,
        "bench_dtype": "float32",
        "device": "cpu",
        "threads": 2,
        "random_seed": 0,
        "proxy_init": "inherit",
        "final_epochs": 10,
        "proxy_epochs": 2,
    }
    _write_json(
        folder / "run.json",
        {
            "schema": 1,
            "config": config,
            "git": "0123abc",
            "versions": {"torch": "2.15.0", "timm": "1.0.31"},
            "fingerprint": {"id": "6b98cd1216ad", "device_name": "AMD EPYC family 25/1/1"},
            "dataset": {"name": "digits", "img_size": 48, "fingerprint": "ff00", "holdout": 287},
            "teacher": {"id": "resnet10t", "holdout_top1": 0.97},
            "store": "abcd",
        },
    )
    if status is None:
        return folder
    winner = rows[-1]
    result: dict[str, Any] = {
        "status": status,
        "exit_code": 0 if status == "reached" else 3,
        "message": {"reached": "the target is reached"}.get(status, f"{status}: time"),
        "winner": winner["key"],
        "finalists": [{"key": winner["key"], "soft_loss": 0.41234, "soft_loss_again": 0.43219}],
        "path": path,
    }
    if status == "reached":
        side = {name: winner[name] for name in ("key", "params", "macs", "soft_loss")}
        side |= {k: winner[k] for k in winner if k.startswith(("images_per_s", "ratio"))}
        side |= {"top1": 0.931, "top1_se": 0.0134, "test_n": 359}
        published = {**side, "name": "5M", "params": 5_082_000, "top1": 0.911, "top1_se": 0.015}
        result["final"] = {
            "init": "inherit",
            "epochs": 10,
            "winner": {**side, "name": "winner"},
            "published": published,
            "paired": {"difference": 0.02, "lo": -0.004, "hi": 0.044, "n": 359.0},
        }
        _write_json(
            folder / "best.json",
            {
                "family": "tinyvit",
                "arch": {"embed_dims": [64, 128, 160, 320]},
                "params": winner["params"],
                "macs": winner["macs"],
                "img_size": 48,
                "num_classes": 10,
                "throughput": {"images_per_s": winner["images_per_s"]},
                "score": {"top1": 0.931},
                "classes": [str(i) for i in range(10)],
                "timm": {"model": "tiny_vit_5m_224", "kwargs": {"num_classes": 10}},
            },
        )
    _write_json(folder / "result.json", result)
    return folder


def _write_csv(path: Path, columns: list[str], rows: list[dict[str, Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: "" if v is None else v for k, v in row.items()} for row in rows)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
