"""Measure networks on this device: `python -m benchmarks.throughput --arch 5M 11M 21M`.

Every network is timed in blocks that alternate with a reference's, under each asked combination of runtime, dtype,
batch and resolution; what is out of memory, not installed or otherwise fails is a row too. Latency is that of batch 1,
peak memory that of a process that does nothing else. Writes `--out` (CSV), a figure beside it, and ends with one line
of JSON.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
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
from nas.measure.interleave import Bounds, TimingPlan
from nas.measure.jobs import AccuracyJob, CountJob, ExportJob, FingerprintJob, MemoryJob, NetworkJob, TimingJob
from nas.measure.measurement import Measurement, Throughput
from nas.measure.runtimes import check_setting, find_runtime
from space import Context
from space.errors import InputError, refuse

A = TypeVar("A")

LATENCY_BLOCKS = 10
HEADING = (
    f"{'arch':<30} {'runtime':<16} {'dtype':<8} {'batch':>4} {'px':>4}  images/s [interval]  x reference [interval]  "
    "latency p50/p90/p99 at batch 1  peak memory  parameters  MACs"
)


class DeviceBenchmark:
    """Measures networks in one worker process; caches the fingerprints of the devices."""

    def __init__(self, plan: ThroughputPlan, console: Console) -> None:
        self.plan, self.config, self.console = plan, plan.config, console
        self._worker = LocalExecutor(threads=plan.threads)
        self._devices: dict[str, Fingerprint] = {}
        self._datasets: dict[int, Path] = {}

    def close(self) -> None:
        """End the worker."""
        self._worker.close()

    def do(self, function: Callable[[A, Tick], Values], key: str, argument: A, *, fresh: bool = False) -> Result:
        """Run a job, in a process of its own if `fresh`; a failure is a result."""
        self.console.describe(key)
        job = Job(function, argument, re.sub(r"[^\w.-]", "_", key)[:80])
        if not fresh:
            return self._worker.run(job, heartbeat=self.console.refresh)
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
                for net in nets:
                    empty = self._empty(net, ctx, setting)
                    held = None if self.plan.auto else done.get(empty.conditions)
                    yield held or self._row(net, ctx, setting, empty)
                    self.console.advance(1.0)

    def _row(self, net: Net, ctx: Context, setting: Setting, empty: DeviceRow) -> DeviceRow:
        try:
            check_setting(setting)
        except InputError as error:  # not installed, or not for this device or dtype
            return replace(empty, reason=str(error))
        if self.plan.auto:
            job = NetworkJob(network=net.spec(ctx), context=ctx, setting=setting)
            found = self.do(jobs.fastest_batch, f"{net.name} batch", job)
            if not found.ok:
                return self._failed(empty, found)
            setting = replace(setting, batch=found.values["batch"])
            empty = self._empty(net, ctx, setting)
        timing = self._timing(net, ctx, setting)
        measured = self.do(jobs.measure, f"{net.name} {setting.text}", timing)
        if not measured.ok:
            return self._failed(empty, measured)
        timed = Measurement.from_dict(measured.values).throughput
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

    def _timing(self, net: Net, ctx: Context, setting: Setting) -> TimingJob:
        config, reference = self.config, self.plan.reference
        return TimingJob(
            network=net.spec(ctx),
            reference=None if reference is None else reference.spec(ctx),
            context=ctx,
            setting=setting,
            reference_setting=self._beside(setting),
            plan=TimingPlan(config.blocks, config.max_blocks, bounds=Bounds(precision=config.precision or None)),
            random_seed=config.random_seed,
        )

    def _failed(self, empty: DeviceRow, result: Result) -> DeviceRow:
        if result.values.get("input_error"):
            raise InputError(result.reason)
        return replace(empty, reason=result.reason or "failed")

    def _latency(self, net: Net, timing: TimingJob, throughput: Throughput) -> tuple[Throughput | None, int | None]:
        """Measure the latencies at batch 1; also returns the passes, at least as many as asked."""
        least, passes = self.config.latency_passes, throughput.passes * throughput.blocks
        if least == 0:
            return None, None
        if timing.setting.batch == 1 and passes >= least:
            return throughput, passes
        alone = replace(
            timing,
            setting=replace(timing.setting, batch=1),
            reference=None,
            reference_setting=None,
            plan=TimingPlan(blocks=LATENCY_BLOCKS, max_blocks=LATENCY_BLOCKS, min_passes=-(-least // LATENCY_BLOCKS)),
        )
        found = self.do(jobs.measure, f"{net.name} latency", alone)
        if not found.ok:
            return None, None
        measured = Measurement.from_dict(found.values)
        return measured, measured.blocks * measured.passes

    def _peak_memory(self, net: Net, timing: TimingJob) -> int | None:
        """Return the peak memory of a process that only loads and runs the net."""
        names = ("network", "context", "setting", "random_seed")
        same: dict[str, Any] = {name: getattr(timing, name) for name in names}
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

    def _accuracy(self, net: Net, timing: TimingJob) -> dict[str, Any]:
        dataset, rows = self.match_data(net, timing.context)
        same = {name: getattr(timing, name) for name in ("network", "context", "setting")}
        job = AccuracyJob(**same, dataset=dataset, class_rows=rows)
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
