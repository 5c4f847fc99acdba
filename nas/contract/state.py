"""The state of a run: configuration, folder, executor, study and timings; and how it runs jobs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nas.contract.run_folder import RunFolder
from nas.contract.timing import Timings
from nas.core.config import RunConfig
from nas.core.dataclass_json import to_json
from nas.core.io import file_sha256
from nas.core.per_image import with_metric
from nas.core.progress import Console
from nas.core.requirement import Requirement
from nas.data import Dataset
from nas.distill import jobs
from nas.distill.jobs import EarlierRung, ParentWeights, TrainJob
from nas.jobs.job import CHECKPOINT, Job, Result, failed_before, finished_before, keep_failure
from nas.jobs.queue import Executor
from nas.measure.device_table import DeviceTable
from nas.search.constraints import band_at, primary_setting, settings_of
from nas.search.storage import SharedStudy
from nas.search.strategies import get_strategy
from nas.search.study import Trial, open_study
from nas.train.optim import peak_lr
from space.contractions import Band
from space.errors import InputError
from space.family import Arch, Family

RUNG = "-rung"
"""Stands between a training's name and the epochs of a rung in the name of the rung's job."""
MORE = "-more"
"""Ends the name of a job that trains a finalist of a race on the saved epochs."""


@dataclass(frozen=True)
class Incumbent:
    """A kept trial with weights, which a step may start from.

    `order` is the file with the importance order of its units and blocks; None keeps the first. `step` is that of its
    trial, `parent` the source of its weights; `second_loss` a finalist's soft loss from a second random seed.
    """

    arch: Arch
    key: str
    weights: Path
    ratio: float
    images_per_s: float
    soft_loss: float
    soft_loss_se: float = 0.0
    order: Path | None = None
    step: int = 0
    parent: Incumbent | None = None
    second_loss: float | None = None


@dataclass(frozen=True)
class Earlier:
    """An earlier run: its folder, configuration, scored trials with their archs, and its models.

    `models` are those in its `models/`. `before` is the run that it replayed itself, if that still exists.
    """

    folder: Path
    config: RunConfig
    data: Mapping[str, Any]
    scored: tuple[tuple[Trial, Arch], ...]
    models: tuple[Incumbent, ...]
    before: Earlier | None = None


@dataclass(frozen=True)
class Task:
    """A job that writes the folder `out`, and its share of the progress bar."""

    job: Job
    out: Path
    cost: float


def derived_seed(*parts: object) -> int:
    """Return a random seed for one decision, from the run's random seed and the decision's name."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


@dataclass(frozen=True)
class Work:
    """Counted work: timings (of one arch under one setting), trainings and their GMACs.

    GMACs are of training, forward and backward, without the teacher's and without scoring.
    """

    timings: int
    trainings: int
    train_gmacs: float


