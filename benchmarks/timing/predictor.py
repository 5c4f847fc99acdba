"""Throughput predicted for networks not seen, against what parameters and MACs would order."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.estimates import Floats, write_table
from nas.core.config import parse_count
from nas.core.stats import kendall, resampled
from nas.measure.device_rows import OK, one_fingerprint, read_rows
from nas.measure.predict import MODELS, held_out, terms_of
from space import Context, get_family
from space.errors import refuse

RESAMPLES = 2000


@dataclass(frozen=True)
class PredictorRow:
    """Kendall's tau of one way to order networks with measured throughput, over one range.

    Intervals are 95 % of a bootstrap over networks (`nas.core.stats.resampled`). `median_error`
    and `error_95` are of |predicted / measured - 1|. `ahead` is tau less that of the best of
    parameters and MACs, on the same resamples.
    """

    range: str
    by: str
    networks: int
    tau: float
    tau_lo: float
    tau_hi: float
    median_error: float | None = None
    error_95: float | None = None
    ahead: float | None = None
    ahead_lo: float | None = None
    ahead_hi: float | None = None


def compare_orders(paces: Floats, scores: dict[str, Floats], name: str) -> list[PredictorRow]:
    """Return a row for each way to order the networks, on the same resamples of them."""
    taus = {by: resampled(score, paces, RESAMPLES, 0) for by, score in scores.items()}
    plain = {by: kendall(score, paces) for by, score in scores.items()}
    costs = [by for by in scores if by not in MODELS]
    rows = []
    for by, score in scores.items():
        lo, hi = (float(v) for v in np.percentile(taus[by], [2.5, 97.5]))
        row = (name, by, len(paces), plain[by], lo, hi)
        if by not in MODELS:
            rows.append(PredictorRow(*row))
            continue
        error = np.abs(score / paces - 1.0)
        over = taus[by] - np.max([taus[cost] for cost in costs], axis=0)
        ahead = plain[by] - max(plain[cost] for cost in costs)
        errors = float(np.median(error)), float(np.percentile(error, 95))
        bounds = (float(v) for v in np.percentile(over, [2.5, 97.5]))
        rows.append(PredictorRow(*row, *errors, ahead, *bounds))
    return rows


def measure_predictor(given: argparse.Namespace) -> dict[str, Any]:
    """Predict the networks of a table, print and write the rows. Raises InputError."""
    band = parse_count("--band", given.band)
    rows = [row for row in read_rows(given.table, "TABLE") if row.state == OK and row.spec]
    if len(rows) < 30:
        raise refuse("TABLE", f"{len(rows)} measured networks", "30 at least", "measure more")
    fingerprint = one_fingerprint(rows, str(given.table))
    family = get_family(rows[0].family)
    ctx = Context(img_size=rows[0].img_size, num_classes=rows[0].num_classes)
    archs = [family.arch(json.loads(row.spec)) for row in rows]
    relative = all(row.ratio is not None for row in rows)
    paces = np.array([row.ratio if relative else row.images_per_s for row in rows], dtype=float)
    terms = terms_of(family, archs, ctx)
    scores = {name: 1.0 / held_out(make, terms, 1.0 / paces) for name, make in MODELS.items()}
    params = np.array([family.count_params(arch, ctx) for arch in archs], dtype=float)
    scores["parameters"] = -params
    scores["MACs"] = -np.array([family.count_macs(arch, ctx) for arch in archs], dtype=float)
    found = compare_orders(paces, scores, "whole range")
    inside = (params >= 0.9 * band) & (params <= 1.1 * band)
    if inside.sum() >= 10:
        within = {by: score[inside] for by, score in scores.items()}
        found += compare_orders(paces[inside], within, f"{band / 1e6:g}M +-10 %")
    for row in found:
        line = f"{row.range:<14} {row.by:<16} {row.networks:>4} networks  tau {row.tau:.3f} "
        line += f"[{row.tau_lo:.3f}, {row.tau_hi:.3f}]"
        if row.median_error is not None:
            line += f"  error {row.median_error:.1%}, 95 % below {row.error_95:.1%}"
            line += f"  ahead {row.ahead:+.3f} [{row.ahead_lo:+.3f}, {row.ahead_hi:+.3f}]"
        print(line)
    if given.out is not None:
        write_table(given.out, found, fingerprint=fingerprint, device=rows[0].on_device_name)
    best = max(
        (r for r in found if r.by in MODELS and r.range == "whole range"), key=lambda r: r.tau
    )
    return {"rows": len(found), "best": best.by, "tau": round(best.tau, 4)}
