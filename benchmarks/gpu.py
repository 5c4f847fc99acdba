"""Run once, on a machine with a GPU, what no other machine can show: `python -m benchmarks.gpu --minutes 10`.

The tests marked `gpu`; published models in eager and compiled, in bfloat16 at batch 1 and 256, with their peak memory
and their ratios beside published ones; a proxy epoch beside bare training; labels made on the device; a contraction
that must reach a speedup there. Every part is a command of its own with a share of the minutes, and is ended with its
whole process group when that is over; what it has by then is kept, and the next one begins. `--out` holds a log and the
results of each part, and `results.json`, which is written after every part. `--device cpu --tiny` rehearses it without
a GPU. Exit status 0 when all parts ended well, 3 when one failed or ran out of time, 2 on bad input.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.estimates import check_at_least, run_command, write_table
from nas.core.cli import Parser
from nas.core.io import write_json
from nas.jobs.job import Job
from nas.jobs.local import LocalExecutor
from nas.measure import jobs
from nas.measure.device_table import OK, DeviceRow, read_rows
from nas.measure.jobs import FingerprintJob
from space.errors import refuse

ROOT = Path(__file__).resolve().parent.parent
GRACE_S = 5.0
"""Seconds that a part has to end after it was told to."""
INCOMPLETE = 3
LAST_LINES = 3


@dataclass(frozen=True)
class PublishedSpeeds:
    """Images/s of models on one GPU, as published for a runtime, all at one large batch; only ratios compare."""

    source: str
    gpu: str
    runtime: str
    images_per_s: Mapping[str, float]


PUBLISHED = (
    PublishedSpeeds(
        "TinyViT's README at microsoft/Cream 4a13c409 (traced, float16 by autocast)",
        "NVIDIA V100",
        "eager",
        {"5M": 3060, "11M": 2468, "21M": 1571},
    ),
    PublishedSpeeds(
        "timm 90cae8c results/benchmark-infer-amp-nchw-pt291-cu130-pro6000maxq.csv (float16 by autocast, batch 2048)",
        "NVIDIA RTX PRO 6000 Max-Q",
        "eager",
        {
            **{"5M": 9385.29, "11M": 8074.4, "21M": 4949.95},
            **{"deit_small_patch16_224": 11193.44, "deit_base_patch16_224": 4193.35},
            **{"test_vit": 268105.47, "test_vit2": 210746.16},
        },
    ),
    PublishedSpeeds(
        "timm 90cae8c results/benchmark-infer-bf16-nchw-pt291-cu130-pro6000maxq-dynamo.csv (bfloat16, batch 2048)",
        "NVIDIA RTX PRO 6000 Max-Q",
        "compile",
        {
            **{"5M": 17091.83, "11M": 14281.14, "21M": 8696.6},
            **{"deit_small_patch16_224": 14627.76, "deit_base_patch16_224": 5070.02},
            **{"test_vit": 662619.72, "test_vit2": 521634.79},
        },
    ),
)
"""timm's TinyViTs have 21,841 classes, ours 1,000. Nobody published batch 1."""


@dataclass(frozen=True)
class Size:
    """How large everything is: what is timed, and the flags of the other parts."""

    archs: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    batches: tuple[int, int]
    timing: tuple[str, ...]
    epoch: tuple[str, ...]
    labels: tuple[str, ...]
    contract: tuple[str, ...]


