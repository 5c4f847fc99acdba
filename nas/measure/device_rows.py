"""The table of `python -m benchmarks.throughput`: one measured network a line; no torch."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from nas.core.io import write_atomic
from nas.core.requirement import Setting
from nas.core.table import Writer, unguard
from nas.measure.fingerprint import Fingerprint
from nas.measure.measurement import Measurement
from space.errors import InputError, refuse

OK, FAILED = "ok", "failed"


@dataclass(frozen=True)
class DeviceRow:
    """One network under one setting on one device, or why there is no number for it.

    `arch` is as the user gave it; `spec` its factors as JSON, empty for a plain timm model, `key`
    its name as built at `img_size` and `num_classes`. `ratio` is images/s over those of `reference`
    (`ARCH@SETTING`), timed in alternating blocks. Latencies are milliseconds at batch 1. `top1` and
    `agreement` (with eager float32) are shares of `test_n` test images. What is not known is None.
    The rest is as in `nas.measure.measurement.Measurement`.
    """

    arch: str
    family: str
    key: str
    spec: str
    img_size: int
    num_classes: int
    device: str
    runtime: str
    dtype: str
    batch: int
    threads: int
    state: str
    reason: str = ""
    images_per_s: float | None = None
    images_per_s_lo: float | None = None
    images_per_s_hi: float | None = None
    ratio: float | None = None
    ratio_lo: float | None = None
    ratio_hi: float | None = None
    reference: str = ""
    latency_ms_p50: float | None = None
    latency_ms_p50_lo: float | None = None
    latency_ms_p50_hi: float | None = None
    latency_ms_p90: float | None = None
    latency_ms_p99: float | None = None
    latency_passes: int | None = None
    peak_mem_bytes: int | None = None
    params: int | None = None
    macs: int | None = None
    parity: float | None = None
    agrees: int | None = None
    done: str = ""
    top1: float | None = None
    top1_se: float | None = None
    eager_top1: float | None = None
    agreement: float | None = None
    test_n: int | None = None
    coverage: float | None = None
    blocks: int | None = None
    passes: int | None = None
    seconds: float | None = None
    waited: float | None = None
    disturbed: str = ""
    attempts: int | None = None
    load: float | None = None
    clock_mhz: float | None = None
    when: str = ""
    fingerprint: str = ""
    on_device_name: str = ""
    on_physical_cores: int | None = None
    on_logical_cores: int | None = None
    on_usable_cpus: float | None = None
    on_nominal_mhz: float | None = None
    on_driver: str | None = None
    on_cuda: str | None = None
    on_cudnn: str | None = None
    on_torch: str = ""
    on_timm: str = ""
    on_python: str = ""
    on_os: str = ""
    on_arch: str = ""
    on_runtime_version: str = ""

    @property
    def setting(self) -> Setting:
        """Under which it was timed."""
        return Setting(self.device, self.runtime, self.dtype, self.batch)

    @property
    def question(self) -> tuple[Any, ...]:
        """What makes two rows answers to the same question (on the same device)."""
        return (self.arch, self.img_size, self.num_classes, self.setting, self.reference)


COLUMNS = tuple(field.name for field in fields(DeviceRow))
_TYPES: dict[str, Any] = get_type_hints(DeviceRow)
_MEASURED = {f.name for f in fields(Measurement)} & set(COLUMNS)


def measured_columns(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns that a measurement (as plain JSON) fills; latencies are left out."""
    left_out = {"img_size", "num_classes", "device", "runtime", "dtype", "batch", "fingerprint"}
    return {
        name: measured[name] for name in _MEASURED - left_out if not name.startswith("latency_ms_")
    }


def fingerprint_columns(of: Fingerprint) -> dict[str, Any]:
    """Return the columns that tell the device and software."""
    values = {**vars(of), "fingerprint": of.id}
    names = [n for n in COLUMNS if n.startswith("on_")]
    return {"fingerprint": of.id, **{n: values[n[3:]] for n in names}}


