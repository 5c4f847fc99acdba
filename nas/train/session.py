"""A full training from settings and data to the models that it leaves."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nas.core.cpus import MOST_AT_ONCE, read_threads
from nas.core.io import write_json
from nas.core.progress import Tick
from nas.data import Dataset
from nas.data.augment.presets import preset_spec
from nas.data.augment.spec import AugmentSpec
from nas.export.teacher_net import parse_teacher
from nas.export.trained_teacher import TeacherInfo, load_teacher
from nas.export.weights import load_into, load_weights, read_metadata
from nas.labels.reader import Replay
from nas.labels.store import open_store
from nas.train.batches import LiveBatches, ReplayBatches, Share, Source
from nas.train.distributed import Ranks
from nas.train.evaluate import Outcome, evaluate
from nas.train.fit import Course, Row, best_of, fit
from nas.train.loop import Diverged, half_precision
from nas.train.network import build
from nas.train.recipe import Recipe
from nas.train.teaching import set_token_training
from nas.train.train_config import TrainConfig
from nas.train.training_folder import RESULT, Board, Folder, write_model
from space import Context
from space.checks import read_int
from space.errors import refuse

Say = Callable[[str], None]


@dataclass(frozen=True)
class Machine:
    """What a training runs on, which may change when it goes on.

    `device` as asked (a process under torchrun has its own GPU); `turns`: parts of its share that a
    process sees before a step (gradient accumulation); `workers`: loader processes of each;
    `keep_every`: epochs between models that stay. Raises InputError.
    """

    device: str
    threads: int
    workers: int = 0
    turns: int = 1
    amp: str = "none"
    compile: bool = False
    grad_checkpointing: bool = False
    save_steps: int | None = 500
    keep_every: int | None = None

    def __post_init__(self) -> None:
        read_threads(self.threads)
        if self.turns < 1:
            raise refuse("--accumulate", self.turns, "an integer >= 1")
        read_int("--workers", self.workers, 0, MOST_AT_ONCE)
        for name, flag in (("save_steps", "--save-steps"), ("keep_every", "--keep-every")):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise refuse(flag, value, "an integer >= 1")


def resolve_amp(asked: str, device: str) -> str:
    """Choose mixed precision for a device. Raises InputError."""
    cuda = device.startswith("cuda")
    if asked == "auto":
        if not cuda:
            return "none"
        return "bf16" if half_precision(device) is torch.bfloat16 else "fp16"
    if asked == "fp16" and not cuda:
        raise refuse("--amp", f"fp16 on {device}", "a GPU", "bf16 works here, too")
    return asked


def augment_of(recipe: Recipe, dataset: Dataset) -> AugmentSpec:
    """Resolve a recipe's augmentation of single images. Raises InputError."""
    name = {"official": "finetune"}.get(recipe.augment, recipe.augment)
    changes: dict[str, Any] = {
        key: getattr(recipe, key)
        for key in ("color_jitter", "erase_prob")
        if getattr(recipe, key) is not None
    }
    if recipe.least_crop is not None:
        changes["scale"] = (recipe.least_crop, 1.0)
    if recipe.policy is not None:
        changes["policy"] = None if recipe.policy == "none" else recipe.policy
    return replace(preset_spec(name, dataset), **changes)


