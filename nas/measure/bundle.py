"""The script of a bundle: times its ONNX files on a board that has numpy and onnxruntime alone.

`python -m benchmarks.throughput --bundle DIR` packs this and what it needs into DIR/throughput.pyz.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from nas.core.cli import exit_status, read_threads, usable_cpus
from nas.core.io import member, read_json
from nas.core.requirement import Setting
from nas.measure.device_table import FAILED, OK, DeviceRow, fingerprint_columns, read_rows, write_rows
from nas.measure.fingerprint import take_fingerprint
from nas.measure.interleave import TimingPlan, keep_freed_memory, time_visit
from nas.measure.intervals import MIN_VISITS, planned_looks
from nas.measure.measurement import Throughput, combined
from nas.measure.runtimes import PreparedModel
from nas.measure.runtimes.from_onnx import open_session
from space.errors import InputError, refuse

LIST = "networks.json"


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python throughput.pyz",
        description="Time the networks beside this file, each in several processes and in blocks that "
        "alternate with the reference's, and write the table for nas.contract --device-table.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the table as CSV")
    parser.add_argument("--resume", action="store_true", help="take over the rows of --out")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--threads", type=int, help="(default: the usable CPUs)")
    parser.add_argument("--visits", type=int, default=4, help="processes that time a network, at least (default: 4)")
    parser.add_argument("--max-visits", type=int, default=16, help="at most (default: 16)")
    parser.add_argument("--precision", type=float, default=0.03, help="asked half width as a share (default: 0.03)")
    parser.add_argument("--networks", type=Path, help="the bundle's folder (default: this file's)")
    parser.add_argument("--visit", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; returns the exit status, 2 for bad input in one line."""
    given = build_parser().parse_args(argv)
    return exit_status(lambda: _main(given))


def _main(given: argparse.Namespace) -> int:
    folder = given.networks or Path(sys.argv[0]).resolve().parent
    networks = read_networks(folder)
    if given.visit is not None:
        print(json.dumps(visit(folder, networks, given)))
        return 0
    if given.visits < MIN_VISITS or given.max_visits < given.visits:
        raise refuse("--visits", f"{given.visits} to {given.max_visits}", f"{MIN_VISITS} or more, in order")
    if given.threads is not None:
        read_threads(given.threads)
    if not 0.0 <= given.precision < 1.0:
        raise refuse("--precision", given.precision, "a share in [0, 1)")
    if given.out.is_dir() or not given.out.parent.is_dir():
        raise refuse("--out", given.out, "a file in an existing folder")
    known = {}
    if given.out.exists():
        if not given.resume:
            raise refuse("--out", f"{given.out}, which exists", "a new file", "or add --resume")
        known = {row.conditions: row for row in read_rows(given.out, "--out")}
    bench = _Bench(folder, networks, given)
    rows: list[DeviceRow] = []
    for number, network in enumerate(networks, start=1):
        row = bench.row(network, known)
        rows.append(row)
        write_rows(given.out, rows)
        speed = row.reason
        if row.state == OK:
            at = row.measured
            speed = f"{at.images_per_s:.1f} [{at.images_per_s_lo:.1f}, {at.images_per_s_hi:.1f}] images/s"
            speed += f", {at.ratio:.3f}x the reference"
        print(f"{number}/{len(networks)}  {row.key}  {speed}", flush=True)
    failed = sum(row.state == FAILED for row in rows)
    print(json.dumps({"rows": len(rows), "failed": failed, "out": str(given.out)}))
    return 0


def read_networks(folder: Path) -> list[dict[str, Any]]:
    """Read the list of a bundle's networks. Raises InputError."""
    path = folder / LIST
    try:
        listed: list[dict[str, Any]] = read_json(path, "the list of a bundle")["networks"]
        sizes = {(n["batch"], n["img_size"]) for n in listed}
        beside = {(n["batch"], n["img_size"]) for n in listed if n["reference"]}
        for each in listed:
            member(folder, each["file"], f"{path}: file", links=True)
    except (KeyError, TypeError) as error:
        got = f"{type(error).__name__}: {error}"
        raise refuse(str(path), got, "the list of a bundle", "make the bundle again") from None
    if not listed or sizes != beside:
        raise refuse(str(path), f"{len(listed)} networks", "networks with a reference each", "make the bundle again")
    return listed


