"""Soft labels on their own: `python -m nas.labels build|info|verify|merge|cache`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas.core.cli import Parser, default_cache, exit_status, usable_cpus
from nas.core.executor_config import EXECUTORS, ExecutorConfig
from nas.core.progress import Console
from nas.core.settings import add_settings, parsed, setting
from nas.data.cache import cache_report, clean_cache, parse_bytes
from nas.distill.label_store import BuildOptions, build, verify
from nas.labels.api import info, merge
from nas.labels.request import LabelRequest
from space.errors import refuse

__all__ = ["build", "info", "main", "merge", "verify"]


@dataclass(frozen=True)
class BuildPlace:
    """Where a store is built; changes no label."""

    out: str | None = setting(None, "the store's folder", metavar="DIR", default_text="in the cache")
    cache_dir: str | None = setting(None, "data sets and teachers", metavar="DIR")
    executor: str = setting("local", "ray builds the --processes parts on a cluster", choices=EXECUTORS)
    ray_address: str | None = setting(
        None, "HOST:PORT or auto", metavar="ADDRESS", default_text="a cluster of this machine alone"
    )


GROUPS = (BuildOptions, LabelRequest, BuildPlace)


def build_parser() -> Parser:
    """Return the parser; flags of a build that are not given are absent."""
    parser = Parser("python -m nas.labels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    make = commands.add_parser("build", help="make a store, or continue one", argument_default=argparse.SUPPRESS)
    for group in GROUPS:
        add_settings(make, group)
    tell = commands.add_parser("info", help="describe a store")
    check = commands.add_parser("verify", help="find any damaged, missing or stale file")
    join = commands.add_parser("merge", help="join the parts that several machines made")
    for command in (tell, check, join):
        command.add_argument("store")
    check.add_argument("--teacher", type=int, metavar="N", help="run it again on N records")
    check.add_argument("--data", help="where the data is now")
    check.add_argument("--teacher-model", help="where the teacher is now")
    check.add_argument("--random-seed", type=int, default=0)
    join.add_argument("parts", nargs="+")
    keep = commands.add_parser("cache", help="list the decoded pixels in the cache")
    keep.add_argument("--keep", metavar="SIZE", help="remove the least recently used beyond it")
    for command in (check, keep):
        command.add_argument("--cache-dir", metavar="DIR")
    for command in (make, tell, check, join, keep):
        command.add_argument("--quiet", action="store_true", default=False)
        command.add_argument("--json", action="store_true", default=False, help="end with one line of JSON")
    return parser


def _build(given: dict[str, Any], console: Console) -> Mapping[str, Any]:
    for group in GROUPS:
        given = parsed(group, given)
    if "data" not in given:
        raise refuse("--data", "nothing", "what nas.labels build --help says of --data")
    workers = max(1, min(given.get("processes", 1), usable_cpus()))
    named = {k: given.pop(k) for k in ("executor", "ray_address") if k in given}
    executor = ExecutorConfig(**named, workers=workers)
    made = build(**given, executor_config=executor, console=console)
    console.line(f"store: {made['folder']} ({made['bytes_per_record']:.1f} bytes a record)")
    return made


def _info(given: dict[str, Any], console: Console) -> Mapping[str, Any]:
    found = info(given["store"])
    for name, value in found.items():
        console.line(f"{name}: {json.dumps(value)}")
    return found


def _verify(given: dict[str, Any], console: Console) -> Mapping[str, Any]:
    store = given["store"]
    wrong = verify(**given, console=console)
    for line in wrong:
        print(f"error: label store {store}: {line}", file=sys.stderr)
    if not wrong:
        console.line(f"{store}: whole")
    return {"problems": wrong}


def _merge(given: dict[str, Any], console: Console) -> Mapping[str, Any]:
    made = merge(given["store"], given["parts"])
    console.line(f"{given['store']}: {made['missing']} shards missing")
    return made


def _cache(given: dict[str, Any], console: Console) -> Mapping[str, Any]:
    cache = Path(given["cache_dir"]) if given["cache_dir"] else default_cache()
    if given["keep"] is not None:
        clean_cache(cache, parse_bytes("--keep", given["keep"]))
    rows = [dict(row) for row in cache_report(cache)]
    for row in rows:
        console.line("  ".join(f"{name} {value}" for name, value in row.items()))
    return {"data": rows}


_COMMANDS = {"build": _build, "info": _info, "verify": _verify, "merge": _merge, "cache": _cache}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and work. Returns the exit status: 0, or 2 for bad input and for a damaged store."""

    def work() -> int:
        given = vars(build_parser().parse_args(argv))
        command, as_json = given.pop("command"), given.pop("json")
        values = _COMMANDS[command](given, Console(quiet=given.pop("quiet")))
        if as_json:
            print(json.dumps(dict(values), default=str))
        return 2 if values.get("problems") else 0

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
