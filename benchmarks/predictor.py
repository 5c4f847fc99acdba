"""How well throughput is predicted: `python -m benchmarks.predictor device.csv --band 5.4M`.

Reads a table of `python -m benchmarks.throughput --space tinyvit --sample 200 --band 5.4M`,
predicts every network by models that have not seen it (ten folds), and compares with what
parameters and MACs alone would order: over the whole range and inside the band of +-10 %
parameters.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nas.core.cli import Parser, guarded
from nas.core.config import parse_count
from nas.core.io import write_atomic
from nas.core.stats import kendall, resampled
from nas.core.table import Writer
from nas.measure.device_rows import OK, one_fingerprint, read_rows
from nas.measure.predict import MODELS, held_out, terms_of
from space import Context, get_family
from space.errors import refuse

RESAMPLES = 2000
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PredictorRow:
    """One way to order networks, over one range: Kendall's tau with measured throughput.

    Intervals are 95 % of a bootstrap over networks (`nas.core.stats.resampled`). `median_error`
    is |predicted / measured - 1|. `ahead` is tau less that of the best of parameters and MACs, on
    the same resamples.
    """

    range: str
    by: str
    networks: int
    tau: float
    tau_lo: float
    tau_hi: float
    median_error: float | None
    error_95: float | None
    ahead: float | None
    ahead_lo: float | None
    ahead_hi: float | None


def compare(paces: Floats, scores: dict[str, Floats], name: str, seed: int) -> list[PredictorRow]:
    """Return a row for each way, on the same resamples of the networks."""
    n = len(paces)
    taus = {by: resampled(score, paces, RESAMPLES, seed) for by, score in scores.items()}
    plain = {by: kendall(score, paces) for by, score in scores.items()}
    rivals = [by for by in ("parameters", "MACs") if by in scores]
    rows = []
    for by, score in scores.items():
        lo, hi = np.percentile(taus[by], [2.5, 97.5])
        error = np.abs(score / paces - 1.0) if by in MODELS else None
        ahead = ahead_lo = ahead_hi = None
        if by in MODELS:
            best = max(rivals, key=lambda rival: plain[rival])
            ahead = plain[by] - plain[best]
            over = taus[by] - np.max([taus[rival] for rival in rivals], axis=0)
            ahead_lo, ahead_hi = (float(v) for v in np.percentile(over, [2.5, 97.5]))
        rows.append(
            PredictorRow(
                name,
                by,
                n,
                plain[by],
                float(lo),
                float(hi),
                None if error is None else float(np.median(error)),
                None if error is None else float(np.percentile(error, 95)),
                ahead,
                ahead_lo,
                ahead_hi,
            )
        )
    return rows


def predictor(table: Path, band: int) -> tuple[list[PredictorRow], str, str]:
    """Return the rows, the fingerprint and the device of a table."""
    rows = [row for row in read_rows(table, "TABLE") if row.state == OK and row.spec]
    if len(rows) < 30:
        raise refuse("TABLE", f"{len(rows)} measured networks", "30 at least", "measure more")
    fingerprint = one_fingerprint(rows, str(table))
    family = get_family(rows[0].family)
    ctx = Context(img_size=rows[0].img_size, num_classes=rows[0].num_classes)
    archs = [family.arch(json.loads(row.spec)) for row in rows]
    terms = terms_of(family, archs, ctx)
    relative = all(row.ratio is not None for row in rows)
    paces = np.array([row.ratio if relative else row.images_per_s for row in rows], dtype=float)
    scores: dict[str, Floats] = {
        name: 1.0 / held_out(make, terms, 1.0 / paces) for name, make in MODELS.items()
    }
    params = np.array([family.count_params(arch, ctx) for arch in archs], dtype=float)
    scores["parameters"] = -params
    scores["MACs"] = -np.array([family.count_macs(arch, ctx) for arch in archs], dtype=float)
    found = compare(paces, scores, "whole range", 0)
    inside = (params >= 0.9 * band) & (params <= 1.1 * band)
    if inside.sum() >= 10:
        within = {by: score[inside] for by, score in scores.items()}
        found += compare(paces[inside], within, f"{band / 1e6:g}M +-10 %", 1)
    return found, fingerprint, rows[0].on_device_name


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, compare, report."""
    parser = Parser(prog="python -m benchmarks.predictor", description=__doc__, allow_abbrev=False)
    parser.add_argument("table", type=Path, metavar="TABLE", help="the CSV of measured networks")
    parser.add_argument("--band", default="5.4M", metavar="N", help="(default: 5.4M)")
    parser.add_argument("--out", type=Path, metavar="FILE")
    given = parser.parse_args(argv)
    return guarded(lambda: _main(given))


def _main(given: argparse.Namespace) -> int:
    rows, fingerprint, device = predictor(given.table, parse_count("--band", given.band))
    for row in rows:
        told = f"{row.range:<14} {row.by:<16} {row.networks:>4} networks  tau {row.tau:.3f} "
        told += f"[{row.tau_lo:.3f}, {row.tau_hi:.3f}]"
        if row.median_error is not None:
            told += f"  error {row.median_error:.1%}, 95 % below {row.error_95:.1%}"
            told += f"  ahead {row.ahead:+.3f} [{row.ahead_lo:+.3f}, {row.ahead_hi:+.3f}]"
        print(told)
    if given.out is not None:
        out = io.StringIO()
        names = [f.name for f in fields(PredictorRow)]
        writer = Writer(out, [*names, "fingerprint", "device"])
        writer.writeheader()
        for row in rows:
            values = {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(row).items()}
            writer.writerow({**values, "fingerprint": fingerprint, "device": device})
        write_atomic(given.out, out.getvalue().encode())
    best = max((r for r in rows if r.by in MODELS), key=lambda r: (r.range == "whole range", r.tau))
    print(json.dumps({"rows": len(rows), "best": best.by, "tau": round(best.tau, 4)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
