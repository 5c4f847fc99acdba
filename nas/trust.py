"""How far a run's proxy scores can be trusted: `--trust N`, and the table `benchmarks.proxy_rank`.

N candidates of the last step's band, kept and rejected, are named in `trust.json` before anything
is trained. Each is then scored by the proxy from the seed's weights, and trained about ten times
longer from there on several random seeds: the truth. `trust.csv` compares.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.executor import OutOfTime
from nas.files import read_json, write_atomic, write_json
from nas.jobs import Job, Result
from nas.judging import losses_of
from nas.run import Incumbent, Run, derived_seed
from nas.scoring import with_order
from nas.search.trust import ceiling, in_words, indistinguishable, kendall_interval, regret
from space.draws import sample_band
from space.errors import InputError, refuse
from space.family import Arch

Floats = npt.NDArray[np.float64]

LONGER = 10
"""How many times as long as the proxy the truth trains."""
SEEDS = 3
"""Random seeds of the truth."""
ZERO_COST_IMAGES = 64


@dataclass(frozen=True)
class TrustRow:
    """One score against the truth: Kendall's tau with its interval over `n` archs.

    `cost_share` is its training relative to one of the truth's; `regret` what trusting its pick
    costs in nats of the truth, with its interval, and whether that is within one standard deviation
    of a random seed. The ceilings have neither.
    """

    name: str
    estimate: float
    lo: float
    hi: float
    n: int
    cost_share: float | None = None
    regret: float | None = None
    regret_lo: float | None = None
    regret_hi: float | None = None
    within_one_sd: bool | None = None


def ranked(
    scores: Mapping[str, tuple[npt.ArrayLike, float | None]], truth: npt.ArrayLike
) -> list[TrustRow]:
    """Compare scores (lower is better, with their share of the cost) with truth [seeds, archs].

    The last two rows are the ceilings that the truth's own noise sets (`nas.search.trust`).
    """
    n = np.asarray(truth).shape[1]
    rows = []
    for name, (values, share) in scores.items():
        tau, cost = kendall_interval(values, truth, random_seed=0), regret(values, truth)
        rows.append(
            TrustRow(name, tau.value, tau.lo, tau.hi, n, share, cost.value, cost.lo, cost.hi,
                     cost.within_one_sd)
        )  # fmt: skip
    limit = ceiling(truth)
    for name, found in (
        ("ceiling: one truth against another", limit.pairwise),
        ("ceiling: the noise-free truth", limit.perfect),
    ):
        rows.append(TrustRow(name, found.value, found.lo, found.hi, n))
    return rows


def write_rows(path: Path, rows: Sequence[TrustRow], **more: str) -> None:
    """Write the table as CSV; `more` are further columns, the same in every row."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*(f.name for f in dataclasses.fields(TrustRow)), *more])
    for row in rows:
        cells = [round(v, 5) if isinstance(v, float) else v for v in dataclasses.astuple(row)]
        writer.writerow([*("" if v is None else v for v in cells), *more.values()])
    write_atomic(path, out.getvalue().encode())


def listed(run: Run, number: int) -> list[Arch]:
    """Name the candidates: of the last step's band, scored ones first, then those rejected.

    Where the run met fewer, the rest is drawn uniformly from the band. Kept in `trust.json`.
    """
    path = run.folder.path / "trust.json"
    if path.exists():
        known = [run.family.arch(arch) for arch in read_json(path, "the archs of --trust")]
        if len(known) != number:
            want = f"the {len(known)} archs named in {path}"
            raise refuse("--trust", number, want, "name the same number")
        return known
    band = run.band(run.config.steps)
    order = {"kept": 0, "proxy": 1, "race": 2, "selection": 3, "throughput": 4}
    rows = [r for r in run.ledger.rows if r.step > 0 and band.lo <= r.params <= band.hi]
    rows.sort(key=lambda r: order.get(r.stage, 5))
    found = {r.key: run.family.arch(run.ledger.arch(r.step, r.key)) for r in rows}
    archs = list(found.values())[:number]
    archs += sample_band(
        run.family, run.seed_arch, run.context, band, number - len(archs),
        random_seed=derived_seed(run.config.random_seed, "trust"), exclude=set(found),
    )  # fmt: skip
    if len(archs) < number:
        raise refuse("--trust", number, f"at most {len(archs)}, all that the last band holds")
    write_json(path, [run.family.to_dict(arch) for arch in archs])
    return archs


def trust_cost(run: Run, number: int) -> float:
    """Return the GMACs of a trust report, forward and backward."""
    images = len(run.dataset.train.labels)
    each = run.config.target_params / run.start_params * run.image_cost(run.seed_arch)
    return number * images * run.config.proxy_epochs * (2 + SEEDS * LONGER) * each


