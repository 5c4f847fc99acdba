"""Contract a seed model to a budget: `python -m nas.contract --seed 21M --target-params 5M`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from nas.command import EXIT_BAD_INPUT, Parser, default_cache, guarded
from nas.config import EFFORTS, STEP_KEEPS, parse_count, parse_share
from nas.plan import Plan
from nas.planning import plan as plan_run
from nas.session import Outcome, run
from nas.trust import check_number
from space.errors import InputError, refuse

EXIT_REACHED, EXIT_STUCK = 0, 3


def contract(
    seed: str | None = None,
    target_params: str | int | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    max_hours: float | None = None,
    cache_dir: str | Path | None = None,
    finalists: str | Path | None = None,
    trust: int | None = None,
    quiet: bool = True,
    console: Any = None,
    executor: Any = None,
    **settings: Any,
) -> Outcome:
    """Contract `seed` to `target_params` and leave everything in the run folder `out`.

    `settings` are the fields of `nas.config.RunConfig` (`min_speedup=1.5`, `effort="smoke"`,
    ...); those not given follow the effort. With `resume`, `out` is an earlier run's folder and
    only settings that equal its own may be given. `trust` archs are trained longer afterwards, for
    a report on how far the scores can be trusted (`nas.trust`). Raises `InputError` (a
    `ValueError` of one line) on bad input. A run that ends stuck or out of time is an `Outcome`,
    not an error.
    """
    given = dict(settings)
    if seed is not None:
        given["seed"] = seed
    if target_params is not None:
        given["target_params"] = parse_count("--target-params", target_params)
    if max_hours is not None and not (max_hours > 0 and max_hours < 1e6):
        raise refuse("--max-hours", max_hours, "a number of hours above 0")
    check_number(trust)
    return run(
        given,
        out=None if out is None else Path(out),
        resume=resume,
        max_hours=max_hours,
        cache=Path(cache_dir) if cache_dir is not None else default_cache(),
        quiet=quiet,
        console=console,
        executor=executor,
        finalists=None if finalists is None else Path(finalists),
        trust=trust,
    )


def plan(
    seed: str,
    target_params: str | int,
    *,
    cache_dir: str | Path | None = None,
    trust: int | None = None,
    quiet: bool = True,
    console: Any = None,
    executor: Any = None,
    **settings: Any,
) -> tuple[Plan, str]:
    """Plan `contract` without training: the plan, and the same as text.

    Takes about a minute of measuring; nothing is kept but measurements in the cache.
    """
    check_number(trust)
    given = {"seed": seed, **settings}
    given["target_params"] = parse_count("--target-params", target_params)
    return plan_run(
        given,
        cache=Path(cache_dir) if cache_dir is not None else default_cache(),
        quiet=quiet,
        console=console,
        executor=executor,
        trust=trust,
    )


def _defaults(name: str) -> str:
    return ", ".join(f"{effort} {values[name]}" for effort, values in EFFORTS.items())


def build_parser() -> Parser:
    """Return the parser. Flags that are not given are absent, so that an effort can set them."""
    parser = Parser(
        prog="python -m nas.contract",
        description="Contract a seed model step by step to a parameter budget and a measured "
        "throughput; leaves a plain timm model in the run folder.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    goal = parser.add_argument_group("what to reach")
    goal.add_argument(
        "--seed", metavar="ARCH", help="where contraction starts: 5M, 11M, 21M, or a JSON file"
    )
    goal.add_argument("--target-params", metavar="N", help="parameters to reach: 5M, 350K, ...")
    goal.add_argument(
        "--params-tolerance",
        metavar="SHARE",
        help="the target is a band of this share either way (default: 0.10)",
    )
    goal.add_argument(
        "--min-throughput",
        type=float,
        metavar="IMAGES_PER_S",
        help="least throughput on the device (default: no such bound)",
    )
    goal.add_argument(
        "--min-speedup",
        type=float,
        metavar="RATIO",
        help="least throughput relative to the seed, timed interleaved (default: no such bound; "
        "with neither, a contraction must not be slower than what it came from, less 2 %%)",
    )
    goal.add_argument(
        "--require",
        action="append",
        metavar="REQUIREMENT",
        help="METRIC>=VALUE@DEVICE[:RUNTIME][:DTYPE][:bBATCH], may be repeated: "
        "'speedup>=1.9@cpu:onnxruntime:b1', 'images_per_s>=3000@cuda:b256', "
        "'latency_ms<=20@cpu:b1', "
        "'latency_p99_ms<=30@cpu', 'peak_mem_mb<=400@cpu:b1', 'macs<=1.2G', 'params<=5.2M'",
    )
    goal.add_argument(
        "--device-table",
        nargs="+",
        metavar="FILE",
        help="measurements of a device that is not this one, made there by python -m "
        "benchmarks.throughput; what it has not measured is predicted, and nothing is promised "
        "before the finalists are measured there (--finalists)",
    )
    goal.add_argument("--family", help="kind of model (default: tinyvit)")
    data = parser.add_argument_group("data and teacher")
    data.add_argument(
        "--data",
        metavar="SOURCE",
        help="digits, fractals, an image folder, or torch/..., hfds/..., wds/... (default: digits)",
    )
    data.add_argument(
        "--img-size", type=int, metavar="PX", help="resolution (default: smoke 48, else from data)"
    )
    data.add_argument(
        "--proxy-images",
        type=int,
        metavar="N",
        help="train and score on a stratified subset of N images (default: smoke 800, else 10000)",
    )
    data.add_argument(
        "--max-broken", metavar="SHARE", help="broken images tolerated (default: 1%%)"
    )
    data.add_argument(
        "--no-pixel-cache",
        dest="pixel_cache",
        action="store_false",
        help="decode a folder's images each time instead of keeping their pixels",
    )
    data.add_argument(
        "--teacher",
        metavar="MODEL",
        help="auto, a timm name with pretrained weights, or MODEL:FILE (default: auto)",
    )
    data.add_argument("--labels", metavar="STORE", help="use this soft-label store")
    data.add_argument(
        "--missing-labels",
        metavar="POLICY",
        help="images without a label in --labels: refuse, or skip them (default: refuse)",
    )
    data.add_argument(
        "--label-epochs",
        type=int,
        metavar="N",
        help="epochs of labels to store (default: those of the longest training)",
    )
    data.add_argument(
        "--beyond",
        metavar="POLICY",
        help="training past the stored epochs: refuse, or cycle through them (default: refuse)",
    )
    data.add_argument(
        "--topk",
        type=int,
        metavar="K",
        help="classes kept a label (default: 10, or 100 of more than 10,000; at most classes-1)",
    )
    data.add_argument("--codec", help="plain or packed records (default: packed)")
    data.add_argument(
        "--augment",
        metavar="PRESET",
        help="default, 22k, 1k, finetune or batched (default: default)",
    )
    data.add_argument(
        "--seed-weights",
        metavar="FILE|TAG",
        help="start the seed from a checkpoint or a timm tag (default: from scratch)",
    )
    size = parser.add_argument_group("how hard to look")
    size.add_argument(
        "--effort",
        help="smoke, normal or high: sets what names them as its defaults (default: normal)",
    )
    cuts = ", ".join(f"{effort} {1 - keeps:.0%}" for effort, keeps in STEP_KEEPS.items())
    size.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="steps from seed to target (default: as many as cut about this share each: "
        f"{cuts})".replace("%", "%%"),
    )
    for name, text in (
        ("shortlist", "candidates timed a step"),
        ("proxied", "candidates trained a step"),
        ("beam", "incumbents kept a step"),
        ("draws", "shortlists drawn before a step is stuck"),
        ("teacher_epochs", "epochs of the auto teacher"),
        ("seed_epochs", "epochs of the seed"),
        ("proxy_epochs", "epochs of a candidate"),
        ("final_epochs", "epochs of the final comparison"),
    ):
        size.add_argument(
            "--" + name.replace("_", "-"),
            type=int,
            metavar="N",
            help=f"{text} (default: {_defaults(name)})",
        )
    size.add_argument("--batch-size", type=int, metavar="N", help="training batch (default: 32)")
    size.add_argument(
        "--proxy-init", help="inherit the parent's sliced weights, or scratch (default: inherit)"
    )
    size.add_argument(
        "--strategy",
        metavar="NAME",
        help="who lists the candidates: contraction, random, uniform, evolution, tpe, nsga2, gp "
        "(default: contraction); all but the first look inside the target's band at once",
    )
    size.add_argument(
        "--importance",
        metavar="NAME",
        help="which units and blocks of its parent a child takes: prefix (the first ones), l1, l2 "
        "or taylor (default: l1)",
    )
    size.add_argument(
        "--no-racing",
        dest="racing",
        action="store_false",
        help="train every candidate to the end, also those that cannot win any more",
    )
    size.add_argument(
        "--freeze",
        action="append",
        metavar="PART",
        help="keep a factor, a slot or a stage as it is, may be repeated: window_sizes, "
        "'embed_dims[3]', stage1",
    )
    size.add_argument(
        "--metric",
        metavar="NAME",
        help="top1, balanced_accuracy or macro_f1 (default: top1); for the latter two every class "
        "counts alike in the scores",
    )
    size.add_argument(
        "--no-anchors",
        dest="anchors",
        action="store_false",
        help="do not add uniform scaling and published archs to the shortlists",
    )
    device = parser.add_argument_group("device and measuring")
    device.add_argument("--device", help="cpu, cuda or cuda:N (default: cpu)")
    device.add_argument(
        "--threads", type=int, metavar="N", help="torch threads (default: the usable CPUs)"
    )
    device.add_argument(
        "--bench-batch", type=int, metavar="N", help=f"images a pass ({_defaults('bench_batch')})"
    )
    device.add_argument(
        "--bench-runtime",
        metavar="NAME",
        help="what executes the networks that are timed: eager, eager-fused, compile, onnxruntime, "
        "openvino, ... (default: eager)",
    )
    device.add_argument("--bench-device", help="where they are timed (default: --device)")
    device.add_argument(
        "--no-measurement-cache",
        dest="measurement_cache",
        action="store_false",
        help="time everything anew instead of taking what earlier runs measured on this device",
    )
    device.add_argument("--bench-dtype", help="float32, bfloat16 or float16 (default: float32)")
    device.add_argument(
        "--bench-blocks",
        type=int,
        metavar="N",
        help=f"timed blocks at least ({_defaults('bench_blocks')})",
    )
    device.add_argument(
        "--bench-max-blocks",
        type=int,
        metavar="N",
        help=f"timed blocks at most ({_defaults('bench_max_blocks')})",
    )
    device.add_argument(
        "--measurements",
        metavar="FILE",
        help="reuse the measurements of equal fingerprint from another run's measurements.csv",
    )
    device.add_argument("--random-seed", type=int, metavar="N", help="of every draw (default: 0)")
    process = parser.add_argument_group("the run")
    process.add_argument(
        "--out", metavar="DIR", help="run folder (default: results/runs/DATE-TIME-SEED-TARGET)"
    )
    process.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="DIR",
        help="continue a run that was interrupted (DIR, or the --out folder)",
    )
    process.add_argument(
        "--finalists",
        metavar="FILE",
        help="with --resume: the finalists as measured on the device of --device-table",
    )
    process.add_argument(
        "--plan",
        action="store_true",
        help="tell what the run would do and cost after about a minute of measuring, and exit",
    )
    process.add_argument(
        "--replay",
        metavar="DIR",
        help="answer from what an earlier run measured and scored, training only what is missing",
    )
    process.add_argument(
        "--trust",
        type=int,
        metavar="N",
        help="afterwards train N kept and rejected candidates about 10x longer on several random "
        "seeds, and report how far the proxy scores can be trusted",
    )
    process.add_argument("--status", metavar="DIR", help="tell where a run stands, and exit")
    process.add_argument("--max-hours", type=float, metavar="H", help="stop in time, exit status 3")
    process.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="datasets, teachers, labels, seeds (default: $VISION_CONTRACTION_CACHE, or the "
        "user's cache folder)",
    )
    process.add_argument("--quiet", action="store_true", help="print nothing but errors")
    process.add_argument("--json", action="store_true", help="print the result as a last JSON line")
    return parser


_SESSION = (
    "out", "resume", "finalists", "plan", "trust", "status", "max_hours", "cache_dir", "quiet",
    "json",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, contract, report. Returns the exit status: 0 reached, 2 bad input, 3 stuck."""
    arguments = vars(build_parser().parse_args(argv))
    session_given = {k: arguments.pop(k) for k in _SESSION if k in arguments}
    out = session_given.get("out")
    try:
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
            _need(arguments)
        for name, parse in (
            ("target_params", parse_count),
            ("params_tolerance", parse_share),
            ("max_broken", parse_share),
        ):
            if name in arguments:
                arguments[name] = parse("--" + name.replace("_", "-"), arguments[name])
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
        **arguments, cache_dir=session_given.get("cache_dir"), trust=session_given.get("trust"),
        quiet=quiet,
    )  # fmt: skip
    if not quiet:
        print(text)
    if session_given.get("json"):
        print(json.dumps(dataclasses.asdict(made)))
    return EXIT_REACHED


