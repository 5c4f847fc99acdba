"""The flags of `python -m nas.contract`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from nas.core.cli import Parser, default_cache
from nas.core.config import RunConfig
from nas.core.executor_config import ExecutorConfig
from nas.core.progress import Console
from nas.core.settings import add_settings, check_settings, setting
from nas.jobs.queue import Executor

LEAST_CHECKED = 3
"""Smallest number of archs of a proxy check."""


@dataclass(frozen=True)
class CommandOptions:
    """The flags that say what the command does."""

    out: str | None = setting(
        None, "run folder", group="the run", metavar="DIR", default_text="results/runs/DATE-TIME-SEED-TARGET"
    )
    resume: str | None = setting(
        None, "continue a run that was interrupted (DIR, or the --out folder)", metavar="DIR", const=""
    )
    plan: bool = setting(False, "print what the run would do and cost after about a minute of measuring, and exit")
    status: str | None = setting(None, "print where a run stands, and exit", metavar="DIR")
    quiet: bool = setting(False, "print nothing but errors and warnings")
    json: bool = setting(False, "print the result as a last JSON line")


@dataclass(frozen=True, kw_only=True)
class Session:
    """The options of one process; none changes a run's result.

    Paths may be `Path`s too. `executor` replaces the one that `executor_config` describes.
    """

    final_measurements: str | None = setting(
        None,
        "with --resume: the finalists as measured on the device of --device-table",
        group="this process (changes no answer)",
        metavar="FILE",
    )
    check_proxy: int | None = setting(
        None,
        "afterwards train N kept and rejected candidates about 10x longer on several random "
        "seeds, and report how far the proxy scores can be trusted",
        metavar="N",
        low=LEAST_CHECKED,
        high=1000,
    )
    storage: str | None = setting(
        None,
        "keep the study in a PostgreSQL database that many runs share: "
        "postgresql://USER@HOST:PORT/DATABASE. A password in it is never written down: on --resume "
        "it comes from --storage given again, PGPASSWORD or ~/.pgpass",
        metavar="URL",
        default_text="study.db in the run folder",
    )
    max_hours: float | None = setting(None, "stop in time, exit status 3", metavar="H", above=0.0)
    cache_dir: str | None = setting(
        None,
        "datasets, teachers, labels, seeds",
        metavar="DIR",
        default_text="$VISION_CONTRACTION_CACHE, or the user's cache folder",
    )
    executor_config: ExecutorConfig = field(default_factory=ExecutorConfig)
    executor: Executor | None = None
    quiet: bool = True
    console: Console | None = None

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def cache(self) -> Path:
        """The folder of datasets, teachers, labels and seeds."""
        return default_cache() if self.cache_dir is None else Path(self.cache_dir)


def build_parser() -> Parser:
    """Return the parser. Flags that are not given are absent, so that an effort can set them."""
    description = (
        "Contract a seed model step by step to a parameter budget and a measured throughput;\n"
        "leaves a plain timm model in the run folder."
    )
    parser = Parser("python -m nas.contract", description=description, argument_default=argparse.SUPPRESS)
    for group in (RunConfig, ExecutorConfig, CommandOptions, Session):
        add_settings(parser, group)
    return parser