def fingerprint_of(row: DeviceRow) -> Fingerprint:
    """Rebuild the fingerprint that a row was measured under, and check its id."""
    values = {n[3:]: getattr(row, n) for n in COLUMNS if n.startswith("on_")}
    values.update(
        device=row.device.partition(":")[0],
        threads=row.threads,
        runtime=row.runtime,
        dtype=row.dtype,
        batch=row.batch,
        img_size=row.img_size,
        id=row.fingerprint,
    )
    return Fingerprint.from_dict(values)


def write_rows(path: Path, rows: Iterable[DeviceRow]) -> None:
    """Write the whole table, aside first: it is there whole or as it was."""
    out = io.StringIO(newline="")
    writer = Writer(out, COLUMNS)
    writer.writeheader()
    for row in rows:
        values = (getattr(row, name) for name in COLUMNS)
        writer.writerow([v if isinstance(v, str) else _cell(v) for v in values])
    write_atomic(path, out.getvalue().encode())


def read_rows(path: Path, flag: str) -> list[DeviceRow]:
    """Read a table back. Refuses another file, naming the line and the column."""
    if path.is_dir() or not path.exists():
        raise refuse(flag, path, "a CSV file made by python -m benchmarks.throughput")
    try:
        text = path.read_bytes().decode("utf-8")  # as it is: a cell may hold any line break
    except (OSError, UnicodeDecodeError) as error:
        raise refuse(flag, f"{path} ({error})", "a readable CSV file") from None
    try:
        header, *lines = list(csv.reader(io.StringIO(text, newline=""))) or [[]]
    except csv.Error as error:
        raise refuse(flag, f"{path} ({error})", "a readable CSV file") from None
    missing = [name for name in ("arch", "images_per_s", "fingerprint") if name not in header]
    if missing or sorted(header) != sorted(COLUMNS):
        lacks = sorted(set(COLUMNS) - set(header))[:3]
        raise refuse(
            flag,
            f"{path} with other columns (without {', '.join(lacks) or 'none'})",
            "a table of python -m benchmarks.throughput",
            "make it with this version",
        )
    rows = []
    for number, cells in enumerate(lines, start=2):
        if len(cells) != len(header):
            raise refuse(f"{path} line {number}", f"{len(cells)} cells", f"{len(header)} cells")
        values = dict(zip(header, map(unguard, cells), strict=True))
        try:
            rows.append(DeviceRow(**{name: _value(name, values[name]) for name in COLUMNS}))
        except ValueError as error:
            raise refuse(f"{path} line {number}", error, "a row as it was written") from None
    for number, row in enumerate(rows, start=2):
        _check(row, f"{path} line {number}")
    return rows


def _check(row: DeviceRow, where: str) -> None:
    if row.state == FAILED:
        return
    if row.state != OK:
        raise refuse(f"{where} state", row.state, f"{OK} or {FAILED}")
    for name in ("images_per_s", "ratio", "latency_ms_p50"):
        middle, lo, hi = (getattr(row, name + end) for end in ("", "_lo", "_hi"))
        if name == "ratio" and middle is None:
            continue
        if name == "latency_ms_p50" and lo is None and hi is None:
            continue  # not measured, or by too few passes for an interval
        if not (lo is not None and hi is not None and 0 < lo <= (middle or 0) <= hi < 1e12):
            raise refuse(f"{where} {name}", f"{middle} in [{lo}, {hi}]", "0 < lo <= median <= hi")
    try:
        fingerprint_of(row)
        _ = row.setting
        if row.spec:
            json.loads(row.spec)
    except InputError as error:
        raise refuse(where, error, "a row as it was written", "measure again") from None
    except (ValueError, RecursionError):
        raise refuse(f"{where} spec", row.spec[:60], "an arch's factors as JSON") from None


def _cell(value: object) -> str:
    return "" if value is None else value if isinstance(value, str) else repr(value)


def _value(name: str, text: str) -> Any:
    hint = _TYPES[name]
    optional = get_origin(hint) in (Union, UnionType)
    if optional and text == "":
        return None
    kind = next(k for k in get_args(hint) if k is not type(None)) if optional else hint
    if kind is str:
        return text
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name}={text!r} is not a number") from None


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
