"""Make the golden outcome: a contraction, a label store, a training and an export of fixed input.

    python tests/golden/produce.py OUT              make it with the code of this commit
    python tests/golden/produce.py OUT --record     and write expected.json and measurements.json
    python tests/golden/produce.py --compare A B    compare two outcomes to the bit

All measured throughput comes from `measurements.json`, under the fingerprint of this machine, so
that nothing but the code decides. OUT gets `outcome.json` (plain values) and
`tensors.safetensors`. `make golden BASE=COMMIT` runs two commits on one machine and compares them.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RECORDED = HERE / "measurements.json"
EXPECTED = HERE / "expected.json"
SEED_ARCH = {
    "embed_dims": [64, 64, 96, 128],
    "depths": [1, 1, 2, 1],
    "window_sizes": [7, 14, 7],
    "mbconv_expand_ratio": 4.0,
    "mlp_ratio": 4.0,
    "head_dim": 32,
}
DATA = ("--img-size", "32", "--max-images", "600")
TRIAL = ("step", "key", "parent", "params", "macs", "state", "stage", "epochs")
SCORES = ("soft_loss", "soft_loss_se", "top1", "top1_se")


def run(module: str, *arguments: str) -> None:
    """Run one command of the toolkit in this process; it must succeed."""
    status = import_module(f"{module}.__main__").main(list(arguments))
    assert status == 0, f"{module} {' '.join(arguments)}: exit status {status}"


def write_measurements(path: Path) -> int:
    """Write the recorded measurements as if they were made here; return how many."""
    from nas.core.requirement import Setting
    from nas.measure.fingerprint import take_fingerprint
    from nas.measure.measurement import Measurement
    from nas.measure.measurement_table import MeasurementRow, MeasurementTable
    from nas.measure.runtimes import find_runtime

    device = take_fingerprint("cpu", 1)
    rows = json.loads(RECORDED.read_text())
    table = MeasurementTable(path)
    for row in rows:
        values: dict[str, Any] = {f.name: None for f in dataclasses.fields(Measurement)}
        values["coverage"] = 0.0
        values.update(row["measurement"])
        runtime = find_runtime(values["runtime"], "--require")
        setting = Setting("cpu", values["runtime"], values["dtype"], values["batch"])
        here = device.under(setting, runtime.version(), values["img_size"])
        measurement = Measurement.from_dict({**values, "fingerprint": here.id})
        names = ("role", "arch_key", "arch_label", "reference_key")
        table.append(MeasurementRow(*(row[name] for name in names), measurement))
    return len(rows)


def produce(out: Path, *, record: bool = False) -> dict[str, Any]:
    """Run the four commands in `out` and return what they came to."""
    out.mkdir(parents=True, exist_ok=True)
    cache = ("--cache-dir", str(out / "cache"), "--quiet")
    (out / "seed.json").write_text(json.dumps(SEED_ARCH))
    measured = []
    if not record:
        write_measurements(out / "recorded.csv")
        measured = ["--measurements", str(out / "recorded.csv")]
    folder = out / "run"
    run(
        "nas.contract",
        *("--seed", str(out / "seed.json"), "--target-params", "400K", "--effort", "smoke"),
        *("--data", "digits", "--steps", "2", "--candidates-per-step", "6", "--threads", "1", *DATA),
        *("--train-per-step", "4", "--proxy-epochs", "3", "--teacher-epochs", "4"),
        *("--final-epochs", "2", "--min-speedup", "1.05"),
        *("--out", str(folder), *measured, *cache),
    )
    store = out / "store"
    run(
        "nas.labels",
        *("build", "--data", "digits", *DATA, "--teacher-epochs", "1", "--epochs", "2"),
        *("--topk", "5", "--threads", "1", "--out", str(store), *cache),
    )
    run(
        "nas.train",
        *("--arch", str(folder), "--data", "digits", *DATA, "--labels", str(store)),
        *("--epochs", "2", "--threads", "1", "--out", str(out / "training"), *cache),
    )
    run("nas.export", str(folder), "--to", "timm", "--out", str(out / "hub"))
    if record:
        record_measurements(folder)
    return outcome_of(out)


def record_measurements(folder: Path) -> None:
    """Keep a run's measurements without what is this machine's."""
    from nas.measure.measurement_table import read_measurements

    rows = []
    for row in read_measurements(folder / "measurements.csv"):
        values = {k: v for k, v in dataclasses.asdict(row.measurement).items() if v is not None}
        own = ("fingerprint", "when", "load", "clock_mhz", "waited")
        values = {k: v for k, v in values.items() if k not in own}
        values.update(when="2026-11-30T00:00:00+00:00", load=0.0)
        names = ("role", "arch_key", "arch_label", "reference_key")
        rows.append({**{name: getattr(row, name) for name in names}, "measurement": values})
    RECORDED.write_text(json.dumps(rows, indent=1) + "\n")


def outcome_of(out: Path) -> dict[str, Any]:
    """Read what the commands left, in words that later formats of the files keep."""
    from safetensors.torch import load_file, save_file

    folder = out / "run"
    trials = [
        {**{name: row[name] for name in TRIAL}, **{name: float(row[name]) if row[name] else None for name in SCORES}}
        for row in csv.DictReader((folder / "trials.csv").read_text().splitlines())
    ]
    best = json.loads((folder / "best.json").read_text())
    log = list(csv.DictReader((out / "training" / "log.csv").read_text().splitlines()))
    outcome = {
        "trials": trials,
        "winner": best["key"],
        "score": best["score"],
        "measurements": len((folder / "measurements.csv").read_text().splitlines()) - 1,
        "training": [{k: float(row[k]) for k in ("train_loss", "holdout_loss")} for row in log],
        "exported": sorted(p.name for p in (out / "hub").iterdir()),
    }
    tensors = {}
    files = {
        "best": folder / "best.safetensors",
        "training": out / "training" / "last.safetensors",
        "exported": out / "hub" / "model.safetensors",
    }
    for name, path in files.items():
        tensors.update({f"{name}/{k}": v.contiguous() for k, v in load_file(path).items()})
    tensors.update(labels_of(out / "store"))
    save_file(tensors, out / "tensors.safetensors")
    (out / "outcome.json").write_text(json.dumps(outcome, indent=1) + "\n")
    return outcome


def labels_of(folder: Path) -> Mapping[str, Any]:
    """Decode every stored label: classes and probabilities by epoch."""
    import numpy as np
    import torch

    from nas.labels.store import open_store

    store = open_store(folder)
    found = {}
    for epoch in range(2):
        held = store.epoch(epoch)
        labels = held[np.arange(len(held))]
        for name in ("index", "prob", "tail"):
            found[f"labels/{epoch}/{name}"] = torch.as_tensor(getattr(labels, name))
    return found


def compare(a: Path, b: Path) -> list[str]:
    """Return every difference between two outcomes, to the bit."""
    import torch
    from safetensors.torch import load_file

    found = []
    one, other = (json.loads((f / "outcome.json").read_text()) for f in (a, b))
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            found.append(f"{name}: {one.get(name)} != {other.get(name)}")
    left, right = (load_file(f / "tensors.safetensors") for f in (a, b))
    for name in sorted(left.keys() | right.keys()):
        if name not in left or name not in right or not torch.equal(left[name], right[name]):
            found.append(f"{name}: other values")
    return found


def main() -> int:
    """Parse, produce or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", nargs="?")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"))
    given = parser.parse_args()
    if given.compare:
        found = compare(*(Path(f) for f in given.compare))
        print("\n".join(found) or "equal to the bit")
        return 1 if found else 0
    outcome = produce(Path(given.out), record=given.record)
    if given.record:
        EXPECTED.write_text(json.dumps(outcome, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
