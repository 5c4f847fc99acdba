"""A run as its files tell it: read once, never written, tolerant of a run that is not finished."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from nas.core.io import read_json
from nas.core.table import unguard
from space.errors import refuse

T = TypeVar("T")

TABLES = ("ledger.csv", "steps.csv", "family.csv")
"""What is drawn for readers. No decision reads it, but reports and benchmarks do."""


@dataclass(frozen=True)
class Candidate:
    """One line of `ledger.csv`; None where nothing was measured. Step 0 is the seed.

    `soft_loss` in nats on the holdout (lower is better), `top1` a share of one, `metric` the run's
    where that is another; `seconds` spent.
    """

    step: int
    key: str
    label: str | None
    parent: str | None
    moves: str | None
    notches: int | None
    anchor: str | None
    params: int | None
    params_1000: int | None
    macs: int | None
    images_per_s: float | None
    images_per_s_lo: float | None
    images_per_s_hi: float | None
    ratio: float | None
    ratio_lo: float | None
    ratio_hi: float | None
    reference: str | None
    requirements: str | None
    basis: str | None
    soft_loss: float | None
    soft_loss_se: float | None
    top1: float | None
    top1_se: float | None
    metric: float | None
    metric_se: float | None
    epochs: int | None
    violation: float | None
    seconds: float | None
    stage: str | None
    state: str | None
    reason: str | None
    log: str | None

    @property
    def name(self) -> str:
        """What to call it."""
        return self.label or self.key


@dataclass(frozen=True)
class Step:
    """One line of `steps.csv`: an accepted contraction, with counts by reason."""

    step: int
    band_lo: int | None
    band_hi: int | None
    required: str | None
    contractions: int | None
    shortlisted: int | None
    too_slow: int | None
    not_selected: int | None
    failed: int | None
    scored: int | None
    kept: int | None
    incumbent: str | None
    params: int | None
    ratio: float | None
    soft_loss: float | None
    top1: float | None
    seconds: float | None


@dataclass(frozen=True)
class RunFiles:
    """Everything a report may use. `result` and `best` are empty until the run has them."""

    folder: Path
    run: Mapping[str, Any]
    ledger: tuple[Candidate, ...]
    steps: tuple[Step, ...]
    result: Mapping[str, Any]
    best: Mapping[str, Any]

    @property
    def config(self) -> Mapping[str, Any]:
        """The run's settings."""
        return section(self.run, "config")

    @property
    def seed(self) -> Candidate | None:
        """The arch that contraction started from."""
        return next((row for row in self.ledger if row.step == 0), None)

    @property
    def seed_name(self) -> str:
        """The seed as the user named it; of a file its name only."""
        given = str(self.config.get("seed") or (self.seed.name if self.seed else "seed"))
        return Path(given).name if given.endswith(".json") else given

    def candidate(self, key: str | None) -> Candidate | None:
        """Find an arch in the ledger, where it was kept if it was, else where it was scored."""
        rows = [row for row in self.ledger if row.key == key]
        kept = [row for row in rows if row.stage == "kept" or row.step == 0]
        scored = [row for row in rows if row.soft_loss is not None]
        return next(iter(kept or scored or rows), None)

    @property
    def path(self) -> tuple[Candidate, ...]:
        """The incumbents from the seed on: the result's path, or the steps' incumbents so far."""
        keys = self.result.get("path")
        if not keys or not isinstance(keys, list):
            first = [self.seed.key] if self.seed else []
            keys = first + [s.incumbent for s in self.steps if s.incumbent and s.step > 0]
        named = (key for key in keys if isinstance(key, str))
        found = (self.candidate(key) for key in dict.fromkeys(named))
        return tuple(row for row in found if row is not None)


def read_run(folder: Path) -> RunFiles:
    """Read a run's files. Refuses a folder without a run and files that are damaged."""
    if not folder.is_dir():
        raise refuse(
            "RUN", folder, "the folder of a run", "give the --out folder of an earlier run"
        )
    if not (folder / "run.json").is_file():
        raise refuse("RUN", folder, "a folder with a run.json", "give the --out folder of a run")
    result = _mapping(folder / "result.json", optional=True)
    _check_tables(folder, section(result, "tables"))
    return RunFiles(
        folder=folder,
        run=_mapping(folder / "run.json"),
        ledger=_rows(folder / "ledger.csv", Candidate),
        steps=_rows(folder / "steps.csv", Step),
        result=result,
        best=_mapping(folder / "best.json", optional=True),
    )


def table_digests(folder: Path) -> dict[str, str]:
    """Hash the tables that lie in a run's folder, for its `result.json`: name -> sha256."""
    there = [folder / name for name in TABLES if (folder / name).is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in there}


def _check_tables(folder: Path, told: Mapping[str, Any]) -> None:
    """Refuse tables of a finished run that are not those that it drew."""
    found = table_digests(folder)
    for name in TABLES:
        if name in told and found.get(name) != told[name]:
            got = "content that its checksum in result.json does not fit"
            raise refuse(
                str(folder / name),
                got if name in found else "no such file",
                "the table as the run drew it",
                "restore it",
            )


def section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a part of a JSON object that is itself an object, empty where it is anything else."""
    part = values.get(name)
    return part if isinstance(part, Mapping) else {}


def number(values: Mapping[str, Any], name: str) -> float | None:
    """Return a number of a JSON object, None where there is none."""
    value = values.get(name)
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if plain else None


def read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Read a CSV file: its columns and its rows as text. Refuses what is not one."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        reader = csv.DictReader(io.StringIO(text), strict=True)
        columns = list(reader.fieldnames or [])
        rows = []
        for row in reader:
            if None in row or None in row.values():
                raise refuse(
                    f"{path} line {reader.line_num}", "another number of cells", str(len(columns))
                )
            rows.append({name: unguard(cell) for name, cell in row.items()})
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise refuse(str(path), error, "a readable CSV file") from None
    if not columns:
        raise refuse(str(path), "an empty file", "a CSV file with a header")
    return columns, rows


def parse_cell(where: str, text: str, hint: Any) -> Any:
    """Turn a cell into the type that a field declares; empty is None where that is allowed."""
    optional = get_origin(hint) in (Union, UnionType)
    if optional and text == "":
        return None
    kind = next(kind for kind in get_args(hint) if kind is not type(None)) if optional else hint
    try:
        # Counts may have passed through a program that writes every number with a point.
        return int(float(text)) if kind is int and "." in text else kind(text)
    except (ValueError, OverflowError):
        want = "text" if kind is str else "an integer" if kind is int else "a number"
        raise refuse(where, text or "nothing", want) from None


def _rows(path: Path, kind: type[T]) -> tuple[T, ...]:
    if not path.exists():
        return ()
    columns, rows = read_table(path)
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    required = [n for n in names if get_origin(hints[n]) not in (Union, UnionType)]
    missing = [name for name in required if name not in columns]
    if missing:
        raise refuse(str(path), f"no column {', '.join(missing)}", "the table of a run")
    made = []
    for line, row in enumerate(rows, start=2):
        cells = {
            name: parse_cell(f"{path} line {line}: {name}", row.get(name, ""), hints[name])
            for name in names
        }
        made.append(kind(**cells))
    return tuple(made)


def _mapping(path: Path, *, optional: bool = False) -> Mapping[str, Any]:
    if optional and not path.exists():
        return {}
    value = read_json(path, "a file of a run")
    if not isinstance(value, dict):
        raise refuse(str(path), type(value).__name__, "a JSON object")
    return value
