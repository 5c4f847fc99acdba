"""`steps.csv`: one line a finished step, with the candidates counted by where they stopped."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nas.core.io import write_atomic
from nas.core.table import Writer
from nas.search.constraints import StepBounds
from nas.search.study import Trial


@dataclass(frozen=True)
class StepRow:
    """One step in numbers.

    `band_lo`, `band_hi` in parameters; `required` is what was to be met, in the words of
    `--require` (without a required pace, the least ratio to the seed); `contractions` counts the
    band exactly, summed over the incumbents it starts from; `shortlisted` = `too_slow` +
    `not_selected` + `failed` + `scored`. The rest describes the incumbent chosen.
    """

    step: int
    band_lo: int
    band_hi: int
    required: str
    contractions: int
    shortlisted: int
    too_slow: int
    not_selected: int
    failed: int
    scored: int
    kept: int
    incumbent: str
    params: int
    ratio: float | None
    soft_loss: float | None
    top1: float | None
    seconds: float

    @classmethod
    def of(
        cls, step: int, bounds: StepBounds, counted: int, rows: Sequence[Trial], best: Trial
    ) -> StepRow:
        """Count the rows of one step."""
        required = bounds.describe()
        if bounds.least_ratio is not None:
            required = " and ".join(filter(None, (f"{bounds.least_ratio:.4f}x", required)))
        return cls(
            step=step,
            band_lo=bounds.band.lo,
            band_hi=bounds.band.hi,
            required=required,
            contractions=counted,
            shortlisted=len(rows),
            too_slow=sum(r.stage == "throughput" and r.state == "pruned" for r in rows),
            not_selected=sum(r.stage == "selection" for r in rows),
            failed=sum(r.state == "failed" for r in rows),
            scored=sum(r.state == "complete" for r in rows),
            kept=sum(r.stage == "kept" for r in rows),
            incumbent=best.key,
            params=best.params,
            ratio=best.ratio,
            soft_loss=best.soft_loss,
            top1=best.top1,
            seconds=round(sum(r.seconds for r in rows), 3),
        )


def write_steps(path: Path, steps: Sequence[StepRow]) -> None:
    """Write `steps.csv` atomically."""
    out = io.StringIO()
    writer = Writer(out)
    writer.writerow([f.name for f in dataclasses.fields(StepRow)])
    for step in steps:
        writer.writerow(["" if v is None else v for v in dataclasses.astuple(step)])
    write_atomic(path, out.getvalue().encode())
