"""A Ray cluster of three nodes, disturbed while a contraction runs on it: one try.

Runs in a network of its own that has loopback only, as another address would be reachable.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from benchmarks.faults.references import Started, one_line, orphans, start
from nas.core.cli import EXIT_BAD_INPUT

CPUS = 1


def make_cluster() -> Any:
    """Return a cluster: a head and two nodes, `others`, of one core each."""
    from ray.cluster_utils import Cluster

    made: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": CPUS, "include_dashboard": False})
    made.others = [made.add_node(num_cpus=CPUS) for _ in range(2)]
    return made


def under_way(out: Path, step: int) -> bool:
    """Return whether candidates of a step were trained."""
    try:
        return f"s{step}-" in (out / "attempts.csv").read_text()
    except OSError:
        return False


def remove_in_every_step(cluster: Any, run: Started, out: Path) -> int:
    """Kill a node once in every step, while a job runs there, and add another; return how often."""
    removed = 0
    while run.running:
        time.sleep(0.05)
        if under_way(out, removed + 1):
            cluster.remove_node(cluster.others.pop(0), allow_graceful=False)
            cluster.others.append(cluster.add_node(num_cpus=CPUS))
            removed += 1
    return removed


def main(path: str) -> None:
    """Run the try that a JSON file describes, and write its result beside it (`cluster.json`)."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    order = json.loads(Path(path).read_text())
    folder = Path(order["folder"])
    wrong: list[str] = []
    cluster = make_cluster()

    def started(words: list[str]) -> Started:
        sent = ["--copy-files"] if order["copy_files"] else []  # else the nodes see the run's files
        flags = ["--executor", "ray", "--ray-address", cluster.address, *sent]
        return start([*words, *flags], folder / "run.log")

    begun = time.monotonic()
    run = started(order["begin"])
    if order["act"] == "node":
        removed = remove_in_every_step(cluster, run, folder / "out")
        if removed < 2:
            wrong.append(f"only {removed} nodes removed")
    else:
        while run.running and not under_way(folder / "out", 1):
            time.sleep(0.1)
        time.sleep(order["after"] / 10)
        if order["act"] == "driver":
            run.signal()
            run.end()
        else:
            cluster.remove_node(cluster.head_node, allow_graceful=False)
            code = run.end()
            wrong += one_line(run.output()) if code else ["a good end without its head"]
            wrong += [] if code in (0, EXIT_BAD_INPUT) else [f"status {code} without its head"]
            cluster.shutdown()
            cluster = make_cluster()
        wrong += [words for words in orphans(run.tag) if "nas." in words]
        run = started(order["resume"])
    code = run.end()
    if code:
        wrong.append(f"status {code}: {run.output().strip().splitlines()[-1:]}")
    took = time.monotonic() - begun
    wrong += [words for words in orphans(run.tag) if "nas." in words]
    (folder / "cluster.json").write_text(json.dumps({"wrong": wrong, "took_s": took}))
    cluster.shutdown()
