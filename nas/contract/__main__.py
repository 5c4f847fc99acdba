"""Contract a seed model to a budget: `python -m nas.contract --seed 21M --target-params 5M`."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nas.contract.flags import build_parser
from nas.contract.run import RunResult, contract, plan
from nas.core.cli import exit_status
from nas.core.config import RunConfig
from nas.core.executor_config import ExecutorConfig
from nas.core.settings import parsed
from space.errors import refuse

EXIT_REACHED = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, contract, report. Returns the exit status: 0 reached, 2 bad input, 3 stuck."""
    given = vars(build_parser().parse_args(argv))
    return exit_status(lambda: _command(given))


def _command(given: dict[str, Any]) -> int:
    """Do what the flags ask for. Returns the exit status."""
    named = [field.name for field in dataclasses.fields(ExecutorConfig) if field.name in given]
    given["executor_config"] = ExecutorConfig(**{name: given.pop(name) for name in named})
    if "status" in given:
        from nas.report import status

        print(status(Path(given["status"])))
        return EXIT_REACHED
    as_json, planned, out = (given.pop(name, None) for name in ("json", "plan", "out"))
    resume = given.pop("resume", None)
    quiet = given.setdefault("quiet", False)
    if resume and out is not None and Path(out) != Path(resume):
        raise refuse("--resume", resume, f"the --out folder {out}", "name one folder")
    given = parsed(RunConfig, given)
    if not planned:
        return _run(given, resume or out, resume is not None, as_json)
    if resume is not None:
        raise refuse("--plan", "--resume too", "a new run", "drop one")
    made, text = plan(**given)
    if not quiet:
        print(text)
        if given["executor_config"] != ExecutorConfig():
            print("note: planned for one worker of this machine, whatever else is given")
    if as_json:
        print(json.dumps(dataclasses.asdict(made)))
    return EXIT_REACHED


def _run(given: Mapping[str, Any], out: Any, resume: bool, as_json: bool | None) -> int:
    started = time.monotonic()
    outcome = contract(out=out, resume=resume, **given)
    if not given["quiet"]:
        _print_summary(outcome, time.monotonic() - started)
    if as_json:
        print(json.dumps({**outcome.result, "out": str(outcome.folder)}))
    return outcome.exit_code


def _print_summary(outcome: RunResult, seconds: float) -> None:
    """Print the final table, the paths and the next commands."""
    from nas.report import final_table, next_commands

    print(final_table(outcome.folder))
    print(f"finished in {seconds / 60:.1f} minutes")
    print(f"run folder: {outcome.folder}\nreport:     {outcome.folder / 'report.md'}")
    print("next:", *next_commands(outcome.folder), sep="\n  ")


if __name__ == "__main__":
    sys.exit(main())
