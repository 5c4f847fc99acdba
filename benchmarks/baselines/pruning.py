"""What do pruning tools make of the same trained seed? `python -m benchmarks.baselines.pruning`.

Structured pruning to the contracted arch's parameters, then the same training on the same soft
labels, the same random seeds and the same test images, beside the contracted arch. A tool that is
not installed, crashes, or does not reach the budget is a row that says so. Searches and trainings
are shared with `python -m benchmarks.baselines`, where both are called with the same flags.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.baselines.archs import (
    CONTRACTED,
    Side,
    Target,
    arguments,
    checked,
    search,
    target_of,
)
from benchmarks.baselines.compare import FIRST_SEED, Budget
from benchmarks.baselines.verdict import paired_interval, verdict
from benchmarks.lab import Lab, Training, opened
from nas.core.cli import Parser, guarded
from nas.core.io import read_json, write_atomic, write_json
from nas.core.progress import Console
from nas.core.table import Writer
from nas.jobs.job import Result

Floats = npt.NDArray[np.float64]

OWN = "contracted (this toolkit)"
SPENT = "not run: the budget is spent, call again"
SLACK = 0.05
"""A budget is reached by a net at most this share below it, and not above."""
MOST_S = 7200.0
"""A rival's job that takes longer is an outcome."""

Work = Callable[[Mapping[str, Any], int], Mapping[str, Any]]
"""Does one job of `benchmarks.baselines.prune_worker` on some threads; returns its result."""


@dataclass(frozen=True)
class RivalRow:
    """One pruned network, or the contracted arch, at one target.

    `estimate`, `lo`, `hi`: test top-1 with its 95 % interval over `n` images and `seeds` random
    seeds, `se` its standard error. `ratio`: throughput relative to the seed, timed interleaved.
    `behind`, `behind_lo`, `behind_hi`: the contracted arch's top-1 less this one's, paired, with
    the one-sided 95 % bound `behind_lower`. `loads`: whether timm alone takes the weights.
    `outcome` is the verdict on the contracted arch, or why there is none.
    """

    name: str
    estimate: float | None
    lo: float | None
    hi: float | None
    n: int
    target: str = ""
    method: str = ""
    budget: int | None = None
    reached: bool | None = None
    params: int | None = None
    se: float | None = None
    seeds: int = 0
    images_per_s: float | None = None
    ratio: float | None = None
    ratio_lo: float | None = None
    ratio_hi: float | None = None
    loads: bool | None = None
    behind: float | None = None
    behind_lo: float | None = None
    behind_hi: float | None = None
    behind_lower: float | None = None
    outcome: str = ""
    command: str = ""


PACE = ("images_per_s", "ratio", "ratio_lo", "ratio_hi")


def in_process(spec: Mapping[str, Any], threads: int) -> Mapping[str, Any]:
    """Do a job in a process of its own, or take over what it left; a crash is a result too."""
    out = Path(spec["out"])
    if (out / "result.json").is_file():
        kept: Mapping[str, Any] = read_json(out / "result.json", "a rival's job")
        return kept
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_name(f"{out.name}.spec.json")
    write_json(path, dict(spec))
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "10000"}
    command = [sys.executable, "-m", "benchmarks.baselines.prune_worker", str(path)]
    with open(out.with_name(f"{out.name}.log"), "w") as log:
        try:
            ended = subprocess.run(
                command, env=env, stdout=log, stderr=log, timeout=MOST_S, check=False
            )
        except subprocess.TimeoutExpired:
            return {"ok": False, "reason": f"longer than {MOST_S / 3600:g} hours"}
    if not (out / "result.json").is_file():
        return {"ok": False, "reason": f"its process ended with status {ended.returncode}"}
    done: Mapping[str, Any] = read_json(out / "result.json", "a rival's job")
    return done


def common_spec(lab: Lab, given: Any) -> dict[str, Any]:
    """Return what all jobs of a rival are told, as plain JSON."""
    run, config = lab.run, lab.run.config
    return {
        "family": run.family.name,
        "arch": run.family.to_dict(run.seed_arch),
        "context": dataclasses.asdict(run.context),
        "weights": str(lab.seed.weights.resolve()),
        "dataset": str(run.dataset.folder),
        "store": run.store["folder"],
        "batch_size": config.batch_size,
        "epochs": given.truth_epochs,
        "device": config.device,
        "missing": config.missing_labels,
        "beyond": config.beyond,
        "label_epochs": run.store["use_epochs"],
        "random_seed": config.random_seed,
        "setting": dataclasses.asdict(run.primary),
        "threads": config.threads,
        "blocks": config.bench_blocks,
        "max_blocks": config.bench_max_blocks,
        "timm": run.family.timm_call(run.seed_arch, run.context),
    }


