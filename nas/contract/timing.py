"""A run's timings: measured now, taken from a cache, or read from a device table."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nas.core.config import RunConfig
from nas.core.progress import Console
from nas.core.requirement import LATENCIES, Requirement, Setting
from nas.jobs.job import Job, Result
from nas.measure import jobs
from nas.measure.device_table import DeviceTable
from nas.measure.fingerprint import Fingerprint
from nas.measure.interleave import Bounds, TimingPlan
from nas.measure.jobs import ExportJob, MemoryJob, NetworkSpec, TimingJob
from nas.measure.measurement import Measurement
from nas.measure.measurement_table import MeasurementCache, MeasurementKey, MeasurementRow, MeasurementTable
from nas.measure.runtimes import find_runtime
from nas.search.constraints import primary_setting, settings_of
from space import Context
from space.errors import InputError, refuse
from space.family import Arch, Family

MEASURE_COST = 250.0
"""A timing's share of the progress bar, in GMACs of training (about 3 s on two cores)."""


UNITS = {"speedup": "x the seed", "images_per_s": " images/s", "peak_mem_mb": " MB"}


@dataclass(kw_only=True)
class Timings:
    """A run's timings: `rows` is its `measurements.csv`, `asked` the keys requested.

    `reused` counts those taken from the cache of earlier runs. `do` does a job (`nas.contract.state.Run.do`).
    """

    config: RunConfig
    family: Family
    context: Context
    folder: Path
    cache: Path
    console: Console
    fingerprints: Mapping[str, Mapping[str, Any]]
    table: DeviceTable | None
    do: Callable[..., Result]

    def __post_init__(self) -> None:
        """Open the run's own table and the cache of all runs."""
        self.primary = primary_setting(self.config)
        self.rows = MeasurementTable(self.folder / "measurements.csv")
        self.kept = MeasurementCache(self.cache / "measurements")
        self.asked: set[MeasurementKey] = set()
        self.reused = 0

    def measure(
        self,
        arch: Arch,
        role: str,
        *,
        reference: Arch | None,
        requirements: Sequence[Requirement] = (),
        setting: Setting | None = None,
        step: int | None = None,
    ) -> Measurement | Result:
        """Time an arch, interleaved with the reference, or take the stored measurement.

        `setting` is the run's primary one unless it is given. A stored measurement that leaves a requirement open is
        made once more for a `step`, unless it was as long as allowed. The measurement is in `measurements.csv` before
        it is returned. A failure (out of memory, say) is returned as the failed `Result`. Under the setting of a device
        table, nothing is timed.
        """
        setting = self.primary if setting is None else setting
        if self.table is not None and setting == self.table.setting:
            self.console.advance(MEASURE_COST)
            return self.table.measurement(arch, final=role == "final")
        weigh = any(r.metric == "peak_mem_mb" for r in requirements)
        asked = self._measurement_key(arch, role, reference, setting)
        self.asked.add(asked)
        roles = [role] if step is None else [f"{role}-s{step}", role]
        for each in roles:
            known = self._known(replace(asked, role=each))
            open_still = known is not None and (
                (weigh and known.peak_mem_bytes is None)
                or (
                    step is not None
                    and each == role
                    and known.blocks < self.config.bench_max_blocks
                    and known.meets(requirements) == "undecided"
                )
            )
            if known is not None and not open_still:
                self.console.advance(MEASURE_COST)
                return known
            if open_still:
                role = roles[0]
        job = TimingJob(
            network=self._network(arch),
            reference=None if reference is None else self._network(reference),
            context=self.context,
            setting=setting,
            plan=TimingPlan(self.config.bench_blocks, self.config.bench_max_blocks, bounds=_bounds(requirements)),
            random_seed=self.config.random_seed,
        )
        name = f"{role}-{asked.arch_key}"
        result = self.do(Job(jobs.measure, job, name, timed=True), cost=MEASURE_COST)
        if not result.ok:
            return result
        measured = Measurement.from_dict(result.values)
        if weigh:
            weighed = self._measure_memory(name, arch, setting)
            if not weighed.ok:
                return weighed
            measured = replace(measured, **weighed.values)
        if measured.fingerprint != asked.fingerprint:
            raise InputError(
                f"{setting.device}: the device or its software changed during the run, from "
                f"{asked.fingerprint} to {measured.fingerprint}; start a new run"
            )
        row = MeasurementRow(role, asked.arch_key, self.family.label(arch), asked.reference_key, measured)
        self.rows.append(row)
        self.kept.add(row)
        return measured

    def import_rows(self, rows: Sequence[MeasurementRow], *, named: bool) -> None:
        """Add another run's measurements that were made under a setting of this run.

        With `named` (the user's `--measurements`), a file without a fitting row is refused.
        """
        own = {
            self.fingerprint_under(setting)
            for setting in settings_of(self.config)
            if self.table is None or setting != self.table.setting
        }
        fitting = [row for row in rows if row.measurement.fingerprint in own]
        # A run that was killed during the import has the first rows, and adds the rest.
        known = list(self.rows.rows)
        if known == fitting[: len(known)]:
            for row in fitting[len(known) :]:
                self.rows.append(row)
        if rows and not fitting and named:
            got = f"{self.config.measurements} without this fingerprint"
            want = f"measurements of {', '.join(sorted(own))}"
            raise refuse("--measurements", got, want, "measure on this device and software")

    def _measure_memory(self, name: str, arch: Arch, setting: Setting) -> Result:
        """Measure a network's peak memory in a fresh process, from the exported file."""
        with tempfile.TemporaryDirectory(prefix="weigh-") as folder:
            what: dict[str, Any] = {
                "network": self._network(arch),
                "context": self.context,
                "setting": setting,
                "random_seed": self.config.random_seed,
            }
            export = ExportJob(**what, out=Path(folder))
            staged = self.do(Job(jobs.export_model, export, f"stage-{name}", timed=True))
            if not staged.ok:
                return staged
            weigh = MemoryJob(**what, folder=Path(folder), file=staged.values["file"])
            return self.do(Job(jobs.peak_memory, weigh, f"memory-{name}", timed=True, fresh=True))

    def _measurement_key(self, arch: Arch, role: str, reference: Arch | None, setting: Setting) -> MeasurementKey:
        context = self.context
        return MeasurementKey(
            role=role,
            arch_key=self.family.key(arch, context),
            reference_key="" if reference is None else self.family.key(reference, context),
            img_size=context.img_size,
            num_classes=context.num_classes,
            in_chans=context.in_chans,
            batch=setting.batch,
            dtype=setting.dtype,
            runtime=setting.runtime,
            fingerprint=self.fingerprint_under(setting),
        )

    def _known(self, key: MeasurementKey) -> Measurement | None:
        """Look a measurement up in this run's table, then in the cache of earlier runs."""
        known = self.rows.find(key)
        if known is None and self.config.measurement_cache:
            cached = self.kept.find(key)
            if cached is not None and cached.measurement.blocks >= self.config.bench_blocks:
                self.rows.append(cached)
                self.reused += 1
                known = cached.measurement
        return known

    def fingerprint_under(self, setting: Setting) -> str:
        """Return the fingerprint id of a number measured under a setting in this run."""
        device = Fingerprint.from_dict(self.fingerprints[setting.device])
        runtime = find_runtime(setting.runtime, "--require")
        return device.under(setting, runtime.version(), self.context.img_size).id

    def predicts(self, setting: Setting, arch: Arch, *, final: bool = False) -> bool:
        """Return whether an arch's throughput under a setting is a prediction."""
        if self.table is None or setting != self.table.setting:
            return False
        return not self.table.exact(arch, final=final)

    def basis(self, arch: Arch, *, final: bool = False) -> str:
        """Return the source of an arch's throughput under the primary setting."""
        if self.table is None or self.primary != self.table.setting:
            return "measured"
        return "predicted" if self.predicts(self.primary, arch, final=final) else "table"

    def _network(self, arch: Arch) -> NetworkSpec:
        return NetworkSpec(family=self.family.name, arch=self.family.to_dict(arch))


def _bounds(requirements: Sequence[Requirement]) -> Bounds:
    """Return the bounds that a timing is to decide."""
    most = {r.metric: r.bound for r in sorted(requirements, key=lambda r: r.bound)}
    latencies = [(LATENCIES[r.metric], r.bound) for r in requirements if r.metric in LATENCIES]
    return Bounds(most.get("speedup"), most.get("images_per_s"), tuple(latencies))


def interval_text(measured: Measurement, metric: str) -> str:
    """Write a measured value with its interval: `1.93 [1.90, 1.97]x the seed`."""
    value, lo, hi = measured.interval(metric)
    digits = 3 if metric == "speedup" else 1
    unit = UNITS.get(metric, " ms")
    if lo == hi:
        return f"{value:.{digits}f}{unit}"
    return f"{value:.{digits}f} [{lo:.{digits}f}, {hi:.{digits}f}]{unit}"


def verdict_text(measured: Measurement, required: Requirement) -> str:
    """Write a requirement with its verdict and what was measured."""
    verdict = measured.verdict_of(required)
    return f"{required.text}: {verdict} at {interval_text(measured, required.metric)}"
