"""One full training: the model, its batches and teacher, and the models that it saves."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nas.core.io import write_json
from nas.core.progress import Tick
from nas.data import Dataset
from nas.data.augment.spec import AugmentSpec, preset_spec
from nas.export.load import find_network
from nas.export.save import write_model
from nas.export.teacher_net import TeacherInfo, load_teacher
from nas.export.weights import load_into, load_weights, read_metadata
from nas.labels.reader import LabelReader
from nas.labels.store import open_store
from nas.train.batches import LiveBatches, RankShard, ReplayBatches, Source
from nas.train.distributed import Ranks
from nas.train.evaluate import SCORES, evaluate
from nas.train.fit import FitArgs, Row, best_of, fit
from nas.train.folder import RESULT, TensorBoardLog, TrainFolder
from nas.train.loop import Diverged
from nas.train.losses import set_token_training
from nas.train.recipe import Recipe
from nas.train.train_config import Machine, TrainConfig
from space import Context
from space.errors import refuse
from space.family import Arch, Family

Log = Callable[[str], None]


def augment_spec(recipe: Recipe, dataset: Dataset) -> AugmentSpec:
    """Return a recipe's augmentation of single images. Raises InputError."""
    name = {"official": "finetune"}.get(recipe.augment, recipe.augment)
    changes: dict[str, Any] = {
        key: getattr(recipe, key) for key in ("color_jitter", "erase_prob") if getattr(recipe, key) is not None
    }
    if recipe.least_crop is not None:
        changes["scale"] = (recipe.least_crop, 1.0)
    if recipe.policy is not None:
        changes["policy"] = None if recipe.policy == "none" else recipe.policy
    return replace(preset_spec(name, dataset), **changes)


def build_model(
    family: Family, arch: Arch, ctx: Context, *, drop_path: float, drop_rate: float, seed: int
) -> nn.Module:
    """Build a net with regularisation and fresh weights that depend on `seed` alone.

    Raises InputError if the family's net takes no such regularisation.
    """
    options = {"drop_path_rate": drop_path, "drop_rate": drop_rate}
    used: dict[str, Any] = {name: value for name, value in options.items() if value}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return family.build(arch, ctx, **used)
        except TypeError as error:
            if not used:
                raise
            got = ", ".join(f"{name}={value:g}" for name, value in used.items())
            want, remedy = f"0 for family {family.name}", f"its net takes none ({error})"
            raise refuse("drop_path, drop_rate", got, want, remedy) from None