FULL = Size(
    archs=("5M", "deit_small_patch16_224", "deit_base_patch16_224", "11M", "21M"),
    pairs=(("5M", "21M"), ("11M", "21M"), ("deit_small_patch16_224", "deit_base_patch16_224")),
    batches=(1, 256),
    timing=(),
    epoch=("--students", "5M"),
    labels=("--data", "digits", "--img-size", "64", "--precision", "bfloat16"),
    contract=(
        *("--seed", "21M", "--target-params", "5M", "--effort", "smoke", "--data", "digits"),
        *("--require", "speedup>=1.3@{device}:eager:bfloat16:b1024"),  # at 48 px a smaller batch waits for launches
    ),
)
TINY_SEED = {
    **{"embed_dims": [32, 48, 64, 96], "depths": [1, 1, 2, 1], "window_sizes": [7, 14, 7]},
    **{"mbconv_expand_ratio": 4.0, "mlp_ratio": 4.0, "head_dim": 16},
}
TINY = Size(
    archs=("test_vit", "test_vit2"),
    pairs=(("test_vit", "test_vit2"),),
    batches=(1, 2),
    timing=(
        *("--reference", "test_vit2", "--img-size", "160", "--threads", "1"),
        *("--visits", "4", "--max-visits", "4"),
    ),
    epoch=("--students", "small", "--teacher", "small", "--img-size", "32", "--blocks", "6", "--threads", "1"),
    labels=("--data", "digits", "--img-size", "32", "--max-images", "200", "--epochs", "1", "--teacher-epochs", "1"),
    contract=(
        *("--seed", "{out}/seed.json", "--target-params", "200K", "--effort", "smoke", "--data", "digits"),
        *("--steps", "1", "--candidates-per-step", "2", "--train-per-step", "1", "--img-size", "32"),
        *("--max-images", "200", "--teacher-epochs", "1", "--seed-epochs", "1", "--final-epochs", "1"),
        *("--threads", "1", "--no-baselines", "--require", "speedup>=0.5@{device}:eager:b4"),
    ),
)


@dataclass(frozen=True)
class GpuPart:
    """One command (`python -m WORDS`), and its share of the time."""

    name: str
    share: float
    words: tuple[str, ...]


@dataclass(frozen=True)
class PartResult:
    """How a part ended: `ok`, `failed` or `out of time`; `reason` explains the latter, `found` is what it printed."""

    name: str
    state: str
    seconds: float
    limit_s: float
    reason: str
    found: Any
    command: str


@dataclass(frozen=True)
class RatioRow:
    """Images/s of a model over another's, measured here, beside what was published for another GPU."""

    arch: str
    over: str
    runtime: str
    dtype: str
    batch: int
    ratio: float
    lo: float
    hi: float
    published: float | None
    published_gpu: str
    source: str
    disturbed: str
    fingerprint: str

    def __str__(self) -> str:
        what = f"{self.arch} over {self.over}, {self.runtime} {self.dtype} batch {self.batch}"
        known = "none published" if self.published is None else f"{self.published:.2f} on {self.published_gpu}"
        note = f"; disturbed: {self.disturbed}" if self.disturbed else ""
        return f"{what}: {self.ratio:.2f} [{self.lo:.2f}, {self.hi:.2f}]; {known}{note}"


def build_parser() -> Parser:
    """Return the parser."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("python -m benchmarks.gpu", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--minutes", type=float, default=10.0, help="for everything (10)")
    add("--device", default="cuda", help="cuda or cuda:N; cpu with --tiny")
    add("--tiny", action="store_true", help="small sizes: a rehearsal")
    add("--only", nargs="+", metavar="PART", help="these parts")
    add("--out", type=Path, default=Path("results/gpu"), help="a new folder")
    return parser


def parts_of(size: Size, device: str, out: Path) -> list[GpuPart]:
    """Return all parts, in their order."""
    small, large = size.batches
    gpu_tests = sorted(str(p) for p in ROOT.glob("tests/test_*.py") if "mark.gpu" in p.read_text(encoding="utf-8"))

    def timing(share: float, runtime: str, batch: int) -> GpuPart:
        name = f"{runtime}-{batch}"
        words = ("benchmarks.throughput", "--arch", *size.archs, "--runtime", runtime, "--dtype", "bfloat16")
        where = ("--batch", str(batch), "--device", device, "--out", str(out / f"{name}.csv"))
        once = () if batch == small else ("--latency-passes", "0")  # latencies are of the batch of 1
        return GpuPart(name, share, (*words, *where, *once, *size.timing))

    cache = ("--cache-dir", str(out / "cache"))
    of_labels = ("nas.labels", "build", "--device", device, "--out", str(out / "labels"), *cache, "--json")
    of_epoch = ("benchmarks.labels", "epoch", "--device", device, "--out", str(out / "epoch.csv"), *cache)
    of_contract = ("nas.contract", "--device", device, "--out", str(out / "contract"), *cache, "--json")
    return [
        GpuPart("tests", 0.14, ("pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *gpu_tests)),
        timing(0.10, "eager", large),
        timing(0.20, "compile", large),
        GpuPart("labels", 0.06, (*of_labels, *size.labels)),
        GpuPart("epoch", 0.12, (*of_epoch, *size.epoch)),
        GpuPart("contract", 0.20, (*of_contract, *(word.format(device=device, out=out) for word in size.contract))),
        timing(0.06, "eager", small),
        timing(0.12, "compile", small),
    ]


def run_part(part: GpuPart, log: Path, limit_s: float, *, device: str = "cpu") -> PartResult:
    """Run a part's command into a log, for so long at most; its process group ends with it."""
    command = [sys.executable, "-m", *part.words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    started = time.monotonic()
    with log.open("wb") as printed:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end_group(process)
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    found = last_json(lines)
    reason = failure(part, code, lines, found, device)
    state = "ok" if not reason else "failed" if code is not None else "out of time"
    seconds = round(time.monotonic() - started, 1)
    if found is None and lines:
        found = lines[-1]
    return PartResult(part.name, state, seconds, round(limit_s, 1), reason, found, " ".join(["python", *command[1:]]))


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and its group: it is asked to, so that it ends its own workers, then killed."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(OSError):
            os.killpg(process.pid, sent)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)


