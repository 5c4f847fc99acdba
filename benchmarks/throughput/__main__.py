"""Measure networks on this device: `python -m benchmarks.throughput --arch 5M 11M 21M`.

Every network is timed in several fresh processes (visits), in blocks that alternate with a reference's, under each
asked combination of runtime, dtype, batch and resolution; what is out of memory, not installed or otherwise fails is a
row too. Latency is that of batch 1, peak memory that of a process that does nothing else. Writes `--out` (CSV), a
figure beside it, and ends with one line of JSON.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.throughput.flags import ThroughputPlan, parse_flags, plan_of
from benchmarks.throughput.networks import Net
from nas.core.class_match import match_head
from nas.core.cli import default_cache, exit_status
from nas.core.progress import Console, Tick
from nas.core.requirement import Setting
from nas.jobs.job import Job, Result, Values
from nas.jobs.local import LocalExecutor
from nas.measure import jobs
from nas.measure.device_table import FAILED, OK, DeviceRow, fingerprint_columns, read_rows, write_rows
from nas.measure.fingerprint import Fingerprint
from nas.measure.interleave import TimingPlan
from nas.measure.intervals import planned_looks
from nas.measure.jobs import GROUP, AccuracyJob, CountJob, ExportJob, FingerprintJob, MemoryJob, NetworkJob, VisitJob
from nas.measure.measurement import Measurement, Throughput, combined
from nas.measure.runtimes import check_setting, find_runtime
from space import Context
from space.errors import InputError, refuse

A = TypeVar("A")

HEADING = (
    f"{'arch':<30} {'runtime':<16} {'dtype':<8} {'batch':>4} {'px':>4}  images/s [interval]  x reference [interval]  "
    "latency p50/p90/p99 at batch 1  peak memory  parameters  MACs"
)


class DeviceBenchmark:
    """Measures networks in one worker process; caches the fingerprints of the devices."""

    def __init__(self, plan: ThroughputPlan, console: Console) -> None:
        self.plan, self.config, self.console = plan, plan.config, console
        self._worker, self._visits = (LocalExecutor(threads=plan.threads) for _ in range(2))
        self._devices: dict[str, Fingerprint] = {}
        self._datasets: dict[int, Path] = {}

    def close(self) -> None:
        """End the workers."""
        self._worker.close()
        self._visits.close()

    def do(self, function: Callable[[A, Tick], Values], key: str, argument: A, *, fresh: bool = False) -> Result:
        """Run a job, in a process of its own if `fresh`; a failure is a result."""
        self.console.describe(key)
        job = Job(function, argument, re.sub(r"[^\w.-]", "_", key)[:80], timed=True, forked=function is jobs.visit)
        if not fresh:
            worker = self._visits if job.forked else self._worker
            return worker.run(job, heartbeat=self.console.refresh)
        with LocalExecutor(threads=self.plan.threads) as worker:
            return worker.run(job, heartbeat=self.console.refresh)

    def device(self, name: str) -> Fingerprint:
        """Return the fingerprint of a device; one that is not there is refused."""
        if name not in self._devices:
            found = self.do(jobs.fingerprint, f"look at {name}", FingerprintJob(device=name))
            if not found.ok:
                refused = found.values.get("input_error")
                raise InputError(found.reason if refused else f"--device: {name} does not work here: {found.reason}")
            self._devices[name] = Fingerprint.from_dict(found.values["fingerprint"])
        return self._devices[name]

    def rows(self, nets: Sequence[Net], known: Sequence[DeviceRow]) -> Iterator[DeviceRow]:
        """Measure every network under every setting, in the order asked; `known` rows are kept."""
        done = {row.conditions: row for row in known}
        for size in self.plan.sizes:
            ctx = Context(img_size=size, num_classes=self.config.num_classes)
            for setting in self.plan.settings:
                for first in range(0, len(nets), GROUP):
                    group = nets[first : first + GROUP]
                    empties = [self._empty(net, ctx, setting) for net in group]
                    held = [None if self.plan.auto else done.get(empty.conditions) for empty in empties]
                    timed = self._timed([n for n, h in zip(group, held, strict=True) if h is None], ctx, setting)
                    for net, row, empty in zip(group, held, empties, strict=True):
                        yield row or self._row(net, ctx, setting, empty, timed)
                        self.console.advance(1.0)

    def _timed(self, nets: Sequence[Net], ctx: Context, setting: Setting) -> dict[str, Throughput | Result]:
        """Time networks in the same visits, by name; none where each has its own batch, or nothing can run."""
        try:
            check_setting(setting)
        except InputError:
            return {}
        if self.plan.auto or not nets:
            return {}
        found = self._visited(nets, ctx, setting)
        # What fails beside others may have room alone.
        for net in nets if len(nets) > 1 else ():
            if isinstance(found[net.name], Result):
                found |= self._visited([net], ctx, setting)
        return found

    def _visited(self, nets: Sequence[Net], ctx: Context, setting: Setting) -> dict[str, Throughput | Result]:
        visits: dict[str, list[Measurement]] = {net.name: [] for net in nets}
        looks = planned_looks(
            self.config.visits, self.config.max_visits if self.config.precision else self.config.visits
        )
        found: dict[str, Throughput | Result] = {}
        for look in looks:
            due = [net for net in nets if net.name not in found]
            while due := [net for net in due if net.name not in found and len(visits[net.name]) < look]:
                name = f"{due[0].name} and {len(due) - 1} more {setting.text}"
                result = self.do(jobs.visit, name, self._visit_job(due, ctx, setting))
                for at, net in enumerate(due):
                    values = result.values["visits"][at] if result.ok else {"reason": result.reason}
                    if result.ok and "reason" not in values:
                        visits[net.name].append(Measurement.from_dict(values))
                    else:
                        found[net.name] = replace(result, ok=False, reason=values["reason"])
            for net in nets:
                if net.name not in found:
                    timed = combined(visits[net.name], len(looks))
                    if timed.half_width <= self.config.precision or look == looks[-1]:
                        found[net.name] = timed.throughput
        return found

    def _row(
        self, net: Net, ctx: Context, setting: Setting, empty: DeviceRow, known: Mapping[str, Throughput | Result]
    ) -> DeviceRow:
        try:
            check_setting(setting)
        except InputError as error:  # not installed, or not for this device or dtype
            return replace(empty, reason=str(error))
        if self.plan.auto:
            job = NetworkJob(network=net.spec(ctx), context=ctx, setting=setting)
            batch = self.do(jobs.fastest_batch, f"{net.name} batch", job)
            if not batch.ok:
                return self._failed(empty, batch)
            setting = replace(setting, batch=batch.values["batch"])
            empty = self._empty(net, ctx, setting)
            known = self._visited([net], ctx, setting)
        found = known[net.name]
        if isinstance(found, Result):
            return self._failed(empty, found)
        timed, timing = found, self._visit_job([net], ctx, setting)
        alone, passes = self._latency(net, timing, timed)
        timed = timed.with_latency(alone)
        if self.config.memory:
            timed = replace(timed, peak_mem_bytes=self._peak_memory(net, timing))
        more: dict[str, Any] = net.counts(ctx) or {}
        if not more:
            counted = self.do(jobs.count, f"{net.name} counts", CountJob(network=net.spec(ctx), context=ctx))
            more = dict(counted.values) if counted.ok else {}
        if net.trained(ctx) and self.config.accuracy_data is not None:
            more |= self._accuracy(net, timing)
            timed = replace(timed, done=more.pop("done", timed.done))
        return replace(empty, state=OK, throughput=timed, latency_passes=passes, **more)

    def _empty(self, net: Net, ctx: Context, setting: Setting) -> DeviceRow:
        version = find_runtime(setting.runtime).version()
        on = self.device(setting.device).under(setting, version, ctx.img_size)
        reference = self.plan.reference
        return DeviceRow(
            **net.columns(ctx),
            setting=setting,
            threads=self.plan.threads,
            state=FAILED,
            reference="" if reference is None else f"{reference.name}@{self._beside(setting).text}",
            **fingerprint_columns(on),
        )

    def _beside(self, setting: Setting) -> Setting:
        """Return the setting of the reference."""
        named = self.config.reference_runtime
        return setting if named is None else replace(setting, runtime=named, dtype="float32")

    def _visit_job(self, nets: Sequence[Net], ctx: Context, setting: Setting) -> VisitJob:
        reference = self.plan.reference
        return VisitJob(
            networks=tuple(net.spec(ctx) for net in nets),
            reference=None if reference is None else reference.spec(ctx),
            context=ctx,
            setting=setting,
            reference_setting=self._beside(setting),
            random_seed=self.config.random_seed,
        )

    def _failed(self, empty: DeviceRow, result: Result) -> DeviceRow:
        if result.values.get("input_error"):
            raise InputError(result.reason)
        return replace(empty, reason=result.reason or "failed")

    def _latency(self, net: Net, timing: VisitJob, throughput: Throughput) -> tuple[Throughput | None, int | None]:
        """Measure the latencies at batch 1; also returns the passes, at least as many as asked."""
        least, visits = self.config.latency_passes, self.config.visits
        if least == 0:
            return None, None
        if timing.setting.batch == 1 and throughput.passes >= least:
            return throughput, throughput.passes
        plan = TimingPlan()
        alone = replace(
            timing,
            setting=replace(timing.setting, batch=1),
            reference=None,
            reference_setting=None,
            plan=replace(plan, min_passes=-(-least // (visits * plan.blocks))),
        )
        found = [self.do(jobs.visit, f"{net.name} latency", alone) for _ in range(visits)]
        if not all(each.ok and "reason" not in each.values["visits"][0] for each in found):
            return None, None
        measured = combined([Measurement.from_dict(each.values["visits"][0]) for each in found])
        return measured, measured.passes

    def _peak_memory(self, net: Net, timing: VisitJob) -> int | None:
        """Return the peak memory of a process that only loads and runs the net."""
        same: dict[str, Any] = {name: getattr(timing, name) for name in ("context", "setting", "random_seed")}
        same["network"] = timing.networks[0]
        with tempfile.TemporaryDirectory(prefix="weigh-") as folder:
            exported = self.do(jobs.export_model, f"{net.name} export", ExportJob(**same, out=Path(folder)))
            if not exported.ok:
                return None
            job = MemoryJob(**same, folder=Path(folder), file=exported.values["file"])
            weighed = self.do(jobs.peak_memory, f"{net.name} memory", job, fresh=True)
        return weighed.values["peak_mem_bytes"] if weighed.ok else None

    def match_data(self, net: Net, ctx: Context) -> tuple[Path, tuple[int, ...]]:
        """Read `--accuracy-data` and match its classes to a net's; its folder, and the output of each class."""
        from nas.data import DataSpec, open_dataset
        from nas.data.prepare import prepared

        size, classes = ctx.img_size, ctx.num_classes
        if size not in self._datasets:
            spec = DataSpec.of(self.config, 0, data=str(self.config.accuracy_data), img_size=size)
            self._datasets[size] = prepared(spec, default_cache(), self.console).folder
        names = open_dataset(self._datasets[size]).classes
        match = match_head(net, classes, names)
        if match.fresh or not match.kept:
            odd = f", of which the net has no {match.fresh[0]!r}" if match.fresh else ""
            got, remedy = f"{len(names)} classes{odd}", "name the data that it was trained on"
            raise refuse("--accuracy-data", got, f"classes of the {classes} of {net.name}", remedy)
        return self._datasets[size], match.rows

    def _accuracy(self, net: Net, timing: VisitJob) -> dict[str, Any]:
        dataset, rows = self.match_data(net, timing.context)
        same: dict[str, Any] = {"context": timing.context, "setting": timing.setting}
        job = AccuracyJob(**same, network=timing.networks[0], dataset=dataset, class_rows=rows)
        found = self.do(jobs.accuracy, f"{net.name} accuracy", job)
        if not found.ok:
            return {"reason": f"no accuracy: {found.reason}"}
        return {name: found.values[name] for name in ("top1", "top1_se", "eager_top1", "agreement", "test_n", "done")}