class TrainSession:
    """One process's part in a full training.

    `start_from` loads the first weights (`nas.inherit.slice`), `make_teacher` trains or finds a
    teacher (`nas.distill.teacher`), `log` takes lines for the user. Raises InputError.
    """

    def __init__(
        self,
        config: TrainConfig,
        machine: Machine,
        dataset: Dataset,
        folder: TrainFolder,
        ranks: Ranks,
        cache: Path,
        log: Log,
        *,
        start_from: Callable[..., str],
        make_teacher: Callable[..., TeacherInfo],
    ) -> None:
        self.config, self.machine, self.dataset = config, machine, dataset
        self.folder, self.ranks, self._cache, self.log = folder, ranks, cache, log
        self._start_from, self._make_teacher = start_from, make_teacher
        self.recipe = config.recipe
        self.family, self.arch = config.family_and_arch
        if not dataset.labelled:
            got = f"{dataset.name}, whose images have no classes"
            raise refuse("--data", got, "images by class", "a folder for each class")
        self.ctx = Context(dataset.img_size, dataset.num_classes)
        self.family.check(self.arch, self.ctx)
        self.spec = augment_spec(self.recipe, dataset)
        self.model = self._build_model()
        self._teacher_digest: str | None = None
        self._store_id: str | None = None
        self.source = self._open_source()

    def _build_model(self) -> nn.Module:
        recipe, config = self.recipe, self.config
        model = build_model(
            self.family,
            self.arch,
            self.ctx,
            drop_path=recipe.drop_path,
            drop_rate=recipe.drop_rate,
            seed=config.random_seed,
        )
        # A resumed training has its weights in its checkpoint.
        if config.init != "scratch" and not self.folder.checkpoint.exists():
            note = self._start_from(
                model,
                self.family,
                self.arch,
                self.ctx,
                config.init,
                resize=config.resize,
                head_map=None if config.head_map is None else Path(config.head_map),
            )
            self.log(f"start: {note}")
        if recipe.distill == "token":
            set_token_training(model, True)
        if self.machine.grad_checkpointing:
            switch = getattr(model, "set_grad_checkpointing", None)
            if switch is None:
                raise refuse("--grad-checkpointing", type(model).__name__, "a net that offers it")
            switch(True)
        return model

    def _open_source(self) -> Source:
        """Open the data set's images, or those of a label store with its augmentation."""
        recipe, machine = self.recipe, self.machine
        if self.config.labels is None:
            return LiveBatches(
                self.dataset.train,
                self.spec,
                batch_size=recipe.batch_size,
                repeats=recipe.repeats,
                random_seed=self.config.random_seed,
                workers=machine.workers,
                device=self.ranks.device,
            )
        store = open_store(Path(self.config.labels), use=self.dataset)
        self.spec, self._store_id = store.spec.augment, store.id
        replay = LabelReader(
            self.dataset.train,
            store,
            recipe.batch_size,
            self.config.random_seed,
            machine.workers,
            missing=self.config.missing,
            device=self.ranks.device,
        )
        for note in replay.notes:
            self.log(f"labels: {note}")
        self.log(f"labels: {store.spec.teacher_id}, {store.epochs} epochs, top {store.spec.topk}")
        shard = RankShard(self.ranks.rank, self.ranks.world, machine.accumulation_steps)
        return ReplayBatches(replay, shard)

    def load_teacher(self, tick: Tick) -> Callable[[Tensor], Tensor] | None:
        """Train the online teacher, or find it in the cache; None if there is none."""
        config = self.config
        if config.teacher is None:
            return None
        info = self._make_teacher(
            find_network(config.teacher, "--teacher"),
            self.dataset,
            self._cache,
            # Not the training's own seed, so that several of them have one teacher.
            random_seed=config.data_seed,
            epochs=config.teacher_epochs,
            device=self.ranks.device,
            threads=self.machine.threads,
            tick=tick,
        )
        for note in info.notes:
            self.log(note)
        score = f"{info.holdout_top1:.1%} +- {info.holdout_top1_se:.1%} on the holdout"
        self.log(f"teacher: {info.id}, {score}")
        self._teacher_digest = info.digest
        precision = {"bf16": "bfloat16", "fp16": "float16"}.get(self.machine.amp, "float32")
        return load_teacher(info, self.ranks.device, precision, stay=True)

    def targets_id(self) -> str:
        """Return the ids of labels and teacher."""
        return f"labels {self._store_id}, teacher {self._teacher_digest}"

    def settings(self) -> dict[str, Any]:
        """Return the part of `train.json` that the configuration decides."""
        return {"config": self.config.to_dict(), "machine": asdict(self.machine), "augment": self.spec.to_dict()}

    def train(self, teacher: Callable[[Tensor], Tensor] | None, tick: Tick, throughput: Any = None) -> dict[str, Any]:
        """Train, keep the best weights by the holdout, test them once; return `result.json`."""
        args = FitArgs(
            model=self.model,
            source=self.source,
            recipe=self.recipe,
            holdout=self.dataset.holdout,
            spec=self.spec,
            num_classes=self.ctx.num_classes,
            ranks=self.ranks,
            accumulation_steps=self.machine.accumulation_steps,
            random_seed=self.config.random_seed,
            plan={
                "recipe": self.recipe.to_dict(),
                "key": self.family.key(self.arch, self.ctx),
                "data": self.dataset.fingerprint,
                "steps_per_epoch": self.source.steps_per_epoch,
                "random_seed": self.config.random_seed,
                "labels": self._store_id,
                "teacher": self._teacher_digest,
            },
            checkpoint=self.folder.checkpoint,
            blocks=tuple(b for group in self.family.blocks(self.arch).values() for b in group),
            teacher=teacher,
            amp=self.machine.amp,
            compile=bool(self.machine.compile),
            save_steps=self.machine.save_steps,
        )
        report = _EpochReport(self, throughput)
        started = time.monotonic()
        try:
            rows = fit(args, report, tick)
            result = self._finish(rows, throughput)
            result["seconds_here"] = time.monotonic() - started
        except Diverged as error:
            result = self._diverged(error)
        finally:
            report.close()
        if self.ranks.main:
            write_json(self.folder.path / RESULT, result)
        return result

    def _diverged(self, error: Diverged) -> dict[str, Any]:
        """Return the result of a training that diverged; its good files stay."""
        checkpoint = "checkpoint.safetensors" if self.folder.checkpoint.exists() else None
        best = "best.safetensors" if (self.folder.path / "best.json").exists() else None
        return {
            "status": "diverged",
            "step": error.step,
            "loss": str(error.loss),
            "epoch": error.step // self.source.steps_per_epoch + 1,
            "checkpoint": checkpoint,
            "best": best,
        }

    def _finish(self, rows: list[Row], throughput: Any) -> dict[str, Any]:
        """Save the last weights, test the best ones; return the result."""
        if self.ranks.main:
            self.save("last", self.model.state_dict(), self.score(rows[-1], "raw"), throughput)
        self.ranks.wait()
        best_path = self.folder.path / "best.safetensors"
        with self.ranks.raise_on_all_ranks():
            state = load_weights(best_path, name="best weights")
            # The file names its epoch, wherever a kill fell.
            epoch = read_metadata(best_path, name="best weights").get("epoch")
        best = best_of(rows) if epoch is None else rows[int(epoch) - 1]
        load_into(self.model, state)
        tested = evaluate(
            self.model,
            self.dataset.test,
            self.spec,
            num_classes=self.ctx.num_classes,
            device=self.ranks.device,
            ranks=self.ranks,
        )
        score = self.score(best, best["best_of"]) | tested.summary("test_")
        if self.ranks.main:
            self.save("best", state, score, throughput)
            by_class = tested.by_class(self.dataset.classes)
            (self.folder.path / "test_classes.csv").write_text(by_class, encoding="utf-8")
        return {
            "status": "finished",
            "key": self.family.key(self.arch, self.ctx),
            "params": self.family.count_params(self.arch, self.ctx),
            "recipe": self.recipe.name,
            "epochs": len(rows),
            "train_seconds": sum(row["seconds"] for row in rows),
            "images_per_s": sum(r["images"] for r in rows) / sum(r["seconds"] for r in rows),
            "peak_mem_bytes": max(row["peak_mem_bytes"] for row in rows),
            **{k: v for k, v in score.items() if k != "kind"},
        }

    def score(self, row: Row, which: str) -> dict[str, Any]:
        """Return the score of an epoch's weights, "raw" or "ema"."""
        prefix = "" if which == "raw" else "ema_"
        return {
            "kind": "trained",
            "epoch": row["epoch"],
            "weights": which,
            "recipe": self.recipe.name,
            **{f"holdout_{name}": row[f"{prefix}holdout_{name}"] for name in SCORES},
            "holdout_n": len(self.dataset.holdout),
        }

    def save(self, stem: str, state: Mapping[str, Tensor], score: Mapping[str, Any], throughput: Any) -> None:
        """Write a model in the training's folder."""
        write_model(
            self.folder.path / stem,
            state,
            family=self.family,
            arch=self.arch,
            ctx=self.ctx,
            dataset=self.dataset,
            score=score,
            throughput=throughput,
        )


