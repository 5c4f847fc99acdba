"""A Ray cluster of three nodes, disturbed while a contraction runs on it: one try.

Runs in a network of its own that has loopback only, as another address would be reachable.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from benchmarks.faults.references import Started, kill, one_line, orphans, start
from nas.core.cli import EXIT_BAD_INPUT

CPUS = 1


def make_cluster() -> Any:
    """Return a cluster: a head and two nodes, `others`, of one core each."""
    from ray.cluster_utils import Cluster

    made: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": CPUS, "include_dashboard": False})
    made.others = [made.add_node(num_cpus=CPUS) for _ in range(2)]
    return made


def cluster_flags(cluster: Any, copy_files: bool) -> list[str]:
    """Return the flags by which a run uses a cluster, whose nodes see its files or are sent all."""
    flags = ["--executor", "ray", "--ray-address", cluster.address]
    return [*flags, "--copy-files"] if copy_files else flags


def remove_in_every_step(cluster: Any, run: Started, out: Path) -> int:
    """Kill a node once in every step, while a job runs there, and add another; return how often."""
    removed = 0
    while run.process.poll() is None:
        time.sleep(0.05)
        try:
            text = (out / "attempts.csv").read_text()
        except OSError:
            continue
        if f"s{removed + 1}-" in text:
            victim = cluster.others.pop(0)
            cluster.remove_node(victim, allow_graceful=False)
            cluster.others.append(cluster.add_node(num_cpus=CPUS))
            removed += 1
    return removed


def main(path: str) -> None:
    """Run the try that a JSON file describes, and write its result to another."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    order = json.loads(Path(path).read_text())
    out, log = Path(order["out"]), Path(order["told"]).with_name("run.log")
    cluster = make_cluster()
    wrong: list[str] = []
    begun = time.monotonic()
    run = start([*order["begin"], *cluster_flags(cluster, order["copy_files"])], log)
    if order["act"] == "node":
        removed = remove_in_every_step(cluster, run, out)
        if removed < 2:
            wrong.append(f"only {removed} nodes removed")
    else:
        while run.process.poll() is None and not _under_way(out):
            time.sleep(0.1)
        time.sleep(order["after"] / 10)
        if order["act"] == "driver":
            kill([run.process.pid])
            run.end()
        else:
            cluster.remove_node(cluster.head_node, allow_graceful=False)
            code = run.end()
            wrong += one_line(run.output()) if code else ["a good end without its head"]
            wrong += [] if code in (0, EXIT_BAD_INPUT) else [f"status {code} without its head"]
            cluster.shutdown()
            cluster = make_cluster()
        wrong += [words for words in orphans(run.tag) if "nas." in words]
        run = start([*order["resume"], *cluster_flags(cluster, order["copy_files"])], log)
    code = run.end()
    if code:
        wrong.append(f"status {code}: {run.output().strip().splitlines()[-1:]}")
    took = time.monotonic() - begun
    wrong += [words for words in orphans(run.tag) if "nas." in words]
    Path(order["told"]).write_text(json.dumps({"wrong": wrong, "took_s": took}))
    cluster.shutdown()


def _under_way(out: Path) -> bool:
    """Return whether candidates are trained."""
    try:
        return "s1-" in (out / "attempts.csv").read_text()
    except OSError:
        return False
