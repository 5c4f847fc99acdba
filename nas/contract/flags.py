"""The flags of `python -m nas.contract`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from nas.core.cli import Parser
from nas.core.config import EFFORTS, RunConfig
from nas.core.settings import add_settings, setting


@dataclass(frozen=True)
class SessionOptions:
    """What one process does with a run; changes no answer."""

    out: str | None = setting(
        None,
        "run folder",
        group="the run",
        metavar="DIR",
        default_text="results/runs/DATE-TIME-SEED-TARGET",
    )
    resume: str | None = setting(
        None,
        "continue a run that was interrupted (DIR, or the --out folder)",
        metavar="DIR",
        const="",
    )
    finalists: str | None = setting(
        None,
        "with --resume: the finalists as measured on the device of --device-table",
        metavar="FILE",
    )
    plan: bool = setting(
        False, "tell what the run would do and cost after about a minute of measuring, and exit"
    )
    trust: int | None = setting(
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
    status: str | None = setting(None, "tell where a run stands, and exit", metavar="DIR")
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
    means = parser.add_argument_group(
        "what works on it (changes no answer; may differ on --resume)"
    )
    means.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="jobs at a time (default: 1, or one a GPU with --device cuda); the cores are shared "
        "among them unless --threads says how many each has",
    )
    means.add_argument(
        "--executor",
        metavar="NAME",
        help="local (processes of this machine) or ray (a cluster; needs the extra [ray]) "
        "(default: local)",
    )
    means.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="of a running cluster: HOST:PORT or auto (default: one of this machine alone)",
    )
    means.add_argument(
        "--measure-on",
        metavar="RESOURCE",
        help="with Ray, time on nodes that have this resource, such as orin (default: here)",
    )
    means.add_argument(
        "--ship",
        action="store_true",
        help="with Ray, send files also to nodes that see this machine's (a slow shared disk)",
    )
    means.add_argument(
        "--retries",
        type=int,
        metavar="N",
        help="how often a job is tried again whose worker or node died (default: 2)",
    )
    means.add_argument(
        "--job-memory-gb",
        type=float,
        metavar="GB",
        help="memory that a job may take; more is its failure (default: no limit)",
    )
    means.add_argument(
        "--gpu-share", type=float, metavar="SHARE", help="of a GPU that a job takes (default: 1)"
    )
    means.add_argument(
        "--job-minutes",
        type=float,
        metavar="M",
        help="a job that takes longer is ended and counts as lost (default: no limit)",
    )
    add_settings(parser, SessionOptions)
    return parser
