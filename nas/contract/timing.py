"""A run's timings: measured now, taken from a cache, or read from a device table."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nas.core.config import RunConfig
from nas.core.progress import Console
from nas.core.requirement import Requirement, Setting
from nas.jobs.job import Job, Result
from nas.measure import jobs
from nas.measure.device_table import DeviceTable
from nas.measure.fingerprint import Fingerprint
from nas.measure.intervals import planned_looks
from nas.measure.jobs import GROUP, ExportJob, MemoryJob, NetworkSpec, VisitJob
from nas.measure.measurement import Measurement, calmest, combined
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
        self.kept = MeasurementCache(self.cache / "visits")
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
        visits: int | None = None,
    ) -> Measurement | Result:
        """Time an arch until the requirements are decided or `--max-visits` is reached; see `measure_together`."""
        options: dict[str, Any] = {"reference": reference, "setting": setting}
        for look in self.looks if visits is None else [visits]:
            found = self.measure_together([arch], role, requirements=[requirements], visits=look, **options)[0]
            if isinstance(found, Result) or found.meets(requirements) != "undecided":
                break
        return found

    def measure_together(
        self,
        archs: Sequence[Arch],
        role: str,
        *,
        reference: Arch | None,
        requirements: Sequence[Sequence[Requirement]] = (),
        setting: Setting | None = None,
        visits: int | None = None,
    ) -> list[Measurement | Result]:
        """Bring archs to a number of visits (`--visits`), and return their measurements in order.

        A visit is one fresh process, in which all archs that lack one are interleaved with the reference. `setting` is
        the run's primary one unless it is given. Visits in `measurements.csv`, and for roles other than `final` those
        of earlier runs, count. A visit is in `measurements.csv` before it is used. A failure (out of memory, say) is
        returned as the failed `Result`. Under the setting of a device table, nothing is timed.
        """
        setting = self.primary if setting is None else setting
        if self.table is not None and setting == self.table.setting:
            self.console.advance(MEASURE_COST * len(archs))
            return [self.table.measurement(arch, final=role == "final") for arch in archs]
        keys = [self._measurement_key(arch, role, reference, setting) for arch in archs]
        new = {key for key in keys if key not in self.asked}
        self.asked |= new
        self.console.advance(MEASURE_COST * len(new))
        of = {key.arch_key: arch for key, arch in zip(keys, archs, strict=True)}
        failed: dict[MeasurementKey, Result] = {}
        visits = self.looks[0] if visits is None else visits
        while due := [k for k in dict.fromkeys(keys) if k not in failed and self._lacks(k, visits)]:
            group = due[:GROUP]
            result = self._visit([of[key.arch_key] for key in group], group, reference, setting)
            for key, outcome in zip(group, result, strict=True):
                # What fails beside others may have room alone.
                if isinstance(outcome, Result) and len(group) > 1:
                    outcome = self._visit([of[key.arch_key]], [key], reference, setting)[0]
                if isinstance(outcome, Result):
                    failed[key] = outcome
                    continue
                label = self.family.label(of[key.arch_key])
                row = MeasurementRow(role, key.arch_key, label, key.reference_key, outcome)
                self.rows.append(row)
                self.kept.add(row)
        weighed = requirements or [()] * len(archs)
        return [failed.get(key) or self._found(key, of[key.arch_key], w) for key, w in zip(keys, weighed, strict=True)]

    @property
    def looks(self) -> list[int]:
        """The counts of visits at which an undecided requirement is looked at."""
        return planned_looks(self.config.visits, self.config.max_visits)

    def _found(self, key: MeasurementKey, arch: Arch, requirements: Sequence[Requirement]) -> Measurement | Result:
        """Return a key's visits as one measurement, weighed where a requirement bounds memory."""
        found = combined(calmest(self._visits(key), self.looks[0]), len(self.looks))
        weigh = next((r for r in requirements if r.metric == "peak_mem_mb"), None)
        if weigh is None or weigh.setting is None:
            return found
        memory = replace(key, role=f"{key.role}-memory")
        known = self._visits(memory)
        if not known:
            weighed = self._measure_memory(f"{key.role}-{key.arch_key}", arch, weigh.setting)
            if not weighed.ok:
                return weighed
            last = self.rows.find(key)[-1]
            row = replace(last, role=memory.role, measurement=replace(last.measurement, **weighed.values))
            self.rows.append(row)
            self.kept.add(row)
            known = [row.measurement]
        return replace(found, peak_mem_bytes=known[-1].peak_mem_bytes)

    def _visit(
        self, archs: Sequence[Arch], keys: Sequence[MeasurementKey], reference: Arch | None, setting: Setting
    ) -> list[Measurement | Result]:
        """Make one visit; where it fails as a whole, every arch failed."""
        job = VisitJob(
            networks=tuple(self._network(arch) for arch in archs),
            reference=None if reference is None else self._network(reference),
            context=self.context,
            setting=setting,
            random_seed=self.config.random_seed,
        )
        first = keys[0]
        name = f"{first.role}-{first.arch_key}{f'-and-{len(keys) - 1}' if len(keys) > 1 else ''}"
        result = self.do(Job(jobs.visit, job, f"{name}-v{len(self._visits(first)) + 1}", timed=True, forked=True))
        if not result.ok:
            return [result for _ in keys]
        found: list[Measurement | Result] = []
        for values in result.values["visits"]:
            if "reason" in values:
                found.append(Result(result.key, False, {}, values["reason"], result.seconds))
                continue
            measured = Measurement.from_dict(values)
            if measured.fingerprint != first.fingerprint:
                raise InputError(
                    f"{setting.device}: the device or its software changed during the run, from "
                    f"{first.fingerprint} to {measured.fingerprint}; start a new run"
                )
            found.append(measured)
        return found

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

    def _visits(self, key: MeasurementKey) -> list[Measurement]:
        """Return the visits of this run's table; where there are none, those of earlier runs are added to it first."""
        rows = self.rows.find(key)
        if not rows and self.config.measurement_cache and key.role != "final":
            rows = self.kept.find(key)
            for row in rows:
                self.rows.append(row)
            self.reused += bool(rows)
        return [row.measurement for row in rows]

    def _lacks(self, key: MeasurementKey, visits: int) -> bool:
        """Return whether a key lacks visits; disturbed ones are made again, up to twice as many in all."""
        made = self._visits(key)
        return len(made) < 2 * visits and sum(not visit.disturbed for visit in made) < visits

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


def interval_text(measured: Measurement, metric: str) -> str:
    """Write a measured value with its interval: `1.93 [1.90, 1.97]x the seed`."""
    value, lo, hi = measured.interval(metric)
    digits = 3 if metric == "speedup" else 1
    unit = UNITS.get(metric, " ms")
    if lo == hi or hi == math.inf:
        return f"{value:.{digits}f}{unit}"
    return f"{value:.{digits}f} [{lo:.{digits}f}, {hi:.{digits}f}]{unit}"


def verdict_text(measured: Measurement, required: Requirement) -> str:
    """Write a requirement with its verdict and what was measured."""
    verdict = measured.verdict_of(required)
    return f"{required.text}: {verdict} at {interval_text(measured, required.metric)}"
