"""The flags of `python -m nas.contract`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from nas.core.cli import Parser
from nas.core.config import EFFORTS, RunConfig
from nas.core.executor_config import ExecutorConfig
from nas.core.settings import add_settings, setting


@dataclass(frozen=True)
class SessionOptions:
    """The options of one process; none changes a run's result."""

    out: str | None = setting(
        None, "run folder", group="the run", metavar="DIR", default_text="results/runs/DATE-TIME-SEED-TARGET"
    )
    resume: str | None = setting(
        None, "continue a run that was interrupted (DIR, or the --out folder)", metavar="DIR", const=""
    )
    final_measurements: str | None = setting(
        None, "with --resume: the finalists as measured on the device of --device-table", metavar="FILE"
    )
    plan: bool = setting(False, "print what the run would do and cost after about a minute of measuring, and exit")
    check_proxy: int | None = setting(
        None,
        "afterwards train N kept and rejected candidates about 10x longer on several random "
        "seeds, and report how far the proxy scores can be trusted",
        metavar="N",
    )
    storage: str | None = setting(
        None,
        "keep the study in a PostgreSQL database that many runs share: "
        "postgresql://USER@HOST:PORT/DATABASE. A password in it is never written down: on --resume "
        "it comes from --storage given again, PGPASSWORD or ~/.pgpass",
        metavar="URL",
        default_text="study.db in the run folder",
    )
    status: str | None = setting(None, "print where a run stands, and exit", metavar="DIR")
    max_hours: float | None = setting(None, "stop in time, exit status 3", metavar="H")
    cache_dir: str | None = setting(
        None,
        "datasets, teachers, labels, seeds",
        metavar="DIR",
        default_text="$VISION_CONTRACTION_CACHE, or the user's cache folder",
    )
    quiet: bool = setting(False, "print nothing but errors")
    json: bool = setting(False, "print the result as a last JSON line")


def build_parser() -> Parser:
    """Return the parser. Flags that are not given are absent, so that an effort can set them."""
    parser = Parser(
        prog="python -m nas.contract",
        description="Contract a seed model step by step to a parameter budget and a measured "
        "throughput; leaves a plain timm model in the run folder.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add_settings(parser, RunConfig, EFFORTS)
    add_settings(parser, ExecutorConfig)
    add_settings(parser, SessionOptions)
    return parser