class _EpochReport:
    """Writes log, curve and models after every epoch, and a line for the user."""

    def __init__(self, session: TrainSession, throughput: Any) -> None:
        self._session, self._throughput = session, throughput
        self._board: TensorBoardLog | None = None

    def __call__(self, rows: list[Row], weights: Callable[[], Mapping[str, Tensor]], best: str | None) -> None:
        session, row = self._session, rows[-1]
        if not session.ranks.main:
            return
        stems = ["best"] if best is not None else []
        every = session.machine.keep_every
        if every is not None and row["epoch"] % every == 0:
            stems.append(f"epochs/epoch-{row['epoch']:04d}")
        for stem in stems:
            score = session.score(row, row["best_of"])
            session.save(stem, weights(), score, self._throughput)
        if self._board is None:
            self._board = TensorBoardLog(session.folder.path, row["epoch"])
            if self._board.writer is None:
                session.log('log: no TensorBoard here; pip install -e ".[train]"')
        self._board.add(row)
        session.folder.write_log(rows)
        session.log(format_epoch(row, session.recipe.epochs, best is not None))

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def format_epoch(row: Row, epochs: int, best: bool) -> str:
    """Return an epoch's line for the user; a star marks the best so far."""
    parts = [
        f"epoch {row['epoch']}/{epochs}: loss {row['train_loss']:.4f}",
        f"holdout {row['holdout_loss']:.4f}",
        f"top-1 {row['holdout_top1']:.1%} +- {row['holdout_top1_se']:.1%}",
    ]
    if "ema_holdout_top1" in row:
        parts.append(f"averaged {row['ema_holdout_top1']:.1%}")
    remaining_s = row["seconds"] * (epochs - row["epoch"])
    parts += [f"lr {row['lr']:.2e}", f"{row['images_per_s']:.0f} images/s"]
    if remaining_s:
        parts.append(f"about {_duration(remaining_s)} left")
    return ", ".join(parts) + (" *" if best else "")


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400.0), ("hours", 3_600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
