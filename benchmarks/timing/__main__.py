"""How good our timings are: repeated, as a gate, simulated, and as predictions.

`repeat`: measurements of a pair, each of its own visits, spread over some time, on a quiet machine and beside a process
that keeps one core busy now and then: how many hold the grand median, beside other methods' intervals from the same
visits (a plain mean, Student's t over all blocks, timm's `benchmark.py`, `torch.utils.benchmark`).

`variance`: what blocks, copies, processes and minutes add to the spread of a ratio, with the memory that processes free
given back to the system (as by default) and kept (as in a visit), for one thread and several.

`coverage`: simulated coverage and wrong verdicts of a visit's interval under noise of many kinds.

`gate`: a network against its own copy, so that the true ratio is 1: passing a bound of 1.05 is a false accept, failing
one of 0.95 a false reject; as a run does it.

`predictor TABLE`: throughput predicted for networks not seen (ten folds), against what parameters and MACs alone would
order, over the whole range and inside a band of +-10 % parameters. TABLE is of
`python -m benchmarks.throughput --space tinyvit --sample 200 --band 5.4M`; the errors hold what visits differ by.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.estimates import RESAMPLES, Floats, Row, check_at_least, run_command, write_table
from benchmarks.timing.jobs import WORKER, RecordJob, record
from benchmarks.timing.load import busy_core
from benchmarks.timing.simulate import simulate, spread_by_level
from nas.core.cli import Parser
from nas.core.config import parse_count
from nas.core.progress import Console
from nas.core.requirement import Setting
from nas.core.stats import kendall, resampled
from nas.jobs.job import Job
from nas.jobs.local import LocalExecutor
from nas.measure.device_table import OK, one_fingerprint, read_rows
from nas.measure.fingerprint import take_fingerprint
from nas.measure.intervals import COVERAGE, planned_looks, t_quantile, verdict, visit_interval
from nas.measure.predict import MODELS, held_out, terms_of
from space import Context, get_family
from space.errors import InputError, refuse

BOUNDS = (0.95, 1.05)
LOADS = ("none", "one core now and then")


def write_timings(given: argparse.Namespace, rows: Sequence[Row], *names: str) -> None:
    """Write rows to `--out`, if given, with the named flags and this device in each."""
    if given.out is not None:
        where = take_fingerprint("cpu", given.threads)
        conditions = {name: getattr(given, name) for name in names}
        write_table(given.out, rows, **conditions, fingerprint=where.id, device=where.describe())


class Recorder:
    """Records blocks of a pair of archs in processes of their own."""

    def __init__(self, given: argparse.Namespace, archs: tuple[str, str], threads: int) -> None:
        self._worker = LocalExecutor(threads=threads, command=WORKER)
        setting = Setting("cpu", "eager", "float32", given.batch)
        context = Context(img_size=given.img_size, num_classes=1000)
        self._same: dict[str, Any] = {"archs": archs, "context": context, "setting": setting, "blocks": given.blocks}
        self._count = 0

    def visit(self, *, fresh: bool = False, **more: Any) -> dict[str, Any]:
        """Make one visit, in a forked or an entirely fresh process. Raises InputError where it fails."""
        self._count += 1
        job = Job(
            record, RecordJob(**self._same, **more), f"visit-{self._count}", timed=True, fresh=fresh, forked=not fresh
        )
        result = self._worker.run(job)
        if not result.ok:
            raise InputError(f"a visit failed: {result.reason}")
        return dict(result.values)

    def close(self) -> None:
        """End the processes."""
        self._worker.close()


def ratio_of(rounds: Sequence[Sequence[float]]) -> float:
    """Return a visit's ratio of throughput: the median over its rounds of (network's, reference's) seconds."""
    return statistics.median(reference / own for own, reference in rounds)


# Repeated measurements


