"""How far a run's proxy scores can be trusted: `--check-proxy N`, and the table of
`benchmarks.proxy`.

N candidates of the last step's band, kept and rejected, are named in `proxy_check.json` before
anything is trained. Each is then scored by the proxy from the seed's weights (or from scratch, as
the run's own), and trained about ten times longer from there on several random seeds: the truth.
`proxy_check.csv` compares.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.contract.race import with_order
from nas.contract.state import Incumbent, Run, Work, derived_seed
from nas.core.config import RunConfig
from nas.core.io import read_object, write_atomic, write_json
from nas.core.per_image import losses_of
from nas.core.stats import ceiling, in_words, indistinguishable, kendall_interval, regret
from nas.core.table import Writer
from nas.data import Dataset
from nas.distill.jobs import ZeroCostJob, zero_cost
from nas.jobs.job import Job, Result
from nas.jobs.queue import OutOfTime
from nas.search.constraints import band_at
from space.contractions import count_contractions
from space.errors import InputError, refuse
from space.family import Arch, Context, Family
from space.sampling import sample_band

Floats = npt.NDArray[np.float64]

LONGER = 10
"""How many times as long as the proxy the truth trains."""
SEEDS = 3
"""Random seeds of the truth."""
LEAST, MOST = 3, 1000
"""Of so many archs there can be a report."""
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

    The last two rows are the ceilings that the truth's own noise sets (`nas.core.stats`).
    """
    n = np.asarray(truth).shape[1]
    rows = []
    for name, (values, share) in scores.items():
        tau, cost = kendall_interval(values, truth, random_seed=0), regret(values, truth)
        rows.append(
            TrustRow(
                name,
                tau.value,
                tau.lo,
                tau.hi,
                n,
                share,
                cost.value,
                cost.lo,
                cost.hi,
                cost.within_one_sd,
            )
        )
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
    writer = Writer(out)
    writer.writerow([*(f.name for f in dataclasses.fields(TrustRow)), *more])
    for row in rows:
        cells = [round(v, 5) if isinstance(v, float) else v for v in dataclasses.astuple(row)]
        writer.writerow([*("" if v is None else v for v in cells), *more.values()])
    write_atomic(path, out.getvalue().encode())


def check_number(number: object) -> None:
    """Refuse what is no number of archs for a report; None asks for no report."""
    if number is None:
        return
    whole = isinstance(number, int) and not isinstance(number, bool)
    if not whole or number not in range(LEAST, MOST + 1):
        raise refuse("--check-proxy", number, f"an integer from {LEAST} to {MOST} (archs to train)")


def check_band(
    number: int | None, config: RunConfig, family: Family, seed: Arch, dataset: Dataset
) -> None:
    """Refuse a report of more archs than the last band holds; None asks for no report."""
    if number is None:
        return
    context = Context(img_size=dataset.img_size, num_classes=len(dataset.classes))
    band = band_at(family.count_params(seed, context), config, config.steps)
    held = count_contractions(family, seed, context, band)
    if held < number:
        raise _too_many(number, held)


def _too_many(number: int, held: int) -> InputError:
    remedy = "ask for fewer" if held >= LEAST else "widen --params-tolerance"
    return refuse("--check-proxy", number, f"at most {held}, all that the last band holds", remedy)


def named_archs(folder: Path, number: int) -> list[Any] | None:
    """Read the archs that a run named before; another number of them is refused."""
    path = folder / "proxy_check.json"
    if not path.exists():
        return None
    known: list[Any] = read_object(path, "the archs of --check-proxy", {"archs": list})["archs"]
    if len(known) != number:
        want = f"the {len(known)} archs named in {path}"
        raise refuse("--check-proxy", number, want, "name the same number")
    return known


