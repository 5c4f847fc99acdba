"""Trainings to compare: one data set, one teacher, one trained seed, many short trainings.

Each training is kept in a folder under its name, whole or not at all, so that a benchmark that is stopped or extended
resumes with what is there. Several run at a time, each in a process of one thread: on a CPU that is faster than one
training on all cores, and what is compared are losses, not seconds.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.estimates import Floats
from nas.contract.checks import make_config, read_data, read_fingerprints, saved_config, with_absolute_paths
from nas.contract.plan import training_pace
from nas.contract.race import with_order
from nas.contract.run_folder import RunFolder
from nas.contract.seed import prepare_seed
from nas.contract.state import Incumbent, Run, Task
from nas.core.cli import default_cache, usable_cpus
from nas.core.config import parse_count
from nas.core.io import load_arrays
from nas.core.progress import Console
from nas.distill.jobs import ScoreJob, TrainJob, score
from nas.jobs.job import Job, Result
from nas.jobs.local import LocalExecutor
from space import get_family
from space.errors import InputError, refuse
from space.family import Arch
from space.sampling import sample_band

PROXY_SEED = 1
"""Random seed of the first short training."""
CRITERION = "l1"
"""Importance by which units are inherited, but where criteria are compared."""
LOOSE = ("target_params", "max_visits", "selection")
"""Settings that no training depends on: benchmarks that share a folder may differ in them."""


@dataclass(frozen=True)
class Training:
    """One training: an arch from scratch or from a parent, for `epochs`, from a random seed.

    `images` trains on a fixed subset of that size, `hard_weight` is the share of the loss that goes by true labels;
    `test`: on the test split too, at the end. With 0 epochs the parent's sliced weights are scored as they are, batch
    norms estimated anew if `recalibrate`.
    """

    arch: Arch
    init: str
    epochs: int
    random_seed: int
    parent: Incumbent | None = None
    test: bool = False
    images: int | None = None
    hard_weight: float = 0.0
    recalibrate: bool = True


@dataclass(frozen=True)
class Trained:
    """A finished training: its values, and the folder that holds its per-image results."""

    of: Training
    folder: Path
    values: Mapping[str, Any]
    failed: str | None = None

    def losses(self) -> Floats:
        """Return the soft losses of the holdout's images, `[n]`."""
        return load_arrays(self.folder / "holdout.safetensors")["soft_loss"].astype(np.float64)

    def correct(self) -> Floats:
        """Return for every image of the test split whether its class was hit, `[n]`."""
        return load_arrays(self.folder / "test.safetensors")["correct"].astype(np.float64)


class TrainingPool:
    """Runs trainings that share a `run`: its data, labels and folder."""

    def __init__(self, run: Run, workers: int) -> None:
        self.run = run
        self.workers = workers
        self.seed = prepare_seed(run)

    def train(self, wanted: Sequence[Training], deadline: float | None = None) -> list[Trained]:
        """Train all, `workers` at a time, in the order asked for; a failure is an outcome (`failed`).

        Raises OutOfTime at the deadline, which is on `time.monotonic()`.
        """
        tasks = [self._task(each) for each in wanted]
        self.run.console.start(sum(task.cost for task in tasks))
        try:
            results = self.do_all(tasks, self.workers, deadline=deadline, log=self.run.folder.path / "workers.log")
        finally:
            self.run.console.stop()
        return [
            Trained(of, task.out, result.values, result.reason)
            for of, task, result in zip(wanted, tasks, results, strict=True)
        ]

    def do_all(
        self, tasks: Sequence[Task], workers: int, *, deadline: float | None, remember: bool = False, **options: Any
    ) -> list[Result]:
        """Do jobs in worker processes of their own; `remember` as in `Run.do_all`, `options` of `LocalExecutor`."""
        run = copy.copy(self.run)
        run.deadline = deadline
        with LocalExecutor(workers=workers, **{"threads": 1, **options}) as run.executor:
            return run.do_all(tasks, remember=remember)

    def train_or_fail(self, wanted: Sequence[Training]) -> list[Trained]:
        """Train; one that fails ends the benchmark in one line."""
        done = self.train(wanted)
        failed = [t.failed for t in done if t.failed is not None]
        if failed:
            raise InputError(f"{len(failed)} trainings failed, the first: {failed[0]}")
        return done

    def parent(self, criterion: str) -> Incumbent:
        """Return the trained seed as a parent whose units are ranked by a criterion."""
        if criterion == "prefix":
            return self.seed
        run = copy.copy(self.run)
        run.config = replace(run.config, importance=criterion)
        found = with_order(run, self.seed)
        assert found.order is not None, f"no order by {criterion}"
        return found

    def cost(self, of: Training) -> float:
        """Return what a training takes, in GMACs forward and backward."""
        if of.epochs == 0:  # the holdout, forward only
            return len(self.run.dataset.holdout.labels) / 3 * self.run.image_cost(of.arch)
        every = len(self.run.dataset.train.labels)
        return min(of.images or every, every) * of.epochs * self.run.image_cost(of.arch)

    def affordable(self, images: float, hours: float) -> int:
        """Return how many archs of the last step's band can each train on so many images."""
        run = self.run
        band = run.band(run.config.steps)
        arch = sample_band(run.family, run.seed_arch, run.context, band, 1, random_seed=0)[0]
        return int(hours * 3600 * self.pace(arch) / images)

    def pace(self, arch: Arch) -> float:
        """Return how many images a second train on this machine, all workers together (rough)."""
        result = training_pace(self.run, arch, 8.0)
        self.run.executor.close()  # its threads would only be in the way
        return float(result.values["images_per_s"]) if result.ok else 50.0

    def _task(self, of: Training) -> Task:
        """Return the job of a training; of one with 0 epochs, the job that scores its parent."""
        name = self._name(of)
        settings = {f.name: getattr(of, f.name) for f in fields(of) if f.name != "recalibrate"}
        training = self.run.training(**settings, name=name)
        if of.epochs:
            return training
        job: TrainJob = training.job.argument
        assert job.parent is not None, "no training and no parent: nothing to score"
        same: dict[str, Any] = {f.name: getattr(job, f.name, None) for f in fields(ScoreJob)}
        scored = ScoreJob(**same | {"images": of.images, "recalibrate": of.recalibrate})
        return Task(Job(score, scored, name), training.out, self.cost(of))

    def _name(self, of: Training) -> str:
        parent = "" if of.parent is None else f"-{self.run.key(of.parent.arch)[:24]}"
        order = "" if of.parent is None or of.parent.order is None else f"-{of.parent.order.stem}"
        size = "" if of.images is None else f"x{of.images}"
        hard = f"-hard{of.hard_weight:g}" if of.hard_weight else ""
        raw = "" if of.recalibrate else "-raw"
        return f"{self.run.key(of.arch)}-{of.init}{of.epochs}{size}{hard}{raw}-r{of.random_seed}{parent}{order}"