def other_methods(visits: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float | None, float | None]]:
    """Return the ratio with its interval by other methods, from the same visits.

    The plain mean and Student's t take all blocks for independent; timm's and torch's methods are those of the first
    process, timm's without an interval.
    """
    rounds = [each for visit in visits for copy in visit["copies"] for each in copy]
    own, reference = (np.array([each[at] for each in rounds]) for at in (0, 1))
    logs = np.log(reference / own)
    plain = float(reference.mean() / own.mean())
    error = 1.96 * float(logs.std(ddof=1)) / math.sqrt(len(logs))
    middle, half = float(logs.mean()), t_quantile(0.975, len(logs) - 1) * float(logs.std(ddof=1)) / math.sqrt(len(logs))
    between = [math.log(ratio_of(visit["copies"][0])) for visit in visits]
    wide = t_quantile(0.975, len(between) - 1) * statistics.stdev(between) / math.sqrt(len(between))
    centre = statistics.fmean(between)
    found: dict[str, tuple[float, float | None, float | None]] = {
        "plain mean": (plain, plain * math.exp(-error), plain * math.exp(error)),
        "t over blocks": (math.exp(middle), math.exp(middle - half), math.exp(middle + half)),
        "t over visits": (math.exp(centre), math.exp(centre - wide), math.exp(centre + wide)),
        "timm": (visits[0]["timm"], None, None),
    }
    if "torch" in visits[0]:
        found["torch.utils.benchmark"] = tuple(visits[0]["torch"])
    return found


def measure_repeat(given: argparse.Namespace) -> dict[str, Any]:
    """Measure again and again, print and write a row for each method and load, and the measurements themselves."""
    from scipy.stats import binomtest

    check_at_least(given, measurements=2, visits=4, max_visits=given.visits)
    console, rows = Console(stream=sys.stderr), list[Row]()
    recorder = Recorder(given, ("5M", "21M"), given.threads)
    looks = planned_looks(given.visits, given.max_visits)
    share = 1.0 - (1.0 - COVERAGE) / len(looks)
    console.start(float(given.measurements * len(LOADS)))
    try:
        for load in LOADS:
            found: dict[str, list[tuple[float, float | None, float | None]]] = {}
            seconds, counts, started = list[float](), list[int](), time.monotonic()
            for number in range(given.measurements):
                due = started + number * 60.0 * given.minutes / max(1, given.measurements - 1)
                time.sleep(max(0.0, due - time.monotonic()))
                began, visits = time.monotonic(), list[dict[str, Any]]()
                with nullcontext() if load == "none" else busy_core(number):
                    for look in looks:
                        while len(visits) < look:
                            visits.append(recorder.visit(methods=not visits))
                        of = visit_interval([ratio_of(visit["copies"][0]) for visit in visits], share)
                        if (of.hi - of.lo) / (2.0 * of.median) <= given.precision:
                            break
                seconds.append(time.monotonic() - began)
                counts.append(len(visits))
                both = {"ours": (of.median, of.lo, of.hi), **other_methods(visits)}
                for method, interval in both.items():
                    found.setdefault(method, []).append(interval)
                console.advance(1.0)
            grand = statistics.median(middle for middle, _, _ in found["ours"])
            for method, intervals in found.items():
                middles = [middle for middle, _, _ in intervals]
                ends = [(lo, hi) for _, lo, hi in intervals if lo is not None and hi is not None]
                row: Row = {"load": load, "method": method, "measurements": len(intervals), "grand_median": grand}
                row |= {
                    "spread": statistics.stdev(map(math.log, middles)),
                    "lowest": min(middles),
                    "highest": max(middles),
                }
                row |= dict.fromkeys(("held", "held_share", "held_lo", "held_hi", "half_width"))
                if ends:
                    held = sum(lo <= grand <= hi for lo, hi in ends)
                    exact = binomtest(held, len(ends)).proportion_ci(0.95)
                    widths = [(hi - lo) / (hi + lo) for lo, hi in ends]
                    row |= {"held": held, "held_share": held / len(ends), "half_width": statistics.median(widths)}
                    row |= {"held_lo": float(exact.low), "held_hi": float(exact.high)}
                row |= {"visits": statistics.mean(counts), "seconds": statistics.median(seconds)}
                rows.append(row)
                held_text = f"{row['held']} of {len(ends)} hold it" if ends else "no interval"
                width = f", half-width {row['half_width']:.1%}" if ends else ""
                console.line(f"load: {load}  {method:<22} {held_text}{width}, {min(middles):.3f} to {max(middles):.3f}")
            if given.measured is not None:
                ours = [dict(zip(("ratio", "lo", "hi"), each, strict=True)) for each in found["ours"]]
                write_table(given.measured.with_stem(f"{given.measured.stem}-{LOADS.index(load)}"), ours, load=load)
    finally:
        console.stop()
        recorder.close()
    write_timings(given, rows, "batch", "img_size", "minutes", "threads")
    return {"rows": len(rows), "held": rows[0]["held_share"], "half_width": rows[0]["half_width"]}