def trust(run: Run, seed: Incumbent, number: int) -> dict[str, Any]:
    """Train what the report needs, write `trust.csv`, and return the report as plain JSON."""
    parent = with_order(run, seed)
    archs = listed(run, number)
    config = run.config
    # The truth is longer than the labels that the run stored: they start again then.
    longer = _with_config(run, beyond="cycle")
    truth: list[list[Path]] = []
    for at in range(SEEDS):
        truth.append(
            [
                _train(longer, arch, f"truth{at}", LONGER * config.proxy_epochs, parent,
                       derived_seed(config.random_seed, "truth", at))
                for arch in archs
            ]
        )  # fmt: skip
    init = config.proxy_init
    short = [_train(run, a, "trust", config.proxy_epochs, parent, None, init) for a in archs]
    hard = [
        _train(run, a, "trust-hard", config.proxy_epochs, parent, None, init, 1.0) for a in archs
    ]
    losses = [[losses_of(folder, config.metric) for folder in row] for row in truth]
    means = np.array([[float(values.mean()) for values in row] for row in losses])
    share = 1 / LONGER
    scores: dict[str, tuple[npt.ArrayLike, float | None]] = {
        f"proxy ({init})": ([float(losses_of(f, config.metric).mean()) for f in short], share),
        f"proxy ({init}), hard labels": (
            [float(losses_of(f, config.metric).mean()) for f in hard], share,
        ),
    }  # fmt: skip
    scores |= {name: (values, 0.0) for name, values in untrained(run, archs).items()}
    rows = ranked(scores, means)
    write_rows(run.folder.path / "trust.csv", rows)
    by_arch = {
        run.key(arch): np.array([losses[s][i] for s in range(SEEDS)])
        for i, arch in enumerate(archs)
    }
    kept = indistinguishable(by_arch)
    own, limit = rows[0], rows[-1]
    verdict = "within" if own.within_one_sd else "beyond"
    return {
        "n": number,
        "seeds": SEEDS,
        "epochs": LONGER * config.proxy_epochs,
        "tau": own.estimate,
        "tau_lo": own.lo,
        "tau_hi": own.hi,
        "ceiling": limit.estimate,
        "regret": own.regret,
        "says": (
            f"over {number} archs of the last band, trained {LONGER} times longer on {SEEDS} "
            f"random seeds, the proxy ranks with tau {own.estimate:.2f} [{own.lo:.2f}, "
            f"{own.hi:.2f}] where noise permits {limit.estimate:.2f} [{limit.lo:.2f}, "
            f"{limit.hi:.2f}]; its pick is {own.regret:.4f} nats behind the best, {verdict} one "
            f"standard deviation of a random seed; {in_words(kept, by_arch)}"
        ),
    }


def _with_config(run: Run, **changes: Any) -> Run:
    import copy

    other = copy.copy(run)
    other.config = replace(run.config, **changes)
    return other


def _train(
    run: Run,
    arch: Arch,
    role: str,
    epochs: int,
    parent: Incumbent,
    random_seed: int | None,
    init: str = "inherit",
    hard: float = 0.0,
) -> Path:
    name = f"{role}-{run.key(arch)}"
    out = run.folder.job_folder(name)
    result = run.train(
        arch, name, out=out, epochs=epochs, init=init, parent=parent, random_seed=random_seed,
        hard_weight=hard,
    )  # fmt: skip
    if not result.ok:
        raise InputError(f"--trust: {run.family.label(arch)} cannot be trained: {result.reason}")
    run.folder.drop_weights(name)
    return out


def untrained(run: Run, archs: Sequence[Arch]) -> dict[str, list[float]]:
    """Return scores that need no training, lower taken for better: counts, pace, zero-cost.

    Signs are those of their authors' claims: more parameters, MACs, gradient or distinct codes are
    better, and so is a slower arch of the same size.
    """
    found: dict[str, list[float]] = {}
    for arch in archs:
        values = {
            "parameters": -float(run.family.count_params(arch, run.context)),
            "MACs": -float(run.family.count_macs(arch, run.context)),
        }
        measured = run.measure(arch, "gate", reference=run.seed_arch)
        if not isinstance(measured, Result):
            values["throughput (slower is better)"] = float(measured.images_per_s)
        spec = {
            **run.network(arch),
            "dataset": str(run.dataset.folder),
            "store": run.store["folder"],
            "images": min(ZERO_COST_IMAGES, len(run.dataset.train.labels)),
            "batch_size": run.config.batch_size,
            "random_seed": run.config.random_seed,
            "device": run.config.device,
            "missing": run.config.missing_labels,
        }
        result = run.do(Job("zero-cost", f"zero-{run.key(arch)}", spec))
        if result.ok:
            values |= {k: -float(v) for k, v in result.values.items() if k != "images"}
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return {name: values for name, values in found.items() if len(values) == len(archs)}


def trust_in_time(bench: Run, seed: Incumbent, number: int) -> dict[str, Any] | None:
    """Make the trust report, as far as time allows; a later --resume goes on with it."""
    console = bench.console
    console.start(trust_cost(bench, number))
    try:
        report = trust(bench, seed, number)
        console.line(f"trust: {report['says']}")
        return report
    except OutOfTime:
        console.line(
            f"trust: out of time (--max-hours); --resume {bench.folder.path} --trust {number} "
            "goes on"
        )
        return None
    finally:
        console.stop()
        with contextlib.suppress(Exception):
            bench.executor.close()
