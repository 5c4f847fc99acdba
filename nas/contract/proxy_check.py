"""Check how well proxy scores rank: `--check-proxy N`, and the table of `benchmarks.proxy`.

`proxy_check.json` names N archs of the last step's band, kept and rejected, before any training. Each is scored by the
run's proxy from the seed's weights (or from scratch), and trained about ten times longer on several random seeds: the
truth. `proxy_check.csv` compares the two.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.contract.flags import LEAST_CHECKED
from nas.contract.race import with_order
from nas.contract.state import Incumbent, Run, Work, derived_seed
from nas.core.cli import resume_flags
from nas.core.config import RunConfig
from nas.core.io import read_object, write_json
from nas.core.per_image import losses_of
from nas.core.stats import Estimate, describe_tied, kendall_interval, noise_ceiling, regret, tied_with_best
from nas.core.table import write_table
from nas.data import Dataset
from nas.distill.jobs import ZeroCostJob, zero_cost
from nas.jobs.job import Job, Result
from nas.jobs.queue import OutOfTime
from nas.search.constraints import band_at
from space.contractions import count_contractions
from space.errors import InputError, refuse
from space.family import Arch, Family
from space.sampling import sample_band

Floats = npt.NDArray[np.float64]

LONGER = 10
"""Epochs of the truth per epoch of the proxy."""
SEEDS = 3
"""Random seeds of the truth."""
ZERO_COST_IMAGES = 64


@dataclass(frozen=True)
class ProxyCheckRow:
    """One score against the truth: Kendall's tau with its interval over `n` archs, or alone where they are too few.

    `cost_share` is its training cost relative to one training of the truth; `regret` is how far its pick is behind the
    best in nats of the truth, with an interval, and whether that is within one standard deviation of a random seed. The
    ceilings have neither.
    """

    name: str
    estimate: float
    lo: float | None
    hi: float | None
    n: int
    cost_share: float | None = None
    regret: float | None = None
    regret_lo: float | None = None
    regret_hi: float | None = None
    within_one_sd: bool | None = None

    @property
    def tau(self) -> Estimate:
        """Kendall's tau."""
        return Estimate(self.estimate, self.lo, self.hi, self.n)


def compare_scores(
    scores: Mapping[str, tuple[npt.ArrayLike, float | None]], truth: npt.ArrayLike
) -> list[ProxyCheckRow]:
    """Compare scores (lower is better, with their share of the cost) with truth [seeds, archs].

    The last two rows are the ceilings that the truth's own noise sets (`nas.core.stats`).
    """
    n = np.asarray(truth).shape[1]
    rows = []
    for name, (values, share) in scores.items():
        tau, cost = kendall_interval(values, truth, random_seed=0), regret(values, truth)
        spread = (cost.value, cost.lo, cost.hi, cost.within_one_sd)
        rows.append(ProxyCheckRow(name, tau.value, tau.lo, tau.hi, n, share, *spread))
    limit = noise_ceiling(truth)
    for what, found in (("one truth against another", limit.pairwise), ("the noise-free truth", limit.perfect)):
        rows.append(ProxyCheckRow(f"ceiling: {what}", found.value, found.lo, found.hi, n))
    return rows


def check_band(number: int | None, config: RunConfig, family: Family, seed: Arch, dataset: Dataset) -> None:
    """Refuse a check of more archs than the last band holds; None means no check."""
    if number is None:
        return
    band = band_at(family.count_params(seed, dataset.context), config, config.steps)
    held = count_contractions(family, seed, dataset.context, band)
    if held < number:
        raise _too_many(number, held)


def _too_many(number: int, held: int) -> InputError:
    remedy = "ask for fewer" if held >= LEAST_CHECKED else "widen --params-tolerance"
    return refuse("--check-proxy", number, f"at most {held}, all that the last band holds", remedy)


def named_archs(folder: Path, number: int) -> list[Any] | None:
    """Read the archs of `proxy_check.json`, None without one; another number is refused."""
    path = folder / "proxy_check.json"
    if not path.exists():
        return None
    known: list[Any] = read_object(path, "the archs of --check-proxy", {"archs": list})["archs"]
    if len(known) != number:
        want = f"the {len(known)} archs named in {path}"
        raise refuse("--check-proxy", number, want, "name the same number")
    return known


def choose_archs(run: Run, number: int) -> list[Arch]:
    """Choose archs of the last step's band: scored trials first, then the rejected.

    Where the run has fewer, the rest is drawn uniformly from the band; archs whose training failed come last. The
    choice is kept in `proxy_check.json`.
    """
    known = named_archs(run.folder.path, number)
    if known is not None:
        return [run.family.arch(arch) for arch in known]
    band = run.band(run.config.steps)
    order = ("kept", "proxy", "race", "selection", "throughput", "counts")
    inside = [r for r in run.study.rows if r.step > 0 and band.lo <= r.params <= band.hi]
    rows = sorted((r for r in inside if r.state != "failed"), key=lambda r: order.index(r.stage))
    found = {r.key: run.family.arch(run.study.arch(r.step, r.key)) for r in rows}
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
    write_json(run.folder.path / "proxy_check.json", {"archs": [run.family.to_dict(arch) for arch in archs]})
    return archs


def proxy_check_work(run: Run, number: int) -> Work:
    """Return the work of a check: per arch one timing, the truth's and the proxies' trainings."""
    images = len(run.dataset.train.labels) * run.config.proxy_epochs * (2 + SEEDS * LONGER)
    each = run.config.target_params / run.start_params * run.image_cost(run.seed_arch)
    return Work(number, number * (2 + SEEDS), number * images * each)