def throughput(nets: Sequence[Net], plan: ThroughputPlan, console: Console) -> list[DeviceRow]:
    """Measure networks and return a row each; a table at `--out` is there after every row.

    With `--resume`, rows that it holds already are taken over; without, an existing one is refused. Raises InputError.
    """
    known: list[DeviceRow] = []
    out = None if plan.config.out is None else Path(plan.config.out)
    if out is not None:
        if out.is_dir() or not out.parent.is_dir():
            raise refuse("--out", out, "a file in an existing folder")
        if out.exists():
            if not plan.config.resume:
                remedy = "continue it with --resume, or name another file"
                raise refuse("--out", f"{out}, which exists", "a new file", remedy)
            known = read_rows(out, "--out")
    bench = DeviceBenchmark(plan, console)
    rows: list[DeviceRow] = []
    try:
        for setting in plan.settings:
            bench.device(setting.device)
        for ctx in (Context(size, plan.config.num_classes) for size in plan.sizes):
            for net in nets if plan.config.accuracy_data is not None else ():
                if net.trained(ctx):
                    bench.match_data(net, ctx)
        console.line(HEADING)
        console.start(float(len(nets) * len(plan.settings) * len(plan.sizes)))
        for row in bench.rows(nets, known):
            rows.append(row)
            console.line(row_line(row))
            if out is not None:
                write_rows(out, rows)
    finally:
        console.stop()
        bench.close()
    return rows