def listed(run: Run, number: int) -> list[Arch]:
    """Name the candidates: of the last step's band, scored ones first, then those rejected.

    Where the run met fewer, the rest is drawn uniformly from the band; those whose training failed
    come last. Kept in `proxy_check.json`.
    """
    known = named_archs(run.folder.path, number)
    if known is not None:
        return [run.family.arch(arch) for arch in known]
    band = run.band(run.config.steps)
    order = {"kept": 0, "proxy": 1, "race": 2, "selection": 3, "throughput": 4}
    inside = [r for r in run.ledger.rows if r.step > 0 and band.lo <= r.params <= band.hi]
    rows = [r for r in inside if r.state != "failed"]
    rows.sort(key=lambda r: order.get(r.stage, 5))
    found = {r.key: run.family.arch(run.ledger.arch(r.step, r.key)) for r in rows}
    archs = list(found.values())[:number]
    for failed in ({r.key for r in inside if r.state == "failed"}, set[str]()):
        archs += sample_band(
            run.family,
            run.seed_arch,
            run.context,
            band,
            number - len(archs),
            random_seed=derived_seed(run.config.random_seed, "trust"),
            exclude={*found, *failed, *(run.key(arch) for arch in archs)},
        )
    if len(archs) < number:
        raise _too_many(number, len(archs))
    told = {"archs": [run.family.to_dict(arch) for arch in archs]}
    write_json(run.folder.path / "proxy_check.json", told)
    return archs


def proxy_check_cost(run: Run, number: int) -> float:
    """Return the GMACs of a proxy check, forward and backward."""
    images = len(run.dataset.train.labels)
    each = run.config.target_params / run.start_params * run.image_cost(run.seed_arch)
    return number * images * run.config.proxy_epochs * (2 + SEEDS * LONGER) * each


def proxy_check_work(run: Run, number: int) -> Work:
    """Return the work of a proxy check: each arch is timed once and trained by truth and proxy."""
    return Work(number, number * (2 + SEEDS), proxy_check_cost(run, number))


def check_proxy(run: Run, seed: Incumbent, number: int) -> dict[str, Any]:
    """Train what the report needs, write `proxy_check.csv`, and return the report as plain JSON.

    An arch that cannot be trained is left out, and the report says so; it needs three others.
    """
    parent = with_order(run, seed)
    archs = listed(run, number)
    config, init = run.config, run.config.proxy_init
    # The truth is longer than the labels that the run stored: they start again then.
    longer = _with_config(run, label_overflow="cycle")
    trainings = [
        _Training(
            longer,
            f"truth{at}",
            LONGER * config.proxy_epochs,
            derived_seed(config.random_seed, "truth", at),
        )
        for at in range(SEEDS)
    ]
    trainings.append(_Training(run, "check", config.proxy_epochs))
    trainings.append(_Training(run, "check-hard", config.proxy_epochs, hard=1.0))
    failed: dict[str, str] = {}
    for each in trainings:
        for arch, reason in each.do([a for a in archs if run.key(a) not in failed], parent):
            key = run.key(arch)
            failed[key] = f"{run.family.label(arch)}: {reason}"
            run.console.line(f"proxy check: left out, cannot be trained: {failed[key]}")
        if len(archs) - len(failed) < LEAST:
            left = f"{len(archs) - len(failed)} of {number} archs that can be trained"
            raise refuse(
                "--check-proxy", left, f"at least {LEAST}", next(iter(failed.values()), "")
            )
    archs = [arch for arch in archs if run.key(arch) not in failed]
    *truth, short, hard = ([each.folder(arch) for arch in archs] for each in trainings)
    losses = [[losses_of(folder, config.metric) for folder in row] for row in truth]
    means = np.array([[float(values.mean()) for values in row] for row in losses])
    share = 1 / LONGER
    scores: dict[str, tuple[npt.ArrayLike, float | None]] = {
        f"proxy ({init})": ([float(losses_of(f, config.metric).mean()) for f in short], share),
        f"proxy ({init}), hard labels": (
            [float(losses_of(f, config.metric).mean()) for f in hard],
            share,
        ),
    }
    scores |= {name: (values, 0.0) for name, values in untrained(run, archs).items()}
    rows = ranked(scores, means)
    write_rows(run.folder.path / "proxy_check.csv", rows)
    by_arch = {
        run.key(arch): np.array([losses[s][i] for s in range(SEEDS)])
        for i, arch in enumerate(archs)
    }
    kept = indistinguishable(by_arch)
    own, limit = rows[0], rows[-1]
    verdict = "within" if own.within_one_sd else "beyond"
    gone = f"; {len(failed)} more could not be trained" if failed else ""
    return {
        "n": len(archs),
        "left_out": list(failed.values()),
        "seeds": SEEDS,
        "epochs": LONGER * config.proxy_epochs,
        "tau": own.estimate,
        "tau_lo": own.lo,
        "tau_hi": own.hi,
        "ceiling": limit.estimate,
        "regret": own.regret,
        "says": (
            f"over {len(archs)} archs of the last band, trained {LONGER} times longer on {SEEDS} "
            f"random seeds, the proxy{_from(init)} ranks with tau {own.estimate:.2f} "
            f"[{own.lo:.2f}, {own.hi:.2f}] where noise permits {limit.estimate:.2f} "
            f"[{limit.lo:.2f}, {limit.hi:.2f}]; its pick is {own.regret:.4f} nats behind "
            f"the best, {verdict} one standard deviation of a random seed; "
            f"{in_words(kept, by_arch)}{gone}"
        ),
    }


