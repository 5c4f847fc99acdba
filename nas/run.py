"""One run at work: its configuration, folder, executor and books, and how a job is done in it."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas.config import RunConfig
from nas.data import Dataset
from nas.executor import InlineExecutor, LocalExecutor
from nas.files import read_json
from nas.jobs import Job, Result
from nas.measure.measurement import Measurement
from nas.measure.table import MeasurementTable
from nas.progress import Console
from nas.rundir import RunDir
from nas.search.ledger import Ledger
from space import Context
from space.errors import InputError
from space.family import Arch, Family

log = logging.getLogger(__name__)

MEASURE_COST = 250.0
"""A timing's share of the progress bar, in GMACs of training (about 3 s on two cores)."""


@dataclass(frozen=True)
class Incumbent:
    """An arch that a step may start from: its weights, throughput and score so far."""

    arch: Arch
    key: str
    weights: Path
    ratio: float
    images_per_s: float
    soft_loss: float


class Run:
    """What the steps of a run share. The driver's process holds exactly one.

    Opens the folder's books, `measurements.csv` and `study.db`; damaged ones are refused.
    """

    def __init__(
        self,
        *,
        config: RunConfig,
        family: Family,
        seed_arch: Arch,
        dataset: Dataset,
        folder: RunDir,
        executor: LocalExecutor | InlineExecutor,
        console: Console,
        cache: Path,
        deadline: float | None,
        fingerprint: Mapping[str, Any],
    ) -> None:
        self.config = config
        self.family = family
        self.seed_arch = seed_arch
        self.dataset = dataset
        self.context = Context(img_size=dataset.img_size, num_classes=len(dataset.classes))
        self.folder = folder
        self.executor = executor
        self.console = console
        self.cache = cache
        self.deadline = deadline
        self.fingerprint = fingerprint
        self.store: Mapping[str, Any] = {}
        self.measurements = MeasurementTable(folder.path / "measurements.csv")
        # A run that was killed early may have its run.json and no study yet.
        study = folder.path / "study.db"
        self.ledger = Ledger(study, create=not study.exists())
        self.seed_macs = family.count_macs(seed_arch, self.context)

    def key(self, arch: Arch) -> str:
        """Return the arch's key in this run's context."""
        return self.family.key(arch, self.context)

    def image_cost(self, arch: Arch) -> float:
        """Return the GMACs of training on one image, forward and backward."""
        return 3e-9 * self.family.count_macs(arch, self.context)

    def data_spec(self) -> dict[str, Any]:
        """Return what the user asked of the data, as plain JSON."""
        config = self.config
        return {
            "name": config.data,
            "img_size": config.img_size,
            "proxy_images": config.proxy_images,
            "max_broken": config.max_broken,
            "random_seed": config.random_seed,
        }

    # Jobs

    def do(self, job: Job, *, out: Path | None = None, cost: float = 0.0) -> Result:
        """Do a job, or take over what an earlier process of this run finished.

        `out` is the folder that the job leaves, whole or not at all, with its `result.json`.
        `cost` is its share of the progress bar. Failures that depend on the moment (the deadline)
        raise; failures of the job are results.
        """
        if out is not None and (out / "result.json").is_file():
            data = read_json(out / "result.json", "a finished job's result")
            needed = data.get("files", [])
            if all((out / name).is_file() for name in needed if name != "weights.safetensors"):
                self.console.advance(cost)
                return Result(job.key, True, data["values"], None, data["seconds"])
            shutil.rmtree(out)
        self.console.describe(job.key)
        moved = 0.0

        def tick(units: float) -> None:
            nonlocal moved
            step = cost * units / job.units if job.units else 0.0
            step = min(step, cost - moved)
            moved += step
            self.console.advance(step)

        result = self.executor.run(
            job, tick=tick, deadline=self.deadline, heartbeat=self.console.refresh
        )
        self.console.advance(cost - moved)
        if not result.ok and result.values.get("input_error"):
            raise InputError(result.reason)
        return result

    # Measuring

    def measure(
        self,
        arch: Arch,
        role: str,
        *,
        reference: Arch | None,
        ratio_at_least: float | None = None,
        images_per_s_at_least: float | None = None,
    ) -> Measurement | Result:
        """Time an arch, interleaved with the reference, or take the stored measurement.

        The measurement is in `measurements.csv` before it is returned. A failure (out of memory,
        say) is returned as the failed `Result`.
        """
        key = self.key(arch)
        reference_key = "" if reference is None else self.key(reference)
        known = self.measurements.find(
            role=role,
            arch_key=key,
            reference_key=reference_key,
            img_size=self.context.img_size,
            num_classes=self.context.num_classes,
            in_chans=self.context.in_chans,
            batch=self.config.bench_batch,
            dtype=self.config.bench_dtype,
            runtime="eager",
            fingerprint=self.fingerprint["id"],
        )
        if known is not None:
            self.console.advance(MEASURE_COST)
            return known
        spec = {
            "family": self.family.name,
            "arch": self.family.to_dict(arch),
            "reference": None if reference is None else self.family.to_dict(reference),
            "context": _context_dict(self.context),
            "batch": self.config.bench_batch,
            "dtype": self.config.bench_dtype,
            "device": self.config.device,
            "blocks": self.config.bench_blocks,
            "max_blocks": self.config.bench_max_blocks,
            "ratio_at_least": ratio_at_least,
            "images_per_s_at_least": images_per_s_at_least,
            "random_seed": self.config.random_seed,
        }
        result = self.do(Job("measure", f"{role}-{key}", spec), cost=MEASURE_COST)
        if not result.ok:
            return result
        measured = Measurement.from_dict(result.values)
        self.measurements.append(
            role=role,
            arch_key=key,
            arch_label=self.family.label(arch),
            reference_key=reference_key,
            measurement=measured,
        )
        return measured

    # Training

    def train(
        self,
        arch: Arch,
        name: str,
        *,
        out: Path,
        epochs: int,
        init: str,
        parent: Incumbent | None = None,
        first_epoch: int = 0,
        test: bool = False,
    ) -> Result:
        """Train an arch on the stored labels and score it on the holdout (job `train`).

        `init` is `scratch`, `inherit` (from `parent`) or `file:SOURCE`. With `test`, the test
        split is evaluated too, once. The folder `out` then holds the weights and the per-image
        losses; see `nas.runner` for the values.
        """
        spec = self.train_spec(
            arch, epochs=epochs, init=init, parent=parent, first_epoch=first_epoch, test=test
        )
        images = len(self.dataset.train.labels) * epochs
        cost = images * self.image_cost(arch)
        shared = self.folder.path not in out.parents
        spec = {**spec, "out": str(out), "shared": shared}
        job = Job("train", name, spec, units=float(images))
        return self.do(job, out=out, cost=cost)

    def train_spec(
        self,
        arch: Arch,
        *,
        epochs: int,
        init: str,
        parent: Incumbent | None,
        first_epoch: int,
        test: bool,
    ) -> dict[str, Any]:
        """Return everything that decides the outcome of a training, as plain JSON."""
        return {
            "family": self.family.name,
            "arch": self.family.to_dict(arch),
            "context": _context_dict(self.context),
            "dataset": str(self.dataset.folder),
            "store": self.store["folder"],
            "store_id": self.store["id"],
            "epochs": epochs,
            "batch_size": self.config.batch_size,
            "init": init,
            "parent": None
            if parent is None
            else {"arch": self.family.to_dict(parent.arch), "weights": str(parent.weights)},
            "first_epoch": first_epoch,
            "missing": self.config.missing_labels,
            "beyond": self.config.beyond,
            "label_epochs": self.store["use_epochs"],
            "random_seed": self.config.random_seed,
            "device": self.config.device,
            "test": test,
            # A long training may be cut anywhere; a short one is sooner done again.
            "checkpoint": epochs >= 5,
        }

    def spec_digest(self, spec: Mapping[str, Any]) -> str:
        """Return a name for everything that decides a cached training, this machine included."""
        whole = {
            **{k: v for k, v in spec.items() if k not in ("dataset", "store", "out", "checkpoint")},
            "dataset": self.dataset.fingerprint,
            "threads": self.config.threads,
            "fingerprint": self.fingerprint["id"],
            "started_from": _file_digest(str(spec["init"])),
        }
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:24]


def _file_digest(init: str) -> str | None:
    """Return the content hash of the checkpoint that `file:PATH` names; a path alone may lie."""
    kind, _, path = init.partition(":")
    if kind != "file" or not Path(path).is_file():
        return None
    with open(path, "rb") as content:
        digest = hashlib.sha256()
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _context_dict(context: Context) -> dict[str, int]:
    return {
        "img_size": context.img_size,
        "num_classes": context.num_classes,
        "in_chans": context.in_chans,
    }