def row_line(row: DeviceRow) -> str:
    """Write a row as a line for the terminal."""
    name, at = row.arch if len(row.arch) <= 28 else row.key, row.setting
    head = f"{name[:44]:<30} {at.runtime:<16} {at.dtype:<8} {at.batch:>4} {row.img_size:>4}"
    if row.state == FAILED:
        return f"{head}  failed: {row.reason}"
    of, parts = row.measured, [head]
    parts.append(f"{of.images_per_s:9.1f} [{of.images_per_s_lo:.1f}, {of.images_per_s_hi:.1f}]")
    if of.ratio is not None:
        parts.append(f"{of.ratio:6.3f} [{of.ratio_lo:.3f}, {of.ratio_hi:.3f}]")
    if of.latency_ms_p50 is not None:
        parts.append(f"{of.latency_ms_p50:.1f}/{of.latency_ms_p90:.1f}/{of.latency_ms_p99:.1f} ms")
    if of.peak_mem_bytes is not None:
        parts.append(f"{of.peak_mem_bytes / 1e6:.0f} MB")
    if row.params is not None:
        parts.append(f"{row.params / 1e6:.2f}M")
    if row.macs is not None:
        parts.append(f"{row.macs / 1e9:.3f} GMACs")
    if row.top1 is not None:
        parts.append(f"top-1 {row.top1:.1%} (eager {row.eager_top1:.1%})")
    if of.agrees == 0:
        parts.append(f"DIFFERS from eager by {of.parity:.1e} of the largest logit")
    if of.disturbed:
        parts.append(f"disturbed: {of.disturbed}")
    return "  ".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, report; the last line is JSON."""
    given = parse_flags(argv, __doc__)

    def work() -> int:
        nets, plan = plan_of(given)
        config, console = plan.config, Console(quiet=plan.config.quiet)
        if config.bundle is not None:
            from benchmarks.throughput.bundle import write_bundle

            print(json.dumps(write_bundle(Path(config.bundle), nets, plan, console)))
            return 0
        rows = throughput(nets, plan, console)
        figure = config.figure or (config.out and str(Path(config.out).with_suffix(".png")))
        if figure and any(row.state == OK for row in rows):
            from benchmarks.throughput.figure import draw_rows

            draw_rows(rows, Path(figure), found={net.name for net in nets if net.found})
        summary = {
            "rows": len(rows),
            "failed": sum(row.state == FAILED for row in rows),
            "fingerprints": sorted({row.fingerprint for row in rows}),
            "out": config.out,
            "figure": figure,
        }
        print(json.dumps(summary))
        return 0

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