def check_proxy(run: Run, seed: Incumbent, number: int) -> dict[str, Any]:
    """Train the archs, write `proxy_check.csv`, and return the report as plain JSON.

    An arch that cannot be trained is left out and listed in the report; three must remain.
    """
    parent = with_order(run, seed)
    archs = choose_archs(run, number)
    config, init = run.config, run.config.proxy_init
    # The truth is longer than the labels that the run stored: they start again then.
    longer = copy.copy(run)
    longer.config = replace(config, label_overflow="cycle")
    trainings = [
        _Training(longer, f"truth{at}", LONGER * config.proxy_epochs, derived_seed(config.random_seed, "truth", at))
        for at in range(SEEDS)
    ]
    trainings.append(_Training(run, "check", config.proxy_epochs, config.random_seed))
    trainings.append(_Training(run, "check-hard", config.proxy_epochs, config.random_seed, hard=1.0))
    failed: dict[str, str] = {}
    for each in trainings:
        for arch, reason in each.do([a for a in archs if run.key(a) not in failed], parent):
            key = run.key(arch)
            failed[key] = f"{run.family.label(arch)}: {reason}"
            run.console.line(f"proxy check: left out, cannot be trained: {failed[key]}")
        if len(archs) - len(failed) < LEAST_CHECKED:
            left = f"{len(archs) - len(failed)} of {number} archs that can be trained"
            raise refuse("--check-proxy", left, f"at least {LEAST_CHECKED}", next(iter(failed.values()), ""))
    archs = [arch for arch in archs if run.key(arch) not in failed]
    *truth, short, hard = ([losses_of(each.folder(arch), config.metric) for arch in archs] for each in trainings)
    scores: dict[str, tuple[npt.ArrayLike, float | None]] = {
        name: ([float(values.mean()) for values in losses], 1 / LONGER)
        for name, losses in ((f"proxy ({init})", short), (f"proxy ({init}), hard labels", hard))
    }
    scores |= {name: (values, 0.0) for name, values in training_free_scores(run, archs).items()}
    rows = compare_scores(scores, [[float(values.mean()) for values in losses] for losses in truth])
    write_table(run.folder.path / "proxy_check.csv", rows)
    by_arch = {run.key(arch): np.array([losses[i] for losses in truth]) for i, arch in enumerate(archs)}
    own, limit = rows[0], rows[-1]
    # Proxies of a check start from the seed; a run of several steps has nearer parents.
    start = " from the seed's weights" if init == "inherit" else ""
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
        "message": (
            f"over {len(archs)} archs of the last band, trained {LONGER} times longer on {SEEDS} random seeds, the "
            f"proxy{start} ranks with tau {own.tau.text()} where noise permits {limit.tau.text()}; its pick is "
            f"{own.regret:.4f} nats behind the best, {verdict} one standard deviation of a random seed; "
            f"{describe_tied(tied_with_best(by_arch), by_arch)}{gone}"
        ),
    }


@dataclass(frozen=True)
class _Training:
    """One training that every arch of a check gets; `role` begins its folder's name."""

    run: Run
    role: str
    epochs: int
    random_seed: int
    hard: float = 0.0

    def folder(self, arch: Arch) -> Path:
        """Return the folder of an arch's result."""
        return self.run.folder.job_folder(f"{self.role}-{self.run.key(arch)}")

    def do(self, archs: Sequence[Arch], parent: Incumbent) -> list[tuple[Arch, str]]:
        """Train archs as the run's proxies are; return those that failed, with the reasons."""
        tasks = []
        for arch in archs:
            more: dict[str, Any] = {"epochs": self.epochs, "random_seed": self.random_seed, "hard_weight": self.hard}
            tasks.append(self.run.training(arch, self.folder(arch).name, parent=parent, **more))
        results = self.run.train_all(tasks, remember=True)
        for task in tasks:
            self.run.folder.drop_weights(task.out.name)
        done = zip(archs, results, strict=True)
        return [(arch, result.reason or "failed") for arch, result in done if not result.ok]


def training_free_scores(run: Run, archs: Sequence[Arch]) -> dict[str, list[float]]:
    """Return scores that need no training, lower taken for better: counts, pace, zero-cost.

    Signs are those of their authors' claims: more parameters, MACs, gradient or distinct codes are better, and so is a
    slower arch of the same size.
    """
    found: dict[str, list[float]] = {}
    timed = run.timings.measure_together(archs, "gate", reference=run.seed_arch)
    for arch, measured in zip(archs, timed, strict=True):
        values = {
            "parameters": -float(run.family.count_params(arch, run.context)),
            "MACs": -float(run.family.count_macs(arch, run.context)),
        }
        if not isinstance(measured, Result):
            values["throughput (slower is better)"] = float(measured.images_per_s)
        images = min(ZERO_COST_IMAGES, len(run.dataset.train.labels))
        job = ZeroCostJob(**run.job_fields(arch), images=images, random_seed=run.config.random_seed)
        result = run.do(Job(zero_cost, job, f"zero-{run.key(arch)}"))
        if result.ok:
            values |= {k: -float(v) for k, v in result.values.items() if k != "images"}
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return {name: values for name, values in found.items() if len(values) == len(archs)}


def check_proxy_in_time(run: Run, seed: Incumbent, number: int) -> dict[str, Any] | None:
    """Run the proxy check as far as time allows; a later --resume continues it."""
    console = run.console
    console.start(proxy_check_work(run, number).train_gmacs)
    try:
        report = check_proxy(run, seed, number)
        console.line(f"proxy check: {report['message']}")
        return report
    except OutOfTime:
        console.line(
            f"proxy check: out of time (--max-hours); {resume_flags(run.folder.path)} --check-proxy {number} continues"
        )
        return None
    finally:
        console.stop()
        with contextlib.suppress(Exception):
            run.executor.close()
