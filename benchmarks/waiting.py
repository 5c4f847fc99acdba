"""How threads should wait: training images/s by OpenMP's spin count, on a quiet and a busy machine.

    python -m benchmarks.waiting [--threads 2] [--rounds 3] [--out results/waiting.csv]

Trains TinyViT-21M (48 px, batch 32, float32) for a few steps in a process of its own for each
setting, in turn, round by round; "busy" means that one other process keeps a core. The settings:
GNU OpenMP's default (threads spin for long), `GOMP_SPINCOUNT` of 10,000 and 1,000, and
`OMP_WAIT_POLICY=PASSIVE` (asleep at once). One line a setting: median and range over rounds.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from nas.cells import Writer
from nas.files import write_atomic
from nas.measure.fingerprint import take_fingerprint

SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
}
TIMED = """
import sys, time, torch
from nas.training.loop import TrainSettings, make_optimizer, place
from space import Context, get_family
torch.set_num_threads(int(sys.argv[1]))
family = get_family("tinyvit")
model = place(family.build(family.seed("21M"), Context(48, 10)), "cpu").train()
optimizer = make_optimizer(model, TrainSettings(epochs=1, lr=1e-4))
inputs = torch.randn(32, 3, 48, 48).contiguous(memory_format=torch.channels_last)
times = []
for _ in range(5):
    started = time.perf_counter()
    model(inputs).logsumexp(1).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    times.append(time.perf_counter() - started)
print(32 / sorted(times)[1])
"""
BUSY = "while True: pass"


def images_per_s(setting: dict[str, str], threads: int) -> float:
    """Train a few steps in a fresh process; return its images/s (second fastest of 5 steps)."""
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", TIMED, str(threads)],
        env={**clean, **setting, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.split()[-1])


def measure(threads: int, rounds: int) -> dict[tuple[str, str], list[float]]:
    """Measure every setting on the machine as it is, and with one more busy process."""
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for machine in ("quiet", "busy"):
            other = subprocess.Popen([sys.executable, "-c", BUSY]) if machine == "busy" else None
            try:
                for name, setting in SETTINGS.items():
                    pace = images_per_s(setting, threads)
                    found.setdefault((machine, name), []).append(pace)
            finally:
                if other is not None:
                    other.kill()
                    other.wait()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the table; the last line is JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.waiting", description=__doc__)
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--out", default=None, metavar="CSV")
    arguments = parser.parse_args(argv)
    if arguments.threads < 1 or arguments.rounds < 1:
        parser.error("--threads and --rounds: want integers >= 1")
    where = take_fingerprint("cpu", arguments.threads)
    text = io.StringIO()
    writer = Writer(text)
    writer.writerow(
        ("machine", "setting", "images_per_s", "lo", "hi", "rounds", "threads", "fingerprint")
    )
    best: dict[str, float] = {}
    for (machine, name), paces in measure(arguments.threads, arguments.rounds).items():
        middle = statistics.median(paces)
        best[f"{machine} {name}"] = round(middle, 1)
        row = (machine, name, round(middle, 1), round(min(paces), 1), round(max(paces), 1))
        writer.writerow((*row, len(paces), arguments.threads, where.id))
        print(f"{machine:6} {name:24} {middle:7.1f} images/s [{min(paces):.1f}, {max(paces):.1f}]")
    if arguments.out is not None:
        write_atomic(Path(arguments.out), text.getvalue().encode())
    print(json.dumps(best))
    return 0


if __name__ == "__main__":
    sys.exit(main())