# Variance by level


def measure_variance(given: argparse.Namespace) -> dict[str, Any]:
    """Record processes of each way in turn, print and write a row for each way."""
    check_at_least(given, rounds=2, processes=2, blocks=2)
    ways = [
        (threads, keep, fresh) for threads in given.way_threads for keep in (False, True) for fresh in (True, False)
    ]
    recorders = {threads: Recorder(given, ("5M", "21M"), threads) for threads in given.way_threads}
    console, rows = Console(stream=sys.stderr), list[Row]()
    console.start(float(len(ways) * given.rounds * given.processes))
    recorded: dict[tuple[int, bool, bool], list[list[list[Floats]]]] = {way: [] for way in ways}
    try:
        for _ in range(given.rounds):
            for minute in recorded.values():
                minute.append([])
            for _ in range(given.processes):
                for way in ways:
                    threads, keep, fresh = way
                    found = recorders[threads].visit(fresh=fresh, keep=keep, copies=2)
                    recorded[way][-1].append([np.log([b / a for a, b in copy]) for copy in found["copies"]])
                    console.advance(1.0)
    finally:
        console.stop()
        for recorder in recorders.values():
            recorder.close()
    for (threads, keep, fresh), held in recorded.items():
        every = [float(np.median(copy)) for minute in held for process in minute for copy in process]
        row: Row = {"threads": threads, "freed_memory": "kept" if keep else "given back"}
        row |= {"process": "fresh" if fresh else "forked", "processes": given.rounds * given.processes}
        row |= {"ratio": math.exp(statistics.median(every)), **spread_by_level(held)}
        rows.append(row)
        line = "{threads} threads, freed memory {freed_memory}, {process} processes: ratio {ratio:.3f}; blocks vary by "
        line += "{block_sd:.1%}, copies {copy_sd:.1%}, processes {process_sd:.1%}, minutes {minute_sd:.1%}"
        print(line.format(**row))
    write_timings(given, rows, "batch", "img_size")
    return {"rows": len(rows)}


# Simulated coverage


def measure_coverage(given: argparse.Namespace) -> dict[str, Any]:
    """Simulate, print and write a row for each noise and number of visits."""
    rows: list[Row] = []
    for visits, most in ((4, 4), (4, 8), (6, 24)):
        for row in simulate(visits, most, given.trials, given.random_seed):
            rows.append(row)
            line = "{visits:>2} to {max_visits:<2} visits  {noise:<18} coverage {coverage:.1%}  wrong {wrong:.1%}"
            print(line.format(**row) + f"  half-width {row['half_width']:.1%}", flush=True)
    if given.out is not None:
        write_table(given.out, rows)
    return {"rows": len(rows), "least_coverage": min(row["coverage"] for row in rows)}


# Errors of the gate


def gate_row(load: str, bound: float, found: Sequence[tuple[str, int, float]]) -> Row:
    """Summarise the trials (verdict, visits, seconds) against one bound; the true ratio is 1.

    `errors` are the share of passes above 1, of fails below; `error_hi` is the upper end of its exact one-sided 95 %
    interval. `undecided` are trials that the limit of visits ended.
    """
    from scipy.stats import binomtest

    n, verdicts = len(found), [outcome for outcome, _, _ in found]
    passed, failed = verdicts.count("pass"), verdicts.count("fail")
    wrong = passed if bound > 1.0 else failed
    upper = binomtest(wrong, n, alternative="less").proportion_ci(0.95).high
    row: Row = {"load": load, "bound": bound, "trials": n, "passed": passed, "failed": failed}
    row |= {"undecided": verdicts.count("undecided"), "errors": wrong / n, "error_hi": float(upper)}
    row |= {"visits": statistics.mean(v for _, v, _ in found), "seconds": statistics.mean(s for _, _, s in found)}
    return row