def _from(init: str) -> str:
    """Say what the report's proxies start from: a run of several steps had nearer parents."""
    return " from the seed's weights" if init == "inherit" else ""


def _with_config(run: Run, **changes: Any) -> Run:
    import copy

    other = copy.copy(run)
    other.config = replace(run.config, **changes)
    return other


@dataclass(frozen=True)
class _Training:
    """One training that every arch of a report gets, and the role in its folder's name."""

    run: Run
    role: str
    epochs: int
    random_seed: int | None = None
    hard: float = 0.0

    def folder(self, arch: Arch) -> Path:
        """Return where its result lies."""
        return self.run.folder.job_folder(f"{self.role}-{self.run.key(arch)}")

    def do(self, archs: Sequence[Arch], parent: Incumbent) -> list[tuple[Arch, str]]:
        """Train archs as the run's proxies are, and return those that failed, and why."""
        outs = [self.folder(arch) for arch in archs]
        tasks = [
            self.run.training(
                arch,
                out.name,
                out=out,
                epochs=self.epochs,
                init=self.run.config.proxy_init,
                parent=parent,
                random_seed=self.random_seed,
                hard_weight=self.hard,
            )
            for arch, out in zip(archs, outs, strict=True)
        ]
        results = self.run.train_all(tasks, remember=True)
        for out in outs:
            self.run.folder.drop_weights(out.name)
        done = zip(archs, results, strict=True)
        return [(arch, result.reason or "failed") for arch, result in done if not result.ok]


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
        measured = run.timings.measure(arch, "gate", reference=run.seed_arch)
        if not isinstance(measured, Result):
            values["throughput (slower is better)"] = float(measured.images_per_s)
        job = ZeroCostJob(
            family=run.family.name,
            arch=run.family.to_dict(arch),
            context=run.context,
            dataset=run.dataset.folder,
            store=Path(run.store["folder"]),
            missing=run.config.missing_labels,
            images=min(ZERO_COST_IMAGES, len(run.dataset.train.labels)),
            batch_size=run.config.batch_size,
            random_seed=run.config.random_seed,
            device=run.config.device,
        )
        result = run.do(Job(zero_cost, job, f"zero-{run.key(arch)}"))
        if result.ok:
            values |= {k: -float(v) for k, v in result.values.items() if k != "images"}
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return {name: values for name, values in found.items() if len(values) == len(archs)}


def check_proxy_in_time(run: Run, seed: Incumbent, number: int) -> dict[str, Any] | None:
    """Make the proxy check, as far as time allows; a later --resume goes on with it."""
    console = run.console
    console.start(proxy_check_cost(run, number))
    try:
        report = check_proxy(run, seed, number)
        console.line(f"proxy check: {report['says']}")
        return report
    except OutOfTime:
        console.line(
            f"proxy check: out of time (--max-hours); --resume {run.folder.path} --check-proxy "
            f"{number} "
            "goes on"
        )
        return None
    finally:
        console.stop()
        with contextlib.suppress(Exception):
            run.executor.close()