class Work:
    """One process's part in a full training.

    `start_from` loads the first weights (`nas.inherit.checkpoint_start`), `make_teacher` trains or
    finds a teacher (`nas.distill.teacher`).
    """

    def __init__(
        self,
        config: TrainConfig,
        machine: Machine,
        dataset: Dataset,
        folder: Folder,
        ranks: Ranks,
        cache: Path,
        say: Say,
        *,
        start_from: Callable[..., str],
        make_teacher: Callable[..., TeacherInfo],
    ) -> None:
        self.config, self.machine, self.dataset = config, machine, dataset
        self.folder, self.ranks, self._cache, self.say = folder, ranks, cache, say
        self._start_from, self._make_teacher = start_from, make_teacher
        self.recipe = config.recipe
        self.family, self.arch = config.of
        if not dataset.labelled:
            raise refuse(
                "--data",
                f"{dataset.name}, whose images have no classes",
                "images by class",
                "a folder for each class",
            )
        self.ctx = Context(dataset.img_size, dataset.num_classes)
        self.family.check(self.arch, self.ctx)
        self.share = Share(ranks.rank, ranks.world, machine.turns)
        self.spec = augment_of(self.recipe, dataset)
        self.model = self._model()
        self._teacher_digest: str | None = None
        self._store_id: str | None = None
        self.source = self._source()

    def _model(self) -> nn.Module:
        recipe, config = self.recipe, self.config
        model = build(
            self.family,
            self.arch,
            self.ctx,
            drop_path=recipe.drop_path,
            drop_rate=recipe.drop_rate,
            seed=config.random_seed,
        )
        # A training that goes on has its weights in its checkpoint.
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
            self.say(f"start: {note}")
        if recipe.distill == "token":
            set_token_training(model, True)
        if self.machine.grad_checkpointing:
            switch = getattr(model, "set_grad_checkpointing", None)
            if switch is None:
                raise refuse("--grad-checkpointing", type(model).__name__, "a net that offers it")
            switch(True)
        return model

    def _source(self) -> Source:
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
        replay = Replay(
            self.dataset.train,
            store,
            recipe.batch_size,
            self.config.random_seed,
            machine.workers,
            missing=self.config.missing,
            device=self.ranks.device,
        )
        for note in replay.notes:
            self.say(f"labels: {note}")
        self.say(f"labels: {store.spec.teacher_id}, {store.epochs} epochs, top {store.spec.topk}")
        return ReplayBatches(replay, self.share)

    def teacher(self, tick: Tick) -> Callable[[Tensor], Tensor] | None:
        """Make the teacher that is asked while training, or find it in the cache."""
        config = self.config
        if config.teacher is None:
            return None
        made = self._make_teacher(
            parse_teacher(config.teacher),
            self.dataset,
            self._cache,
            # Not the training's own seed, so that several of them have one teacher.
            random_seed=config.data_seed,
            epochs=config.teacher_epochs,
            device=self.ranks.device,
            threads=self.machine.threads,
            tick=tick,
        )
        for note in made.notes:
            self.say(note)
        said = f"{made.holdout_top1:.1%} +- {made.holdout_top1_se:.1%} on the holdout"
        self.say(f"teacher: {made.id}, {said}")
        self._teacher_digest = made.digest
        kind = {"bf16": "bfloat16", "fp16": "float16"}.get(self.machine.amp, "float32")
        return load_teacher(made, self.ranks.device, kind, stay=True)

    def taught_by(self) -> str:
        """Name the labels and the teacher."""
        return f"labels {self._store_id}, teacher {self._teacher_digest}"

    def plan(self) -> dict[str, Any]:
        """Collect what decides the weights, as plain JSON."""
        return {
            "recipe": self.recipe.to_dict(),
            "key": self.family.key(self.arch, self.ctx),
            "data": self.dataset.fingerprint,
            "steps_per_epoch": self.source.steps_per_epoch,
            "random_seed": self.config.random_seed,
            "labels": self._store_id,
            "teacher": self._teacher_digest,
        }

    def train(
        self, teacher: Callable[[Tensor], Tensor] | None, tick: Tick, throughput: Any = None
    ) -> dict[str, Any]:
        """Train, keep the best by the holdout, test it once; returns what `result.json` holds."""
        blocks = tuple(b for group in self.family.blocks(self.arch).values() for b in group)
        if self.recipe.layer_decay is not None and not blocks:
            raise refuse(
                "layer_decay", self.recipe.layer_decay, "none for this family", "it names no blocks"
            )
        course = Course(
            model=self.model,
            source=self.source,
            recipe=self.recipe,
            holdout=self.dataset.holdout,
            spec=self.spec,
            num_classes=self.ctx.num_classes,
            ranks=self.ranks,
            turns=self.machine.turns,
            random_seed=self.config.random_seed,
            plan=self.plan(),
            checkpoint=self.folder.checkpoint,
            blocks=blocks,
            teacher=teacher,
            amp=self.machine.amp,
            compile=self.machine.compile,
            save_steps=self.machine.save_steps,
        )
        report = _Report(self, throughput)
        began = time.monotonic()
        try:
            rows = fit(course, report, tick)
        except Diverged as error:
            return self._diverged(error)
        finally:
            report.close()
        result = self._finish(rows, throughput)
        result["seconds_here"] = time.monotonic() - began
        if self.ranks.main:
            write_json(self.folder.path / RESULT, result)
        return result

    def _diverged(self, error: Diverged) -> dict[str, Any]:
        """Say how far the training came; what was good stays."""
        good = "checkpoint.safetensors" if self.folder.checkpoint.exists() else None
        best = "best.safetensors" if (self.folder.path / "best.json").exists() else None
        result = {
            "status": "diverged",
            "step": error.step,
            "loss": str(error.loss),
            "epoch": error.step // self.source.steps_per_epoch + 1,
            "checkpoint": good,
            "best": best,
        }
        if self.ranks.main:
            write_json(self.folder.path / RESULT, result)
        return result

    def _finish(self, rows: list[Row], throughput: Any) -> dict[str, Any]:
        """Leave the last weights, test the best ones, and tell."""
        if self.ranks.main:
            self.leave("last", self.model.state_dict(), self.score(rows[-1], "raw"), throughput)
        self.ranks.wait()
        kept = self.folder.path / "best.safetensors"
        with self.ranks.all_or_none():
            state = load_weights(kept, name="best weights")
            # The file says itself which epoch it is of, wherever a kill fell.
            told = read_metadata(kept, name="best weights").get("epoch")
        best = best_of(rows) if told is None else rows[int(told) - 1]
        load_into(self.model, state)
        tested = evaluate(
            self.model,
            self.dataset.test,
            self.spec,
            num_classes=self.ctx.num_classes,
            device=self.ranks.device,
            ranks=self.ranks,
        )
        score = self.score(best, best["best_of"]) | tested_score(tested)
        if self.ranks.main:
            self.leave("best", state, score, throughput)
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
        """Tell what is known of an epoch's weights, "raw" or "ema"."""
        prefix = "" if which == "raw" else "ema_"
        names = ("holdout_loss", "holdout_top1", "holdout_top1_se", "holdout_top5")
        return {
            "kind": "trained",
            "epoch": row["epoch"],
            "weights": which,
            "recipe": self.recipe.name,
            **{name: row[f"{prefix}{name}"] for name in names},
            "holdout_n": len(self.dataset.holdout),
        }

    def leave(
        self, stem: str, state: Mapping[str, Tensor], score: Mapping[str, Any], throughput: Any
    ) -> None:
        """Write a model under the folder."""
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

    def settings(self) -> dict[str, Any]:
        """Give what `train.json` holds beside versions."""
        return {
            "config": self.config.to_dict(),
            "machine": asdict(self.machine),
            "augment": self.spec.to_dict(),
        }