def measure_gate(given: argparse.Namespace) -> dict[str, Any]:
    """Decide live trials, print and write the rows."""
    check_at_least(given, visits=4, max_visits=given.visits)
    looks, rows = planned_looks(given.visits, given.max_visits), list[Row]()
    share = 1.0 - (1.0 - COVERAGE) / len(looks)
    recorder, console = Recorder(given, (given.arch, given.arch), given.threads), Console(stream=sys.stderr)
    console.start(float(len(BOUNDS) * (given.live + given.live_loaded)))
    try:
        for load, trials in zip(LOADS, (given.live, given.live_loaded), strict=True):
            for bound in BOUNDS if trials else ():
                found = []
                for number in range(trials):
                    started, ratios, outcome = time.monotonic(), list[float](), "undecided"
                    with nullcontext() if load == "none" else busy_core(number):
                        for look in looks:
                            while len(ratios) < look:
                                ratios.append(ratio_of(recorder.visit()["copies"][0]))
                            of = visit_interval(ratios, share)
                            outcome = verdict(of.lo, of.hi, bound)
                            if outcome != "undecided":
                                break
                    found.append((outcome, len(ratios), time.monotonic() - started))
                    console.advance(1.0)
                rows.append(gate_row(load, bound, found))
                line = "load: {load:<22} bound {bound}: {errors:.1%} wrong (below {error_hi:.1%}), "
                line += "{undecided} of {trials} undecided, {visits:.1f} visits, {seconds:.0f} s"
                console.line(line.format(**rows[-1]))
    finally:
        console.stop()
        recorder.close()
    write_timings(given, rows, "arch", "img_size", "batch", "threads")
    return {"rows": len(rows), "worst": max(row["errors"] for row in rows)}


# Predictions


def compare_orders(paces: Floats, scores: dict[str, Floats], name: str) -> list[Row]:
    """Return a row for each way to order the networks, on the same resamples of them.

    `tau` is Kendall's, with measured throughput; intervals are 95 % of a bootstrap over networks. `median_error` and
    `error_95` are of |predicted / measured - 1|; `ahead` is tau less that of the best of parameters and MACs.
    """
    taus = {by: resampled(score, paces, RESAMPLES, 0) for by, score in scores.items()}
    plain = {by: kendall(score, paces) for by, score in scores.items()}
    costs = [by for by in scores if by not in MODELS]
    rows = []
    for by, score in scores.items():
        lo, hi = np.percentile(taus[by], [2.5, 97.5])
        row: Row = {"range": name, "by": by, "networks": len(paces), "tau": plain[by]}
        row |= {"tau_lo": float(lo), "tau_hi": float(hi)}
        row |= dict.fromkeys(("median_error", "error_95", "ahead", "ahead_lo", "ahead_hi"))
        if by in MODELS:
            error = np.abs(score / paces - 1.0)
            row["median_error"], row["error_95"] = map(float, np.percentile(error, [50, 95]))
            row["ahead"] = plain[by] - max(plain[cost] for cost in costs)
            over = taus[by] - np.max([taus[cost] for cost in costs], axis=0)
            row["ahead_lo"], row["ahead_hi"] = map(float, np.percentile(over, [2.5, 97.5]))
        rows.append(row)
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
    metric = "speedup" if all(row.measured.ratio is not None for row in rows) else "images_per_s"
    paces = np.array([row.measured.interval(metric)[0] for row in rows])
    terms = terms_of(family, archs, ctx)
    scores = {name: 1.0 / held_out(fit, terms, 1.0 / paces) for name, fit in MODELS.items()}
    params = np.array([family.count_params(arch, ctx) for arch in archs], dtype=float)
    scores["parameters"] = -params
    scores["MACs"] = -np.array([family.count_macs(arch, ctx) for arch in archs], dtype=float)
    found = compare_orders(paces, scores, "whole range")
    inside = (params >= 0.9 * band) & (params <= 1.1 * band)
    if inside.sum() >= 10:
        within = {by: score[inside] for by, score in scores.items()}
        found += compare_orders(paces[inside], within, f"{band / 1e6:g}M +-10 %")
    for row in found:
        line = "{range:<14} {by:<16} {networks:>4} networks  tau {tau:.3f} [{tau_lo:.3f}, {tau_hi:.3f}]"
        if row["ahead"] is not None:
            line += "  error {median_error:.1%}, 95 % below {error_95:.1%}"
            line += "  ahead {ahead:+.3f} [{ahead_lo:+.3f}, {ahead_hi:+.3f}]"
        print(line.format(**row))
    if given.out is not None:
        write_table(given.out, found, fingerprint=fingerprint, device=rows[0].on_device_name)
    models = [r for r in found if r["by"] in MODELS and r["range"] == "whole range"]
    best = max(models, key=lambda row: row["tau"])
    return {"rows": len(found), "best": best["by"], "tau": round(best["tau"], 4)}


