"""Measured networks of a device as a table: files, and answers for `--device-table`; no torch.

Where a network was measured the answer is exact, elsewhere predicted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.core.requirement import Setting
from nas.core.table import read_table, table_columns, write_table
from nas.measure.fingerprint import Fingerprint
from nas.measure.measurement import Measurement, Throughput, measured_under
from space import Context
from space.errors import refuse

if TYPE_CHECKING:
    from space import Arch, Family

OK, FAILED = "ok", "failed"


@dataclass(frozen=True, kw_only=True)
class DeviceRow:
    """One network under one setting on one device; `reason` explains a missing throughput.

    `arch` is as the user gave it; `spec` its factors as JSON, empty for a plain timm model, `key` its name as built at
    `img_size` and `num_classes`. The throughput's ratio is over `reference` (`ARCH@SETTING`), its latencies are at
    batch 1, from `latency_passes` passes. `top1` and `agreement` (with eager float32) are shares of `test_n` test
    images. `on_*` and `fingerprint` identify device and software. An unknown value is None.
    """

    arch: str
    family: str
    key: str
    spec: str
    img_size: int
    num_classes: int
    setting: Setting
    threads: int
    state: str
    reason: str = ""
    throughput: Throughput | None = None
    reference: str = ""
    latency_passes: int | None = None
    params: int | None = None
    macs: int | None = None
    top1: float | None = None
    top1_se: float | None = None
    eager_top1: float | None = None
    agreement: float | None = None
    test_n: int | None = None
    fingerprint: str
    on_device_name: str
    on_physical_cores: int | None = None
    on_logical_cores: int
    on_usable_cpus: float
    on_nominal_mhz: float | None = None
    on_driver: str | None = None
    on_cuda: str | None = None
    on_cudnn: str | None = None
    on_torch: str
    on_timm: str
    on_python: str
    on_os: str
    on_arch: str
    on_runtime_version: str

    def __post_init__(self) -> None:
        """Refuse a row that contradicts itself."""
        if self.state not in (OK, FAILED):
            raise refuse("state", self.state, f"{OK} or {FAILED}")
        if self.state == FAILED:
            return
        if self.throughput is None:
            raise refuse("images_per_s", "nothing", f"a number where the state is {OK}")
        fingerprint_of(self)
        try:
            json.loads(self.spec or "{}")
        except (ValueError, RecursionError):
            raise refuse("spec", self.spec[:60], "an arch's factors as JSON") from None

    @property
    def measured(self) -> Throughput:
        """The throughput, where the state is `OK`."""
        assert self.throughput is not None, f"{self.arch} was not measured: {self.reason}"
        return self.throughput

    @property
    def conditions(self) -> tuple[Any, ...]:
        """What is equal for two rows that measure the same (on the same device)."""
        return (self.arch, self.img_size, self.num_classes, self.setting, self.reference)


COLUMNS = table_columns(DeviceRow)


_ON = [name for name in COLUMNS if name.startswith("on_")]


def fingerprint_columns(of: Fingerprint) -> dict[str, Any]:
    """Return the fields of a row that identify the device and software."""
    return {"fingerprint": of.id, **{name: getattr(of, name.removeprefix("on_")) for name in _ON}}


def fingerprint_of(row: DeviceRow) -> Fingerprint:
    """Rebuild the fingerprint that a row was measured under, and check its id."""
    values = {name.removeprefix("on_"): getattr(row, name) for name in _ON} | vars(row.setting)
    device = row.setting.device.partition(":")[0]
    values |= {"device": device, "threads": row.threads, "img_size": row.img_size, "id": row.fingerprint}
    return Fingerprint.from_dict(values)


def write_rows(path: Path, rows: Sequence[DeviceRow]) -> None:
    """Write the whole table atomically."""
    write_table(path, rows, DeviceRow)


def read_rows(path: Path, flag: str) -> list[DeviceRow]:
    """Read a table; errors name the flag, and the line and column."""
    return read_table(path, DeviceRow, f"{flag} {path}")


def one_fingerprint(rows: Sequence[DeviceRow], where: str) -> str:
    """Return the fingerprint that all rows share; rows of several are refused."""
    found = sorted({row.fingerprint for row in rows if row.state == OK})
    if len(found) != 1:
        raise refuse(
            where,
            f"rows of {len(found)} fingerprints ({', '.join(found[:3])})",
            "those of one device, runtime, dtype, batch and resolution",
            "split the table",
        )
    return found[0]


class DeviceTable:
    """Measurements of one device under one setting, and a predictor fitted to them.

    Of several rows of a network the last one counts. Ratios are to the seed, which must be among the rows. Refuses
    tables of another family, context (`ctx` None: that of the first row) or several fingerprints.
    """

    def __init__(self, paths: Sequence[Path], family: Family, ctx: Context | None, seed: Arch) -> None:
        from nas.measure.predict import fit_predictor

        shown, flag = ", ".join(str(path) for path in paths), "--device-table"
        self.rows = [r for path in paths for r in read_rows(path, flag) if r.state == OK and r.spec]
        if not self.rows:
            raise refuse(flag, f"{shown} without a measured {family.name}", "measured networks")
        self.fingerprint = one_fingerprint(self.rows, shown)
        first = self.rows[0]
        self.shown, self.family, self.setting = shown, family, first.setting
        self.ctx = ctx = Context(first.img_size, first.num_classes) if ctx is None else ctx
        self._rows = {self._key(row, shown): row for row in self.rows}
        self._finalists: dict[str, DeviceRow] = {}
        seed_key = family.key(seed, ctx)
        if seed_key not in self._rows:
            got, want = f"{shown} without the seed {family.label(seed)}", "the seed among its rows"
            raise refuse(flag, got, want, "measure it too: add it to --arch")
        self._seed = self._rows[seed_key]
        archs = [family.arch(json.loads(row.spec)) for row in self._rows.values()]
        self.predictor = fit_predictor(family, ctx, archs, [self._images_per_s(r) for r in self._rows.values()])

    def check_context(self, ctx: Context, row: DeviceRow | None = None, shown: str = "") -> None:
        """Refuse a table, or a row of a file, of another resolution or number of classes than a run's."""
        row = self.rows[0] if row is None else row
        if (row.img_size, row.num_classes) != (ctx.img_size, ctx.num_classes):
            got = f"{shown or self.shown} at {row.img_size} px and {row.num_classes} classes"
            want = f"{ctx.img_size} px and {ctx.num_classes} classes, as this run has"
            remedy = f"measure with --img-size {ctx.img_size} --num-classes {ctx.num_classes}"
            raise refuse("--device-table", got, want, remedy)

    def _key(self, row: DeviceRow, shown: str) -> str:
        """Return the key of a row's network; a row of another space or context is refused."""
        flag, ctx = "--device-table", self.ctx
        if row.family != self.family.name:
            raise refuse(flag, f"{shown} of {row.family}", f"networks of {self.family.name}")
        self.check_context(ctx, row, shown)
        key = self.family.key(self.family.arch(json.loads(row.spec)), ctx)
        if key != row.key:
            raise refuse(flag, f"{shown}: key {row.key}", f"{key}, which its factors give")
        return key

    def add_finalists(self, rows: Sequence[DeviceRow], where: str) -> None:
        """Add the finalists' own rows, measured on the same device later on.

        They count for `final` measurements only: the basis of earlier decisions does not change.
        """
        for row in rows:
            if row.state == OK and row.fingerprint != self.fingerprint:
                remedy = "measure on the device, runtime and batch of --device-table"
                raise refuse(where, f"a row of fingerprint {row.fingerprint}", self.fingerprint, remedy)
            if row.state == OK and row.spec:
                self._finalists[self._key(row, where)] = row

    def _images_per_s(self, row: DeviceRow) -> float:
        # Ratios to one reference cancel what the device went through meanwhile.
        own, seed = row.measured, self._seed.measured
        if own.ratio is None or seed.ratio is None or row.reference != self._seed.reference:
            return own.images_per_s
        return own.ratio / seed.ratio * seed.images_per_s

    def _row(self, arch: Arch, final: bool) -> DeviceRow | None:
        key = self.family.key(arch, self.ctx)
        return (self._finalists.get(key) if final else None) or self._rows.get(key)

    def exact(self, arch: Arch, *, final: bool = False) -> bool:
        """Return whether a network was measured itself."""
        return self._row(arch, final) is not None

    def measurement(self, arch: Arch, *, final: bool = False) -> Measurement:
        """Return a network's throughput on that device: as measured, or predicted.

        A prediction has 0.95 as `coverage` and is marked in `done`; its interval is the predictor's error on networks
        that it had not seen.
        """
        row = self._row(arch, final)
        if row is None:
            found = self._predicted(arch)
        else:
            ratio, lo, hi = self._ratio(row)
            found = replace(row.measured, ratio=ratio, ratio_lo=lo, ratio_hi=hi)
            if self.setting.batch != 1:  # the row's latencies are at batch 1
                found = found.with_latency(None)
        if self.setting.batch == 1 and found.latency_ms_p50 is None:
            middle, lo, hi = found.interval("images_per_s")
            found = replace(
                found, latency_ms_p50=1e3 / middle, latency_ms_p50_lo=1e3 / hi, latency_ms_p50_hi=1e3 / max(lo, 1e-9)
            )
        found = replace(found, reference_images_per_s=self._seed.measured.images_per_s, seconds=0.0)
        return measured_under(found, self.setting, self.ctx, self._seed.threads, self.fingerprint)

    def _predicted(self, arch: Arch) -> Throughput:
        guess, seed = self.predictor.predict([arch])[0], self._seed.measured
        base = self._images_per_s(self._seed)
        return Throughput(
            images_per_s=guess.images_per_s,
            images_per_s_lo=guess.lo,
            images_per_s_hi=guess.hi,
            ratio=guess.images_per_s / base,
            ratio_lo=guess.lo / base,
            ratio_hi=guess.hi / base,
            coverage=0.95,
            visits=seed.visits,
            blocks=seed.blocks,
            passes=seed.passes,
            seconds=0.0,
            load=seed.load,
            when=seed.when,
            done=f"predicted ({self.predictor.name})",
        )

    def _ratio(self, row: DeviceRow) -> tuple[float, float, float]:
        """Return a measured network's ratio to the seed; its interval combines those of both."""
        seed = self._seed
        if row is seed:
            return 1.0, 1.0, 1.0
        both = row.measured.ratio is not None and seed.measured.ratio is not None
        if row.measured.ratio is not None and row.reference == f"{seed.arch}@{self.setting.text}":
            return row.measured.interval("speedup")  # timed in alternating blocks with the seed itself
        metric = "speedup" if both and row.reference == seed.reference else "images_per_s"
        own, other = row.measured.interval(metric), seed.measured.interval(metric)
        return own[0] / other[0], own[1] / other[2], own[2] / other[1]

    def describe(self) -> list[str]:
        """Return lines for people: the device, and the predictor with its held-out error."""
        p = self.predictor
        tried = ", ".join(f"{name} {score:.1%}" for name, score in p.scores.items())
        return [
            f"device: {self.rows[0].on_device_name}, {self.setting.text}, {len(self._rows)} networks measured "
            f"there (fingerprint {self.fingerprint})",
            f"predictor: {p.name}; held-out error {p.median_error:.1%} in the median, "
            f"{p.error:.1%} for 95 % (models tried: {tried})",
        ]
