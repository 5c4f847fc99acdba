"""Contract a seed model to a budget: `python -m nas.contract --seed 21M --target-params 5M`."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nas.contract.flags import SessionOptions, build_parser
from nas.contract.run import RunResult, contract, plan
from nas.core.cli import EXIT_BAD_INPUT, guarded
from nas.core.config import RunConfig
from nas.core.executor_config import ExecutorConfig
from nas.core.settings import parsed
from space.errors import InputError, refuse

EXIT_REACHED, EXIT_STUCK = 0, 3


_SESSION = tuple(field.name for field in dataclasses.fields(SessionOptions))
_EXECUTOR = tuple(field.name for field in dataclasses.fields(ExecutorConfig))


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, contract, report. Returns the exit status: 0 reached, 2 bad input, 3 stuck."""
    arguments = vars(build_parser().parse_args(argv))
    session_given = {k: arguments.pop(k) for k in _SESSION if k in arguments}
    out = session_given.get("out")
    try:
        named = [name for name in _EXECUTOR if name in arguments]
        session_given["executor_config"] = ExecutorConfig(**{name: arguments.pop(name) for name in named})
        if "status" in session_given:
            from nas.report import status

            print(status(Path(session_given["status"])))
            return EXIT_REACHED
        resume = session_given.get("resume")
        if resume:
            if out is not None and Path(out) != Path(resume):
                raise refuse("--resume", resume, f"the --out folder {out}", "name one folder")
            out = resume
        if resume == "" and out is None:
            raise refuse("--resume", "no folder", "the folder of a run", "name it: --resume DIR")
        if resume is None and "replay" not in arguments:
            _check_required(arguments)
        arguments = parsed(RunConfig, arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    if session_given.get("plan"):
        for other, given in (("--resume", resume is not None), ("--replay", "replay" in arguments)):
            if given:
                print(f"error: --plan: got {other}, want a new run; drop one", file=sys.stderr)
                return EXIT_BAD_INPUT
        return guarded(lambda: _plan(arguments, session_given))
    return guarded(lambda: _run(arguments, session_given, out, resume is not None))


def _plan(arguments: Mapping[str, Any], session_given: Mapping[str, Any]) -> int:
    """Print a plan. Returns the exit status."""
    quiet = bool(session_given.get("quiet", False))
    made, text = plan(
        **arguments, cache_dir=session_given.get("cache_dir"), check_proxy=session_given.get("check_proxy"), quiet=quiet
    )
    if not quiet:
        print(text)
        if session_given["executor_config"] != ExecutorConfig():
            print("note: planned for one worker of this machine, whatever else is given")
    if session_given.get("json"):
        print(json.dumps(dataclasses.asdict(made)))
    return EXIT_REACHED


def _run(arguments: Mapping[str, Any], session_given: Mapping[str, Any], out: Any, resume: bool) -> int:
    started = time.monotonic()
    quiet = bool(session_given.get("quiet", False))
    outcome = contract(
        out=out,
        resume=resume,
        max_hours=session_given.get("max_hours"),
        cache_dir=session_given.get("cache_dir"),
        final_measurements=session_given.get("final_measurements"),
        check_proxy=session_given.get("check_proxy"),
        storage=session_given.get("storage"),
        executor_config=session_given["executor_config"],
        quiet=quiet,
        **arguments,
    )
    if not quiet:
        _print_summary(outcome, time.monotonic() - started)
    if session_given.get("json"):
        print(json.dumps({**outcome.result, "out": str(outcome.folder)}))
    return outcome.exit_code


def _check_required(arguments: Mapping[str, Any]) -> None:
    """Refuse a new run without a seed or a target."""
    for name, example in (("seed", "--seed 21M"), ("target_params", "--target-params 5M")):
        if name not in arguments:
            flag = "--" + name.replace("_", "-")
            raise refuse(flag, "nothing", "a value", f"add, for example, {example}")


def _print_summary(outcome: RunResult, seconds: float) -> None:
    """Print the final table, the paths and the next commands."""
    from nas.report import final_table, next_commands

    print(final_table(outcome.folder))
    pace = outcome.result.get("seed_images_per_s")
    pace_text = "" if pace is None else f" (the seed measured {pace:.0f} images/s here)"
    print(f"finished in {seconds / 60:.1f} minutes{pace_text}")
    print(f"run folder: {outcome.folder}")
    print(f"report:     {outcome.folder / 'report.md'}")
    print("next:")
    for command in next_commands(outcome.folder):
        print(f"  {command}")


if __name__ == "__main__":
    sys.exit(main())