def pruned_row(
    base: RivalRow,
    common: Mapping[str, Any],
    variant: Any,
    folder: Path,
    own: Floats | None,
    *,
    seeds: int,
    workers: int,
    work: Work,
    budget: Budget,
    absent: str | None,
) -> RivalRow:
    """Prune by one variant, train on every random seed, and compare with the contracted arch."""
    if absent is not None:
        return replace(base, outcome=absent)
    if not budget.fits(0.0) and not (folder / "pruned" / "result.json").is_file():
        return replace(base, outcome=SPENT)
    spec = {
        **common,
        "kind": "prune",
        "variant": dataclasses.asdict(variant),
        "budget": base.budget,
        "out": str(folder / "pruned"),
    }
    pruned = work(spec, int(common["threads"]))
    if not pruned["ok"]:
        return replace(base, reached=False, outcome=f"failed: {pruned['reason']}")
    found = pruned["values"]
    assert base.budget is not None
    base = replace(
        base,
        params=found["params"],
        loads=found["loads"],
        reached=(1 - SLACK) * base.budget <= found["params"] <= base.budget,
        **{name: found[name] for name in PACE},
    )
    if not budget.fits(0.0):
        return replace(base, outcome=SPENT)
    train = {**common, "kind": "train", "pruned": str(folder / "pruned" / "pruned.safetensors")}
    jobs = [
        {
            **train,
            "random_seed": FIRST_SEED + s,
            "out": str(folder / f"e{common['epochs']}-r{FIRST_SEED + s}"),
        }
        for s in range(seeds)
    ]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        done = list(pool.map(lambda job: work(job, 1), jobs))
    bad = [each["reason"] for each in done if not each["ok"]]
    if bad:
        return replace(base, outcome=f"training failed: {bad[0]}")
    return with_scores(base, np.array([_correct(Path(job["out"])) for job in jobs]), own)


def with_scores(base: RivalRow, correct: Floats, own: Floats | None) -> RivalRow:
    """Fill in top-1 from correctness [random seeds, images]; compare with the contracted arch's."""
    top1 = paired_interval(correct, np.zeros_like(correct))
    row = replace(
        base,
        estimate=top1.value,
        lo=max(0.0, top1.lo),
        hi=min(1.0, top1.hi),
        n=top1.images,
        seeds=top1.seeds,
        se=float(np.hypot(top1.image_se, top1.seed_se)),
    )
    if own is None:
        return replace(row, outcome="no contracted arch to compare with")
    if own is correct:
        return row
    gap = paired_interval(own, correct)
    return replace(
        row,
        behind=gap.value,
        behind_lo=gap.lo,
        behind_hi=gap.hi,
        behind_lower=gap.lower,
        outcome=f"the contracted arch is {verdict(gap)}",
    )


def _correct(folder: Path) -> Floats:
    from nas.core.seals import load_arrays

    return np.asarray(load_arrays(folder / "test.safetensors")["correct"], dtype=np.float64)


def own_row(
    lab: Lab, given: Any, target: Target, side: Side, budget: Budget, work: Work
) -> tuple[RivalRow, Floats | None]:
    """Train the contracted arch as its rivals are; return its row and correctness."""
    run = lab.run
    base = RivalRow(
        f"{target.text}: {OWN}",
        None,
        None,
        None,
        0,
        target=target.text,
        method=OWN,
        budget=target.most,
        command=given.command,
    )
    if side.arch is None:
        return replace(base, outcome=str(side.misses)), None
    params = run.family.count_params(side.arch, run.context)
    base = replace(base, params=params, budget=params, reached=params <= target.most)
    measured = run.timings.measure(side.arch, "final", reference=run.seed_arch)
    run.executor.close()
    if not isinstance(measured, Result):
        base = replace(base, **{name: getattr(measured, name) for name in PACE})
    parent = lab.parent(run.config.importance)
    wanted = [
        Training(side.arch, "inherit", given.truth_epochs, FIRST_SEED + s, parent, test=True)
        for s in range(given.seeds)
    ]
    missing = lab.missing(wanted)
    cost = sum(lab.cost(t) for t in missing)
    if missing and not budget.guess:
        budget.guess = 1 / (lab.pace(side.arch) * run.image_cost(side.arch))
    if missing and not budget.fits(cost):
        return replace(base, outcome=SPENT), None
    started = time.monotonic()
    done = lab.train(wanted)
    if missing:
        budget.spent(cost, time.monotonic() - started)
    bad = [t.failed for t in done if t.failed is not None]
    if bad:
        return replace(base, outcome=f"training failed: {bad[0]}"), None
    weights = done[0].folders[given.truth_epochs] / "weights.safetensors"
    spec = {
        "kind": "load",
        "weights": str(weights.resolve()),
        "timm": run.family.timm_call(side.arch, run.context),
        "out": str(_folder(lab, target) / f"load-{run.key(side.arch)}"),
    }
    tried = work(spec, 1)
    loads = bool(tried["values"]["loads"]) if tried["ok"] else None
    correct = np.array([t.correct() for t in done])
    return with_scores(
        replace(base, loads=loads, outcome=side.misses or ""), correct, correct
    ), correct


