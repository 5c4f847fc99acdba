"""Another device's measurements for `--device-table`: exact where measured, else predicted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from nas.core.requirement import Setting
from nas.measure.device_rows import OK, DeviceRow, one_fingerprint, read_rows
from nas.measure.measurement import Measurement
from nas.measure.predict import Predictor, fit_predictor
from space import Arch, Context, Family
from space.errors import refuse

FLAG = "--device-table"


class DeviceTable:
    """Measurements of one device under one setting, and a predictor fitted to them.

    Rows of the same network: the last one counts. Ratios are to the seed, which must be among the
    rows. Refuses tables of another family, resolution, number of classes, or several fingerprints.
    """

    def __init__(
        self, paths: Sequence[Path], family: Family, ctx: Context, seed: Arch, flag: str = FLAG
    ) -> None:
        rows = [row for path in paths for row in read_rows(path, flag) if row.state == OK]
        shown = ", ".join(str(path) for path in paths)
        rows = [row for row in rows if row.spec]
        if not rows:
            raise refuse(flag, f"{shown} without a measured {family.name}", "measured networks")
        self.fingerprint = one_fingerprint(rows, shown)
        self.flag, self.family, self.ctx = flag, family, ctx
        self.setting: Setting = rows[0].setting
        self.device_name = rows[0].on_device_name
        self._rows: dict[str, DeviceRow] = {}
        self._finalists: dict[str, DeviceRow] = {}
        for row in rows:
            self._take(row, shown, self._rows)
        self.rows = tuple(rows)
        seed_key = family.key(seed, ctx)
        if seed_key not in self._rows:
            raise refuse(
                flag,
                f"{shown} without the seed {family.label(seed)}",
                "the seed among its rows",
                "measure it too: add it to --arch",
            )
        self._seed = self._rows[seed_key]
        self.predictor: Predictor = fit_predictor(
            family,
            ctx,
            [family.arch(json.loads(row.spec)) for row in self._rows.values()],
            [self._pace(row) for row in self._rows.values()],
        )

    def _take(self, row: DeviceRow, shown: str, into: dict[str, DeviceRow]) -> None:
        if row.family != self.family.name:
            raise refuse(self.flag, f"{shown} of {row.family}", f"networks of {self.family.name}")
        if (row.img_size, row.num_classes) != (self.ctx.img_size, self.ctx.num_classes):
            raise refuse(
                self.flag,
                f"{shown} at {row.img_size} px and {row.num_classes} classes",
                f"{self.ctx.img_size} px and {self.ctx.num_classes} classes, as this run has",
                f"measure with --img-size {self.ctx.img_size} --num-classes {self.ctx.num_classes}",
            )
        arch = self.family.arch(json.loads(row.spec))
        key = self.family.key(arch, self.ctx)
        if key != row.key:
            raise refuse(self.flag, f"{shown}: key {row.key}", f"{key}, which its factors give")
        into[key] = row

    def add_finalists(self, rows: Sequence[DeviceRow], where: str) -> None:
        """Take the finalists' own rows, measured on the same device later on.

        They count for `final` questions only: what earlier steps decided on stays what it was.
        """
        for row in rows:
            if row.state == OK and row.fingerprint != self.fingerprint:
                raise refuse(
                    where,
                    f"a row of fingerprint {row.fingerprint}",
                    self.fingerprint,
                    "measure on the device, runtime and batch of --device-table",
                )
            if row.state == OK and row.spec:
                self._take(row, where, self._finalists)

    def _pace(self, row: DeviceRow) -> float:
        # Ratios to one reference cancel what the device went through meanwhile.
        assert row.images_per_s is not None
        if not self._beside_one(row):
            return row.images_per_s
        assert row.ratio is not None
        assert self._seed.ratio is not None
        assert self._seed.images_per_s is not None
        return row.ratio / self._seed.ratio * self._seed.images_per_s

    def _beside_one(self, row: DeviceRow) -> bool:
        """Tell whether a row's ratio and the seed's are to one reference."""
        return (
            row.ratio is not None
            and self._seed.ratio is not None
            and (row.reference == self._seed.reference)
        )

    def _row(self, arch: Arch, final: bool) -> DeviceRow | None:
        key = self.family.key(arch, self.ctx)
        return (self._finalists.get(key) if final else None) or self._rows.get(key)

    def exact(self, arch: Arch, *, final: bool = False) -> bool:
        """Tell whether a network was measured itself."""
        return self._row(arch, final) is not None

    def measurement(self, arch: Arch, *, final: bool = False) -> Measurement:
        """Return a network's throughput on that device: as measured, or predicted.

        A prediction has 0.95 as `coverage`, `done` says so, and its interval is the predictor's
        error on networks that it had not seen.
        """
        row, seed = self._row(arch, final), self._seed
        assert seed.images_per_s is not None
        if row is None:
            guess = self.predictor.predict([arch])[0]
            base = self._pace(seed)
            speed = (guess.images_per_s, guess.lo, guess.hi)
            ratio = (guess.images_per_s / base, guess.lo / base, guess.hi / base)
            done, source = f"predicted ({self.predictor.name})", seed
        else:
            assert row.images_per_s is not None
            assert row.images_per_s_lo is not None
            assert row.images_per_s_hi is not None
            speed = (row.images_per_s, row.images_per_s_lo, row.images_per_s_hi)
            ratio, done, source = self._ratio(row), row.done, row
        latency = {}
        if row is not None and row.batch == 1 and row.latency_ms_p50 is not None:
            latency = {
                f"latency_ms_p50{end}": getattr(row, f"latency_ms_p50{end}")
                for end in ("", "_lo", "_hi")
            }
        elif self.setting.batch == 1:
            latency = {
                "latency_ms_p50": 1e3 / speed[0],
                "latency_ms_p50_lo": 1e3 / speed[2],
                "latency_ms_p50_hi": 1e3 / speed[1],
            }
        return Measurement(
            images_per_s=speed[0],
            images_per_s_lo=speed[1],
            images_per_s_hi=speed[2],
            ratio=ratio[0],
            ratio_lo=ratio[1],
            ratio_hi=ratio[2],
            reference_images_per_s=seed.images_per_s,
            coverage=0.95 if row is None else source.coverage or 0.95,
            blocks=source.blocks or 1,
            passes=source.passes or 1,
            seconds=0.0,
            img_size=self.ctx.img_size,
            num_classes=self.ctx.num_classes,
            in_chans=self.ctx.in_chans,
            batch=self.setting.batch,
            dtype=self.setting.dtype,
            runtime=self.setting.runtime,
            device=self.setting.device,
            threads=source.threads,
            fingerprint=self.fingerprint,
            load=source.load,
            when=source.when,
            peak_mem_bytes=None if row is None else row.peak_mem_bytes,
            done=done,
            **latency,
        )

    def _ratio(self, row: DeviceRow) -> tuple[float, float, float]:
        """Return a measured network's ratio to the seed, intervals of both taken together."""
        if row is self._seed:
            return 1.0, 1.0, 1.0
        seed = self._seed
        if row.ratio is not None and row.reference == f"{seed.arch}@{self.setting.text}":
            return _values(row, "ratio")  # timed in alternating blocks with the seed itself
        name = "ratio" if self._beside_one(row) else "images_per_s"
        own, other = _values(row, name), _values(seed, name)
        return own[0] / other[0], own[1] / other[2], own[2] / other[1]

    def describe(self) -> list[str]:
        """Say whose numbers these are, and how far predictions may be trusted."""
        p = self.predictor
        tried = ", ".join(f"{name} {score:.1%}" for name, score in p.scores.items())
        return [
            f"device: {self.device_name}, {self.setting.text}, {len(self._rows)} networks measured "
            f"there (fingerprint {self.fingerprint})",
            f"predictor: {p.name}; held-out error {p.median_error:.1%} in the median, "
            f"{p.error:.1%} for 95 % (models tried: {tried})",
        ]


def _values(row: DeviceRow, name: str) -> tuple[float, float, float]:
    middle, lo, hi = (getattr(row, name + end) for end in ("", "_lo", "_hi"))
    assert middle is not None
    return middle, lo, hi