def _run(
    arguments: Mapping[str, Any], session_given: Mapping[str, Any], out: Any, resume: bool
) -> int:
    started = time.monotonic()
    quiet = bool(session_given.get("quiet", False))
    outcome = contract(
        out=out,
        resume=resume,
        max_hours=session_given.get("max_hours"),
        cache_dir=session_given.get("cache_dir"),
        finalists=session_given.get("finalists"),
        trust=session_given.get("trust"),
        quiet=quiet,
        **arguments,
    )
    if not quiet:
        _farewell(outcome, time.monotonic() - started)
    if session_given.get("json"):
        print(json.dumps({**outcome.result, "out": str(outcome.folder)}))
    return outcome.exit_code


def _need(arguments: Mapping[str, Any]) -> None:
    """Refuse a new run without a seed or a target."""
    for name, example in (("seed", "--seed 21M"), ("target_params", "--target-params 5M")):
        if name not in arguments:
            flag = "--" + name.replace("_", "-")
            raise refuse(flag, "nothing", "a value", f"add, for example, {example}")


def _farewell(outcome: Outcome, seconds: float) -> None:
    """Print the final table, the paths and the next two commands."""
    from nas.report import final_table, next_commands

    print(final_table(outcome.folder))
    pace = outcome.result.get("seed_images_per_s")
    said = "" if pace is None else f" (the seed measured {pace:.0f} images/s here)"
    print(f"finished in {seconds / 60:.1f} minutes{said}")
    print(f"run folder: {outcome.folder}")
    print(f"report:     {outcome.folder / 'report.md'}")
    print("next:")
    for command in next_commands(outcome.folder):
        print(f"  {command}")


def entry() -> NoReturn:
    """Console-script entry: exit with the status of `main`."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