def add_flags(parser: argparse.ArgumentParser, *, seed: str) -> None:
    """Add the flags of every benchmark of trainings, which `open_pool` reads."""
    add = parser.add_argument
    add("--budget-hours", type=float, default=2.0, help="what it may take on this machine (default %(default)s)")
    add("--seed", default=seed, help="the trained arch (default %(default)s)")
    add("--data", default="fractals", help="default %(default)s")
    add("--img-size", type=int, default=64, help="pixels (default %(default)s)")
    add("--seeds", type=int, default=3, help="random seeds (default %(default)s)")
    add("--seed-epochs", type=int, default=10, help="default %(default)s")
    add("--teacher-epochs", type=int, default=15, help="default %(default)s")
    add("--device", default="cpu", help="default %(default)s")
    add("--workers", type=int, default=usable_cpus(), help="trainings at a time")
    add("--random-seed", type=int, default=0, help="of what is drawn (default 0)")
    add("--work", type=Path, help="where trainings are kept (results/runs/lab-...)")
    add("--cache-dir", type=Path, default=default_cache(), help="data, teachers, labels")


def add_short_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every benchmark of short trainings, those of `add_flags` too."""
    add_flags(parser, seed="5M")
    add = parser.add_argument
    add("--archs", type=int, help="how many archs (default: what the budget pays)")
    add("--target-params", default="3.6M", help="middle of the band, +-10 %%")
    images = "training images of a short training; long ones see all (default %(default)s)"
    add("--images", type=int, default=1000, help=images)
    add("--proxy-epochs", type=int, default=2, help="default %(default)s")
    add("--truth-epochs", type=int, default=5, help="default %(default)s")


@contextmanager
def open_pool(given: argparse.Namespace, console: Console) -> Iterator[TrainingPool]:
    """Open the pool of these flags: data, teacher, labels and seed are found or made."""
    same = ("seed", "data", "img_size", "seed_epochs", "teacher_epochs", "proxy_epochs", "random_seed", "device")
    settings = {
        **{name: getattr(given, name) for name in same},
        "target_params": parse_count("--target-params", given.target_params),
        "final_epochs": given.truth_epochs,
        "threads": max(1, given.workers),
        "max_images": None,
        "effort": "smoke",
        "max_visits": 16,
        "steps": 1,
    }
    config = make_config(with_absolute_paths(settings))
    family = get_family(config.family)
    named = f"{Path(given.seed).stem}-{given.data.replace('/', '_')}-{given.img_size}"
    own = Path("results/runs") / f"lab-{named}-e{given.seed_epochs}-t{given.truth_epochs}"
    folder = RunFolder(given.work or own)
    dataset = read_data(config, given.cache_dir, console)
    if folder.run_json.exists():
        held = saved_config(folder.open()["config"])
        names = sorted(f.name for f in fields(config) if f.name not in LOOSE)
        changed = [name for name in names if getattr(held, name) != getattr(config, name)]
        if changed:
            folder.release()
            got = f"{folder.path} made with other {', '.join(changed)}"
            raise refuse("--work", got, "a folder of the same settings", "name another one")
    else:
        folder.create()
        folder.write_run({"config": config.to_dict()})
    worker = LocalExecutor(threads=config.threads, log=folder.path / "worker.log")
    try:
        run = Run(
            config=config,
            family=family,
            seed_arch=family.seed(config.seed),
            dataset=dataset,
            folder=folder,
            executor=worker,
            console=console,
            cache=given.cache_dir,
            deadline=None,
            fingerprints=read_fingerprints(config, worker, None),
        )
        pool = TrainingPool(run, max(1, given.workers))
        worker.close()  # its threads would only be in the way
        yield pool
    finally:
        console.stop()
        worker.close()
        folder.release()