@dataclass(kw_only=True, eq=False)
class Run:
    """What the steps of a run share; one per driver process.

    Opens `measurements.csv` and `study.db`; damaged ones are refused.
    """

    config: RunConfig
    family: Family
    seed_arch: Arch
    dataset: Dataset
    folder: RunFolder
    executor: Executor
    console: Console
    cache: Path
    deadline: float | None
    fingerprints: Mapping[str, Mapping[str, Any]]
    table: DeviceTable | None = None
    earlier: Earlier | None = None
    storage: SharedStudy | None = None

    def __post_init__(self) -> None:
        config = self.config
        self.context = self.dataset.context
        self.fingerprint = self.fingerprints[config.device]
        self.strategy = get_strategy(config.strategy)
        self.primary, self.settings = primary_setting(config), settings_of(config)
        self.trained: dict[str, float] = {}
        self.counted: dict[tuple[str, Band], int] = {}
        # Where the steps' bounds start to tighten: the seed, or a model of an earlier run.
        self.start_values: Mapping[Requirement, float] = {}
        self.start_params = self.family.count_params(self.seed_arch, self.context)
        self.start_macs = self.family.count_macs(self.seed_arch, self.context)
        self.start_ratio = 1.0
        self.store: Mapping[str, Any] = {}
        self.timings = Timings(
            config=config,
            family=self.family,
            context=self.context,
            folder=self.folder.path,
            cache=self.cache,
            console=self.console,
            fingerprints=self.fingerprints,
            table=self.table,
            do=self.do,
        )
        self.study = open_study(self.folder.path, self.storage)

    def key(self, arch: Arch) -> str:
        """Return the arch's key in this run's context."""
        return self.family.key(arch, self.context)

    def trial_folder(self, trial: Trial) -> Path:
        """Return the folder of a trial's last training, with its losses per image."""
        more = MORE if trial.epochs > self.config.proxy_epochs else ""
        cut = f"{RUNG}{trial.epochs}" if trial.stage == "race" else more
        return self.folder.job_folder(f"s{trial.step}-{trial.key}{cut}")

    def incumbent(self, trial: Trial, parent: Incumbent | None = None) -> Incumbent:
        """Return a kept trial of this run as an incumbent."""
        assert trial.ratio is not None
        assert trial.images_per_s is not None
        assert trial.soft_loss is not None
        return Incumbent(
            arch=self.family.arch(self.study.arch(trial.step, trial.key)),
            key=trial.key,
            weights=self.trial_folder(trial) / "weights.safetensors",
            ratio=trial.ratio,
            images_per_s=trial.images_per_s,
            soft_loss=trial.soft_loss,
            soft_loss_se=trial.soft_loss_se or 0.0,
            step=trial.step,
            parent=parent,
        )

    def image_cost(self, arch: Arch) -> float:
        """Return the GMACs of training on one image, forward and backward."""
        return 3e-9 * self.family.count_macs(arch, self.context)

    def first_epoch(self, step: int) -> int:
        """Return the first epoch of labels that a step's candidates train on.

        A stepwise strategy continues where the parents stopped; the others compare the candidates of all steps, which
        therefore see the same batches.
        """
        return (step - 1) * self.config.proxy_epochs if self.strategy.stepwise else 0

    def note(self, part: str, notes: Iterable[str]) -> None:
        """Print what was decided about a part of the run, and keep it in `run.json`, where the report finds it."""
        lines = [f"{part}: {note}" for note in notes]
        for line in lines:
            self.console.line(line)
        self.folder.add_notes(lines)

    def work(self) -> Work:
        """Return the work of this run so far, whether it was done now or taken from a cache."""
        trained = {name.split(RUNG)[0].removesuffix(MORE) for name in self.trained}
        return Work(len(self.timings.asked), len(trained), sum(self.trained.values()))

    def band(self, step: int) -> Band:
        """Return the parameter band of a step; the target's for strategies that take no steps."""
        step = step if self.strategy.stepwise else self.config.steps
        return band_at(self.start_params, self.config, step)

    # Jobs

    def do(self, job: Job, *, cost: float = 0.0) -> Result:
        """Run a job without a folder; a failure of the job is a result.

        `cost` is its share of the progress bar. Raises OutOfTime at the deadline, and InputError.
        """
        (result,) = self._stream([job], {job.key: cost})
        return result

    def do_all(self, tasks: Sequence[Task], *, remember: bool = False) -> list[Result]:
        """Run jobs that write folders, in parallel where the executor can; results in their order.

        Each writes its folder whole or not at all, with its `result.json`. Results of an earlier process are reused;
        with `remember`, failures too.
        """
        found: dict[str, Result] = {}
        open_tasks = {}
        for task in tasks:
            known = failed_before(task.out) if remember else None
            known = known or finished_before(task.out, task.job.key)
            if known is None:
                open_tasks[task.job.key] = task
            else:
                self.console.advance(task.cost)
                found[task.job.key] = known
        costs = {key: task.cost for key, task in open_tasks.items()}
        for result in self._stream([task.job for task in open_tasks.values()], costs):
            found[result.key] = result
            if remember and not result.ok:
                keep_failure(open_tasks[result.key].out, result)
        return [found[task.job.key] for task in tasks]

    def _stream(self, jobs: Sequence[Job], costs: Mapping[str, float]) -> Iterator[Result]:
        """Run jobs, advance the progress bar, and yield their results as they end."""
        moved = dict.fromkeys(costs, 0.0)
        units = {job.key: job.units for job in jobs}

        def tick(key: str, done: float) -> None:
            step = costs[key] * done / units[key] if units[key] else 0.0
            step = min(step, costs[key] - moved[key])
            moved[key] += step
            self.console.advance(step)

        if jobs:
            others = f" and {len(jobs) - 1} more" if len(jobs) > 1 else ""
            self.console.describe(f"{jobs[0].key}{others}")
        for result in self.executor.stream(jobs, tick=tick, deadline=self.deadline, heartbeat=self.console.refresh):
            self.console.advance(costs[result.key] - moved[result.key])
            if not result.ok and result.values.get("input_error"):
                raise InputError(result.reason)
            yield result

    # Training

    def job_fields(self, arch: Arch) -> dict[str, Any]:
        """Return the fields that jobs on a network, the images and their labels share."""
        return {
            "family": self.family.name,
            "arch": self.family.to_dict(arch),
            "context": self.context,
            "dataset": self.dataset.folder,
            "store": Path(self.store["folder"]),
            "missing": self.config.missing_labels,
            "batch_size": self.config.batch_size,
            "device": self.config.device,
        }

    def training(
        self,
        arch: Arch,
        name: str,
        *,
        epochs: int,
        out: Path | None = None,
        init: str | None = None,
        parent: Incumbent | None = None,
        before: tuple[int, Path] | None = None,
        images: int | None = None,
        hard_weight: float = 0.0,
        **more: Any,
    ) -> Task:
        """Return the task of training an arch on the stored labels and scoring it on the holdout.

        Without `out` it is kept in the run's folder under its name; without `init` it starts as the run's proxies do.
        `before` continues an earlier rung: its epochs and its folder; a `hard_weight` replaces the run's `--distill`.
        `more` are fields of `nas.distill.jobs.TrainJob`.
        """
        config, family = self.config, self.family
        out, init = out or self.folder.job_folder(name), init or config.proxy_init
        each = len(self.dataset.train.labels)
        images = None if images is None or images >= each else images
        done = 0 if before is None else before[0]
        job = TrainJob(
            **self.job_fields(arch),
            store_id=self.store["id"],
            label_epochs=self.store["use_epochs"],
            label_overflow=config.label_overflow,
            epochs=epochs,
            lr=peak_lr("scratch" if init == "scratch" else "inherit", family.count_params(arch, self.context)),
            init=init,
            parent=None
            if parent is None
            else ParentWeights(arch=family.to_dict(parent.arch), weights=parent.weights, order=parent.order),
            distill="sparse" if hard_weight else config.distill,
            hard_weight=hard_weight,
            # A long training may be cut anywhere; a short one is sooner done again.
            checkpoint=epochs >= 5,
            shared=self.folder.path not in out.parents,
            out=out,
            images=images,
            continue_from=None if before is None else EarlierRung(epochs=done, checkpoint=before[1] / CHECKPOINT),
            **{"random_seed": config.random_seed, **more},
        )
        total = (images or each) * ((job.rung or epochs) - done)
        # Weights that the user named stay on the driver's machine, and so does the job.
        driver_only = init.startswith("file:")
        call = Job(jobs.train, job, name, float(total), driver_only=driver_only)
        return Task(call, out, total * self.image_cost(arch))

    def train(self, arch: Arch, name: str, **more: Any) -> Result:
        """Train one arch; see `training`."""
        return self.train_all([self.training(arch, name, **more)])[0]

    def train_all(self, tasks: Sequence[Task], **options: Any) -> list[Result]:
        """Run trainings as `do_all` does, count them as work, and add the run's metric."""
        for task in tasks:
            self.trained[task.job.key] = task.cost
        results = self.do_all(tasks, **options)
        metric, classes = self.config.metric, self.dataset.num_classes
        if metric == "top1":
            return results
        return [
            replace(result, values=with_metric(result.values, task.out, metric, classes)) if result.ok else result
            for task, result in zip(tasks, results, strict=True)
        ]

    def training_digest(self, job: TrainJob) -> str:
        """Return a key of everything that decides a cached training, this machine included."""
        places = ("dataset", "store", "out", "checkpoint", "shared", "check_mirror")
        kind, _, checkpoint = job.init.partition(":")
        whole = {
            **{k: v for k, v in to_json(job).items() if k not in places},
            "dataset": self.dataset.fingerprint,
            "batch_norms": "settled",
            "threads": self.config.threads,
            "fingerprint": self.fingerprint["id"],
            "started_from": _content_of(checkpoint) if kind == "file" else None,  # it may change
        }
        if job.label_epochs is not None:  # more labels than a training comes to change nothing
            whole["label_epochs"] = min(job.label_epochs, job.first_epoch + job.epochs)
        if self.config.metric != "top1":
            whole["metric"] = self.config.metric
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:24]


def _content_of(source: str) -> list[str] | None:
    """Hash the files of named weights, and the JSON beside them, which holds the names of their classes."""
    paths = [Path(source), Path(source.partition(":")[2] or source)]
    path = next((each for each in paths if each.exists()), None)
    if path is None:
        return None
    files = sorted(path.iterdir()) if path.is_dir() else [path, path.with_suffix(".json")]
    return [file_sha256(each) for each in files if each.is_file()]