class _Bench:
    """Makes visits on this device: each is a process of its own."""

    def __init__(self, folder: Path, networks: Sequence[Mapping[str, Any]], given: argparse.Namespace) -> None:
        import onnxruntime

        self._folder, self._given, self._threads = folder, given, given.threads or usable_cpus()
        self._version = f"onnxruntime {onnxruntime.__version__}"
        self._device = take_fingerprint(given.device, self._threads)
        self._references = references(networks)

    def row(self, network: Mapping[str, Any], known: Mapping[tuple[Any, ...], DeviceRow]) -> DeviceRow:
        """Time one network beside its reference; a failure is a row."""
        beside = self._references[network["batch"], network["img_size"]]
        setting = Setting(self._given.device, "onnxruntime", "float32", network["batch"])
        on = self._device.under(setting, self._version, network["img_size"])
        named = ("arch", "family", "key", "spec", "img_size", "num_classes", "params", "macs")
        empty = DeviceRow(
            **{name: network[name] for name in named},
            setting=setting,
            threads=self._threads,
            state=FAILED,
            reference=f"{beside['arch']}@{setting.text}",
            **fingerprint_columns(on),
        )
        if empty.conditions in known:
            return known[empty.conditions]
        given, visits = self._given, list[Throughput]()
        looks = planned_looks(given.visits, given.max_visits if given.precision else given.visits)
        for look in looks:
            while len(visits) < look:
                found = self._visit(network["file"])
                if "input_error" in found:
                    raise InputError(found["input_error"])
                if "reason" in found:
                    return replace(empty, reason=found["reason"])
                visits.append(Throughput(**found))
            timed = combined(visits, len(looks))
            if timed.half_width <= given.precision:
                break
        if network["batch"] != 1:
            return replace(empty, state=OK, throughput=timed.with_latency(None))
        return replace(empty, state=OK, throughput=timed, latency_passes=timed.passes)

    def _visit(self, file: str) -> dict[str, Any]:
        script = [sys.argv[0]] if sys.argv[0].endswith(".pyz") else ["-m", "nas.measure.bundle"]
        more = ["--visit", file, "--networks", str(self._folder), "--device", self._given.device]
        command = [sys.executable, *script, *more, "--threads", str(self._threads), "--out", "none"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = done.stdout.strip().splitlines()
        if done.returncode or not lines:
            text = " ".join(done.stderr.split())[-150:]
            return {"reason": f"a visit ended with status {done.returncode}: {text}"}
        found: dict[str, Any] = json.loads(lines[-1])
        return found


def visit(folder: Path, networks: Sequence[Mapping[str, Any]], given: argparse.Namespace) -> dict[str, Any]:
    """Time the network of a file beside its reference in this process; whatever a runtime raises is a reason."""
    keep_freed_memory()
    network = next(each for each in networks if each["file"] == given.visit)
    beside = references(networks)[network["batch"], network["img_size"]]
    try:
        timers = [_session(folder, each, given).timer for each in (network, beside)]
        timed = time_visit(timers, [network["batch"]] * 2, TimingPlan(), given.device)[0]
    except InputError as error:
        return {"input_error": str(error)}
    except Exception as error:
        return {"reason": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
    return asdict(replace(timed, done="ONNX"))


def references(networks: Sequence[Mapping[str, Any]]) -> dict[tuple[int, int], Mapping[str, Any]]:
    """Return the reference of each batch and resolution."""
    return {(n["batch"], n["img_size"]): n for n in networks if n.get("reference", False)}


def _session(folder: Path, network: Mapping[str, Any], given: argparse.Namespace) -> PreparedModel:
    size = network["img_size"]
    rng = np.random.default_rng(0)
    images = rng.standard_normal((network["batch"], 3, size, size), dtype=np.float32)
    path = member(folder, network["file"], f"{LIST}: file", links=True)
    if not path.is_file():
        raise refuse(str(path), "no such file", "an ONNX file of the bundle", "copy it whole")
    threads = given.threads or usable_cpus()
    return open_session(path, images, device=given.device, threads=threads, done="ONNX")


if __name__ == "__main__":
    sys.exit(main())