def tested_score(tested: Outcome) -> dict[str, Any]:
    """Tell how a split went, under the names of a test."""
    (top1, se), (top5, se5) = tested.top(1), tested.top(5)
    return {
        "test_top1": top1,
        "test_top1_se": se,
        "test_top5": top5,
        "test_top5_se": se5,
        "test_loss": tested.mean_loss,
        "test_n": len(tested.truth),
    }


class _Report:
    """What happens after every epoch: log, curve, models, a line."""

    def __init__(self, work: Work, throughput: Any) -> None:
        self._work, self._throughput = work, throughput
        self._board: Board | None = None
        self.rows: list[Row] = []

    def __call__(
        self,
        rows: list[Row],
        weights: Callable[[], Mapping[str, Tensor]],
        outcome: Outcome,
        best: str | None,
    ) -> None:
        work, row = self._work, rows[-1]
        self.rows = rows
        if not work.ranks.main:
            return
        which = row["best_of"]
        if best is not None:
            work.leave("best", weights(), work.score(row, which), self._throughput)
        every = work.machine.keep_every
        if every is not None and row["epoch"] % every == 0:
            stem = f"epochs/epoch-{row['epoch']:04d}"
            work.leave(stem, weights(), work.score(row, which), self._throughput)
        if self._board is None:
            self._board = Board(work.folder.path, row["epoch"])
            if self._board.writer is None:
                work.say('log: no TensorBoard here; pip install -e ".[train]"')
        self._board.add(row)
        work.folder.write_log(rows)
        work.say(line_of(row, work.recipe.epochs, best is not None))

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def line_of(row: Row, epochs: int, best: bool) -> str:
    """Say how an epoch went."""
    parts = [
        f"epoch {row['epoch']}/{epochs}: loss {row['train_loss']:.4f}",
        f"holdout {row['holdout_loss']:.4f}",
        f"top-1 {row['holdout_top1']:.1%} +- {row['holdout_top1_se']:.1%}",
    ]
    if "ema_holdout_top1" in row:
        parts.append(f"averaged {row['ema_holdout_top1']:.1%}")
    left = row["seconds"] * (epochs - row["epoch"])
    parts += [f"lr {row['lr']:.2e}", f"{row['images_per_s']:.0f} images/s"]
    if left:
        parts.append(f"about {_duration(left)} left")
    return ", ".join(parts) + (" *" if best else "")


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400.0), ("hours", 3_600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