def last_json(lines: Sequence[str]) -> Any:
    """Return the last line's object, where it is one."""
    with contextlib.suppress(ValueError, IndexError):
        found = json.loads(lines[-1])
        return found if isinstance(found, dict) else None
    return None


def failure(part: GpuPart, code: int | None, lines: Sequence[str], found: Any, device: str) -> str:
    """Explain why a part did not end well; empty if it did."""
    if code is None:
        return "its share of the minutes was over"
    if code != 0:
        said = [found["message"]] if isinstance(found, dict) and "message" in found else lines[-LAST_LINES:]
        return f"exit status {code}: {' | '.join(map(str, said))}"
    if isinstance(found, dict) and found.get("failed"):
        return f"{found['failed']} of {found.get('rows')} rows failed"
    if part.name == "tests" and device != "cpu" and " passed" not in (lines or [""])[-1]:
        return "no test ran"
    return ""


def run_parts(parts: Sequence[GpuPart], minutes: float, out: Path, *, device: str = "cpu") -> Iterator[PartResult]:
    """Run parts one after the other, each within its share of the time that is left."""
    until = time.monotonic() + 60.0 * minutes - 2 * GRACE_S
    for number, part in enumerate(parts):
        left = sum(each.share for each in parts[number:])
        limit_s = max(0.0, until - time.monotonic()) * part.share / left
        yield run_part(part, out / f"{part.name}.log", limit_s, device=device)


def measured_rows(out: Path) -> list[DeviceRow]:
    """Return what the tables of a folder hold that was measured, also those of parts that were ended."""
    tables = sorted([*out.glob("eager-*.csv"), *out.glob("compile-*.csv")])
    return [row for path in tables for row in read_rows(path, "--out") if row.state == OK]


def ratio_rows(rows: Sequence[DeviceRow], size: Size) -> list[RatioRow]:
    """Return the ratio of every pair in every setting, beside each published one of that runtime at a large batch.

    Both are timed beside one reference; the interval of a pair without the reference is that of the quotient's ends.
    """
    found = []
    by_net = {(row.arch, row.setting): row for row in rows if row.measured.ratio is not None}
    for (arch, setting), row in by_net.items():
        over = dict(size.pairs).get(arch)
        if over is None:
            continue
        base = (1.0, 1.0, 1.0)
        if not row.reference.startswith(f"{over}@"):
            if (over, setting) not in by_net:
                continue
            base = by_net[over, setting].measured.interval("speedup")
        middle, lo, hi = row.measured.interval("speedup")
        known = [p for p in PUBLISHED if p.runtime == setting.runtime and {arch, over} <= p.images_per_s.keys()]
        for of in known if setting.batch == max(size.batches) else [None]:
            found.append(
                RatioRow(
                    arch=arch,
                    over=over,
                    runtime=setting.runtime,
                    dtype=setting.dtype,
                    batch=setting.batch,
                    ratio=middle / base[0],
                    lo=lo / base[2],
                    hi=hi / base[1],
                    published=None if of is None else of.images_per_s[arch] / of.images_per_s[over],
                    published_gpu="" if of is None else of.gpu,
                    source="" if of is None else of.source,
                    disturbed=row.measured.disturbed,
                    fingerprint=row.fingerprint,
                )
            )
    return found


