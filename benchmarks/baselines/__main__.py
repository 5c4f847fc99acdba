"""Is the contracted arch worth its search? `python -m benchmarks.baselines`.

At each target, the contracted arch is compared with the published one nearest in size, the seed's
widths scaled uniformly, the best of other strategies' searches of equal size ("random": of as many
random archs as the contraction scored), and structured pruning of the same trained seed by other
tools ("pruning"). The search is required to use no more parameters than the published arch and to
be no slower, measured. All are then trained equally, from scratch and from the same trained seed
(pruned nets from their own weights), on several random seeds, and tested. The table holds
differences in test top-1, paired over images and seeds: "not worse by 1.5 points" is by the
one-sided 95 % bound, "better" by the two-sided interval. A tool that is not installed, crashes, or
does not reach the size is a row with its reason.
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
from nas.core.cli import Parser, usable_cpus
from nas.core.config import EFFORTS, choices_of, effort_defaults, parse_count
from nas.core.io import write_json
from nas.core.progress import Console
from nas.search.strategies import strategy_names
from space.errors import refuse

RIVALS = (PUBLISHED, UNIFORM, PRUNING, *(s for s in strategy_names() if s != "contraction"))


def build_parser() -> Parser:
    """Return the parser; the names are those that `benchmarks.trainings.open_pool` reads."""
    parser = Parser("python -m benchmarks.baselines", description=__doc__)
    add = parser.add_argument
    rivals = f"of {', '.join(RIVALS)} (default: published uniform random)"
    default = [PUBLISHED, UNIFORM, "random"]
    add("--against", nargs="+", choices=RIVALS, default=default, metavar="RIVAL", help=rivals)
    hours = "hours for this call (default 2); what is left over is named, calling again resumes"
    add("--budget-hours", type=float, default=2.0, help=hours)
    add("--seed", default="21M", help="the arch that is contracted (default 21M)")
    add("--targets", nargs="+", default=["5M", "11M"], metavar="N", help="default 5M 11M")
    add("--data", default="fractals", help="default fractals")
    add("--img-size", type=int, default=64, help="pixels (default 64)")
    add("--seeds", type=int, default=3, help="random seeds (default 3)")
    longest = "epochs of the equal training (default 5)"
    add("--epochs", dest="truth_epochs", type=int, default=5, help=longest)
    add("--seed-epochs", type=int, default=10, help="default 10")
    add("--teacher-epochs", type=int, default=15, help="default 15")
    add("--effort", default="normal", help=f"of the searches: {', '.join(EFFORTS)} (normal)")
    for name in SIZES:
        add(f"--{name.replace('_', '-')}", type=int, help="of the searches (that of the effort)")
    ways = choices_of("selection")
    add("--selection", choices=ways, default=ways[0], help=f"as nas.contract (default {ways[0]})")
    add("--device", default="cpu", help="default cpu")
    add("--workers", type=int, default=usable_cpus(), help="trainings at a time")
    add("--random-seed", type=int, default=0, help="of what is drawn (default 0)")
    add("--work", type=Path, help="where trainings are kept (results/runs/lab-...)")
    add("--cache-dir", type=Path, help="data, teachers, labels")
    add("--out", type=Path, default=Path("results/baselines.csv"))
    return parser


def checked(given: argparse.Namespace) -> argparse.Namespace:
    """Check the flags, and fill in what `open_pool` reads besides. Raises InputError."""
    if not given.budget_hours > 0:
        raise refuse("--budget-hours", given.budget_hours, "a number of hours above 0")
    check_at_least(given, seeds=1)
    if given.effort not in EFFORTS:
        raise refuse("--effort", given.effort, f"one of {', '.join(EFFORTS)}")
    for text in given.targets:
        parse_count("--targets", text)
    if len(set(given.targets)) < len(given.targets):
        raise refuse("--targets", " ".join(given.targets), "each target once")
    given.target_params = given.targets[0]
    if given.proxy_epochs is None:
        given.proxy_epochs = effort_defaults(given.effort)["proxy_epochs"]
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Search and train what is missing, report; the last line is JSON. Exit status 0 or 2."""

    def work(given: argparse.Namespace) -> dict[str, Any]:
        rows, told = compare(checked(given), Console())
        write_table(given.out, rows)
        write_json(given.out.with_suffix(".json"), told)
        shown = []
        for row in rows:
            found = ""
            if row.estimate is not None and row.lo is not None and row.hi is not None:
                found = f"{row.estimate:+.2%} [{row.lo:+.2%}, {row.hi:+.2%}], "
                found += f"at least {row.lower:+.2%}: "
                points = 100 * row.estimate, 100 * row.lo, 100 * row.hi
                shown.append((row.name, points))
            misses = f" (contracted {row.misses})" if row.misses else ""
            print(f"{row.name:<44} {found}{row.outcome}{misses}")
        lines = {f"-{100 * MARGIN:g} points": -100 * MARGIN}
        label = "difference in test top-1, points"
        draw_intervals(given.out.with_suffix(".png"), shown, label, lines=lines)
        # Claims are made only where the arch is as small and as fast as it has to be.
        fair = [row for row in rows if not row.misses]
        return {
            "rows": len(rows),
            "compared": sum(row.estimate is not None for row in rows),
            "better": sum(row.outcome.startswith("better") for row in fair),
            "not_worse": sum(row.lower is not None and row.lower > -MARGIN for row in fair),
            "missed": len(rows) - len(fair),
            "table": str(given.out),
        }

    return run_command(build_parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