# Command line


def build_parser() -> Parser:
    """Return the parser."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("python -m benchmarks.timing", description=__doc__, formatter_class=raw)
    parts = parser.add_subparsers(dest="part", required=True)

    def part(
        name: str, work: Callable[[argparse.Namespace], dict[str, Any]], *, size: int = 96, batch: int = 8
    ) -> Callable[..., Any]:
        sub = parts.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(work=work)
        sub.add_argument("--out", type=Path, metavar="FILE", help="the table, as CSV")
        sub.add_argument("--random-seed", type=int, default=0, metavar="N", help="of what is drawn")
        if size:
            sub.add_argument("--img-size", type=int, default=size, metavar="PX", help="pixels")
            sub.add_argument("--batch", type=int, default=batch, metavar="N", help="images")
            sub.add_argument("--threads", type=int, default=2, metavar="N", help="of a process")
            sub.add_argument("--blocks", type=int, default=6, metavar="N", help="of both networks in a visit")
        return sub.add_argument

    def visits(add: Callable[..., Any], most: int) -> None:
        add("--visits", type=int, default=4, metavar="N", help="at least")
        add("--max-visits", type=int, default=most, metavar="N", help="at most")

    add = part("repeat", measure_repeat, size=48)
    visits(add, 8)
    add("--precision", type=float, default=0.03, metavar="SHARE", help="asked half width")
    add("--measurements", type=int, default=20, metavar="N", help="with each load")
    add("--minutes", type=float, default=40.0, metavar="N", help="over which they are spread, with each load")
    add("--measured", type=Path, metavar="FILE", help="the measurements themselves, as CSV")
    add = part("variance", measure_variance)
    add("--rounds", type=int, default=2, metavar="N", help="some minutes apart")
    add("--processes", type=int, default=4, metavar="N", help="of each way in a round")
    add("--way-threads", type=int, nargs="+", default=[1, 2], metavar="N", help="threads of the ways")
    add = part("coverage", measure_coverage, size=0)
    add("--trials", type=int, default=4000, metavar="N", help="of each noise")
    add = part("gate", measure_gate, size=48, batch=4)
    visits(add, 8)
    add("--arch", default="5M", help="compared with its own copy")
    add("--live", type=int, default=30, metavar="N", help="trials a bound")
    add("--live-loaded", type=int, default=15, metavar="N", help="beside the load")
    add = part("predictor", measure_predictor, size=0)
    add("table", type=Path, metavar="TABLE", help="the CSV of measured networks")
    add("--band", default="5.4M", metavar="N", help="parameters")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure one part; the last line is JSON. Exit status 0, 2 on bad input."""
    return run_command(build_parser(), lambda given: given.work(given), argv)


if __name__ == "__main__":
    sys.exit(main())
