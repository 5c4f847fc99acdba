"""Is the contracted arch worth its search? `python -m benchmarks.baselines`.

At each target, the contracted arch is compared with the published one nearest in size, the seed's widths scaled
uniformly, the best of other strategies' searches of equal size ("random": of as many random archs as the contraction
scored), and structured pruning of the same trained seed by other tools ("pruning"). The search is required to use no
more parameters than the published arch and to be no slower, measured. All are then trained equally, from scratch and
from the same trained seed (pruned nets from their own weights), on several random seeds, and tested. The table holds
differences in test top-1, paired over images and seeds: "not worse by 1.5 points" is by the one-sided 95 % bound,
"better" by the two-sided interval. A tool that is not installed, crashes, or does not reach the size is a row with its
reason.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.baselines.archs import PRUNING, PUBLISHED, SIZES, UNIFORM
from benchmarks.baselines.compare import compare
from benchmarks.estimates import MARGIN, check_at_least, draw_intervals, run_command, write_table
from benchmarks.trainings import add_flags
from nas.core.cli import Parser
from nas.core.config import choices_of, effort_defaults, parse_count
from nas.core.io import write_json
from nas.core.progress import Console
from nas.core.settings import EFFORTS
from nas.search.strategies import strategy_names
from space.errors import refuse

RIVALS = (PUBLISHED, UNIFORM, PRUNING, *(s for s in strategy_names() if s != "contraction"))


def build_parser() -> Parser:
    """Return the parser; what is left over when the hours are spent is named, and done by calling again."""
    parser = Parser("python -m benchmarks.baselines", description=__doc__)
    add_flags(parser, seed="21M")
    add = parser.add_argument
    rivals = f"of {', '.join(RIVALS)} (default: published uniform random)"
    default = [PUBLISHED, UNIFORM, "random"]
    add("--against", nargs="+", choices=RIVALS, default=default, metavar="RIVAL", help=rivals)
    add("--targets", nargs="+", default=["5M", "11M"], metavar="N", help="default 5M 11M")
    add("--epochs", dest="truth_epochs", type=int, default=5, help="of the equal training (default 5)")
    add("--effort", default="normal", help=f"of the searches: {', '.join(EFFORTS)} (normal)")
    for name in SIZES:
        add(f"--{name.replace('_', '-')}", type=int, help="of the searches (that of the effort)")
    ways = choices_of("selection")
    add("--selection", choices=ways, default=ways[0], help=f"as nas.contract (default {ways[0]})")
    add("--out", type=Path, default=Path("results/baselines.csv"))
    return parser


def checked(given: argparse.Namespace) -> argparse.Namespace:
    """Check the flags, and fill in what `open_pool` reads besides. Raises InputError."""
    if not given.budget_hours > 0:
        raise refuse("--budget-hours", given.budget_hours, "a number of hours above 0")
    check_at_least(given, seeds=1)
    defaults = effort_defaults(given.effort)
    for text in given.targets:
        parse_count("--targets", text)
    if len(set(given.targets)) < len(given.targets):
        raise refuse("--targets", " ".join(given.targets), "each target once")
    given.target_params = given.targets[0]
    if given.proxy_epochs is None:
        given.proxy_epochs = defaults["proxy_epochs"]
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Search and train what is missing, report; the last line is JSON. Exit status 0 or 2."""

    def work(given: argparse.Namespace) -> dict[str, Any]:
        rows, summary = compare(checked(given), Console())
        write_table(given.out, rows)
        write_json(given.out.with_suffix(".json"), summary)
        shown = []
        for row in rows:
            found = ""
            if row.estimate is not None and row.lo is not None and row.hi is not None:
                found = f"{row.estimate:+.2%} [{row.lo:+.2%}, {row.hi:+.2%}], at least {row.lower:+.2%}: "
                shown.append((row.name, (100 * row.estimate, 100 * row.lo, 100 * row.hi)))
            misses = f" (contracted {row.misses})" if row.misses else ""
            print(f"{row.name:<44} {found}{row.outcome}{misses}")
        lines = {f"-{100 * MARGIN:g} points": -100 * MARGIN}
        draw_intervals(given.out.with_suffix(".png"), shown, "difference in test top-1, points", lines=lines)
        # Claims are made only where the arch is as small and as fast as it has to be.
        fair = [row for row in rows if not row.misses]
        return {
            "rows": len(rows),
            "compared": len(shown),
            "better": sum(row.outcome.startswith("better") for row in fair),
            "not_worse": sum(row.lower is not None and row.lower > -MARGIN for row in fair),
            "missed": len(rows) - len(fair),
            "table": str(given.out),
        }

    return run_command(build_parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