def memory_result(rows: Sequence[DeviceRow]) -> PartResult:
    """Return the peak memory of what was timed, as a part's result."""
    found = {f"{row.arch}@{row.setting.text}": row.measured.peak_mem_bytes for row in rows}
    missing = [name for name, peak in found.items() if peak is None]
    reason = f"not measured: {', '.join(missing)}" if missing else "" if found else "nothing was timed"
    return PartResult("memory", "failed" if reason else "ok", 0.0, 0.0, reason, found, "")


def fingerprint_of_device(device: str) -> dict[str, Any]:
    """Look at the device in a process that ends again: this one leaves the GPU to the parts. Raises InputError."""
    with LocalExecutor(threads=1) as worker:
        found = worker.run(Job(jobs.fingerprint, FingerprintJob(device=device), "fingerprint"))
    if not found.ok:
        raise refuse("--device", device, "a device that torch sees", "--device cpu --tiny rehearses without one")
    return dict(found.values["fingerprint"])


def run_benchmark(given: argparse.Namespace) -> dict[str, Any]:
    """Run the parts, print how each ended and the ratios, and return what is on disk. Raises InputError."""
    check_at_least(given, minutes=0.5)
    out, size = given.out.resolve(), TINY if given.tiny else FULL
    if given.device == "cpu" and not given.tiny:
        raise refuse("--device", "cpu", "cuda or cuda:N", "--device cpu --tiny rehearses without one")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise refuse("--out", given.out, "a new folder", "name another one")
    parts = parts_of(size, given.device, out)
    for name in given.only or []:
        if name not in {part.name for part in parts}:
            raise refuse("--only", name, f"one of {', '.join(part.name for part in parts)}")
    parts = [part for part in parts if given.only is None or part.name in given.only]
    machine = fingerprint_of_device(given.device)
    out.mkdir(parents=True, exist_ok=True)
    if given.tiny:
        write_json(out / "seed.json", TINY_SEED)
    ended: list[PartResult] = []
    results, ratios = ended, list[RatioRow]()
    for result in run_parts(parts, given.minutes, out, device=given.device):
        ended.append(result)
        results, ratios = write_results(out, size, ended, {"command": given.command, "fingerprint": machine})
        print(f"{result.name:<12} {result.state:<12} {result.seconds:6.1f} s  {result.reason}", flush=True)
    for ratio in ratios:
        print(ratio)
    bad = [result for result in results if result.state != "ok"]
    for result in bad:
        log = f"; see {out / result.name}.log" if result.command else ""
        print(f"{result.state}: {result.name}: {result.reason}{log}")
    given.status = INCOMPLETE if bad else 0
    return {"parts": {each.name: each.state for each in results}, "out": str(out), "fingerprint": machine["id"]}


def write_results(
    out: Path, size: Size, ended: Sequence[PartResult], more: Mapping[str, Any]
) -> tuple[list[PartResult], list[RatioRow]]:
    """Write and return what there is so far: how parts ended, with that of the peak memory, and the ratios."""
    rows = measured_rows(out)
    results, ratios = list(ended), ratio_rows(rows, size)
    if any("benchmarks.throughput" in result.command for result in ended):
        results.append(memory_result(rows))
    content = {"parts": [dataclasses.asdict(r) for r in results], "ratios": [dataclasses.asdict(r) for r in ratios]}
    write_json(out / "results.json", {**more, **content})
    if ratios:
        write_table(out / "ratios.csv", ratios)
    return results, ratios


def main(argv: Sequence[str] | None = None) -> int:
    """Run; the last line is JSON. Exit status: see above."""
    return run_command(build_parser(), run_benchmark, argv)


if __name__ == "__main__":
    sys.exit(main())