def _folder(lab: Lab, target: Target) -> Path:
    return (lab.run.folder.path / "rivals" / target.text).resolve()


def compare(given: Any, console: Console, work: Work = in_process) -> list[RivalRow]:
    """Search, prune and train what is missing; return the table's rows."""
    from benchmarks.baselines.prune import VARIANTS, missing

    budget = Budget(given.budget_hours)
    rows: list[RivalRow] = []
    with opened(given, console) as lab:
        common = common_spec(lab, given)
        for text in given.targets:
            target = target_of(lab, text)
            side = search(lab, given, target, CONTRACTED, budget.deadline, console)
            first, own = own_row(lab, given, target, side, budget, work)
            rows.append(first)
            for number, variant in enumerate(VARIANTS):
                console.line(f"{text}: {variant.name}")
                base = RivalRow(
                    f"{text}: {variant.name}",
                    None,
                    None,
                    None,
                    0,
                    target=text,
                    method=variant.name,
                    budget=first.budget,
                    command=given.command,
                )
                folder = _folder(lab, target) / f"{number}-of-{first.budget}"
                rows.append(
                    pruned_row(
                        base,
                        common,
                        variant,
                        folder,
                        own,
                        seeds=given.seeds,
                        workers=lab.workers,
                        work=work,
                        budget=budget,
                        absent=missing(variant.tool),
                    )
                )
    return rows


def write(path: Path, rows: Sequence[RivalRow]) -> None:
    """Write the table as CSV."""
    out = io.StringIO()
    writer = Writer(out)
    writer.writerow([f.name for f in dataclasses.fields(RivalRow)])
    for each in rows:
        cells = [round(v, 5) if isinstance(v, float) else v for v in dataclasses.astuple(each)]
        writer.writerow(["" if v is None else v for v in cells])
    write_atomic(path, out.getvalue().encode())


def figure(path: Path, rows: Sequence[RivalRow]) -> None:
    """Draw test top-1 against throughput, one panel a target."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    targets = list(dict.fromkeys(r.target for r in rows))
    fig, panels = plt.subplots(
        1, len(targets), figsize=(5.2 * len(targets), 3.8), layout="constrained", squeeze=False
    )
    for ax, target in zip(panels[0], targets, strict=True):
        for each in (r for r in rows if r.target == target):
            if each.estimate is None or each.ratio is None or each.se is None:
                continue
            label = each.method + ("" if each.reached else " (budget not reached)")
            ax.errorbar(
                [each.ratio],
                [100 * each.estimate],
                yerr=[100 * each.se],
                label=label,
                lw=1,
                xerr=[
                    [max(0.0, each.ratio - (each.ratio_lo or each.ratio))],
                    [max(0.0, (each.ratio_hi or each.ratio) - each.ratio)],
                ],
                fmt="*" if each.method == OWN else "o",
                ms=9 if each.method == OWN else 4,
            )
        ax.set_title(target, fontsize=9)
        ax.set_xlabel("throughput relative to the seed, 95 %", fontsize=8)
        ax.set_ylabel("test top-1, %, +- one standard error", fontsize=8)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=6)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def build_parser() -> Parser:
    """Return the parser."""
    parser = Parser(prog="python -m benchmarks.baselines.pruning", description=__doc__)
    arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("results/rivals.csv"))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, prune and train what is missing, report."""
    argv = sys.argv[1:] if argv is None else list(argv)
    given = build_parser().parse_args(argv)
    given.command = " ".join(["python -m benchmarks.baselines.pruning", *argv])

    def work() -> int:
        rows = compare(checked(given), Console())
        given.out.parent.mkdir(parents=True, exist_ok=True)
        write(given.out, rows)
        figure(given.out.with_suffix(".png"), rows)
        for each in rows:
            top1 = "" if each.estimate is None else f"{each.estimate:.1%} +- {each.se:.1%} "
            size = "" if each.params is None else f"{each.params:,} of {each.budget:,} "
            pace = "" if each.ratio is None else f"{each.ratio:.2f}x "
            print(f"{each.name:<46} {size}{pace}{top1}{each.outcome}")
        print(
            json.dumps(
                {
                    "rows": len(rows),
                    "trained": sum(r.estimate is not None for r in rows),
                    "reached": sum(bool(r.reached) for r in rows),
                    "load_in_timm": sum(bool(r.loads) for r in rows),
                    "table": str(given.out),
                }
            )
        )
        return 0

    return guarded(work)


if __name__ == "__main__":
    sys.exit(main())
