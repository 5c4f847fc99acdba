"""One full training: the model, its batches and teacher, and the models that it saves."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nas.core.io import write_json
from nas.core.progress import Tick
from nas.data import Dataset
from nas.data.augment.mirror import flip_notes, mirror_notes
from nas.data.augment.spec import AugmentSpec, changed_spec, preset_spec
from nas.export.save import write_model
from nas.export.teacher_net import TeacherInfo, load_teacher
from nas.export.weights import load_into, load_weights, read_metadata, weights_bytes
from nas.labels.reader import LabelReader
from nas.labels.store import open_store
from nas.train.batches import LiveBatches, RankShard, ReplayBatches
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


def augment_spec(recipe: Recipe, dataset: Dataset) -> AugmentSpec:
    """Return a recipe's augmentation of single images. Raises InputError."""
    name = {"official": "finetune"}.get(recipe.augment, recipe.augment)
    return changed_spec(preset_spec(name, dataset), recipe, mixing=False)


class TrainSession:
    """One process's part in a full training; `log` takes lines for the user. Raises InputError."""

    def __init__(
        self,
        config: TrainConfig,
        machine: Machine,
        dataset: Dataset,
        folder: TrainFolder,
        ranks: Ranks,
        log: Callable[[str], None],
    ) -> None:
        self.config, self.machine, self.dataset = config, machine, dataset
        self.folder, self.ranks, self.log, self.recipe = folder, ranks, log, config.recipe
        self.family, self.arch = config.family_and_arch
        if not dataset.labelled:
            got = f"{dataset.name}, whose images have no classes"
            raise refuse("--data", got, "images by class", "a folder for each class")
        self.ctx = Context(dataset.img_size, dataset.num_classes)
        self.family.check(self.arch, self.ctx)
        self.spec = augment_spec(self.recipe, dataset)
        self.model = self._build_model()
        self.teacher: Callable[[Tensor], Tensor] | None = None
        self._teacher_digest: str | None = None
        self._store_id: str | None = None
        self.notes: list[str] = []
        self.source = self._open_source()
        self.note(*mirror_notes(dataset, self.spec))
        self._throughput: Mapping[str, Any] | None = None
        self._board: TensorBoardLog | None = None

    def _build_model(self) -> nn.Module:
        """Build the net with fresh weights that depend on the random seed alone, and its regularisation."""
        recipe = self.recipe
        options = {"drop_path_rate": recipe.drop_path, "drop_rate": recipe.drop_rate}
        used: dict[str, Any] = {name: value for name, value in options.items() if value}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.random_seed)
            try:
                model = self.family.build(self.arch, self.ctx, **used)
            except TypeError as error:
                if not used:
                    raise
                got = ", ".join(f"{name}={value:g}" for name, value in used.items())
                want, remedy = f"0 for family {self.family.name}", f"its net takes none ({error})"
                raise refuse("drop_path, drop_rate", got, want, remedy) from None
        if recipe.distill == "token":
            set_token_training(model, True)
        if self.machine.grad_checkpointing:
            switch = getattr(model, "set_grad_checkpointing", None)
            if switch is None:
                raise refuse("--grad-checkpointing", type(model).__name__, "a net that offers it")
            switch(True)
        return model

    def _open_source(self) -> LiveBatches | ReplayBatches:
        """Open the data set's images, or those of a label store with its augmentation."""
        recipe, machine, train = self.recipe, self.machine, self.dataset.train
        random_seed, device = self.config.random_seed, self.ranks.device
        shard = RankShard(self.ranks.rank, self.ranks.world, machine.accumulation_steps)
        if self.config.labels is None:
            return LiveBatches(
                train,
                self.spec,
                batch_size=recipe.batch_size,
                repeats=recipe.repeats,
                random_seed=random_seed,
                workers=machine.workers,
                device=device,
                shard=shard,
                mixing=recipe.mixes,
            )
        store = open_store(Path(self.config.labels), use=self.dataset)
        recipe.check_stored(store.spec.augment.to_dict(), store.folder)
        self.spec, self._store_id = store.spec.augment, store.id
        reader = LabelReader(
            train, store, recipe.batch_size, random_seed, machine.workers, missing=self.config.missing, device=device
        )
        self.note(*(f"labels: {note}" for note in reader.notes))
        self.log(f"labels: {store.spec.teacher_id}, {store.epochs} epochs, top {store.spec.topk}")
        return ReplayBatches(reader, shard)

    def note(self, *notes: str) -> None:
        """Print decisions and warnings; `train.json` keeps those before the training."""
        for note in notes:
            self.log(note)
        self.notes += notes

    def use_teacher(self, info: TeacherInfo) -> None:
        """Load the teacher that is asked while training."""
        self.note(*(f"teacher: {note}" for note in info.notes))
        self.log(f"teacher: {info.id}, {info.holdout_top1:.1%} +- {info.holdout_top1_se:.1%} on the holdout")
        self._teacher_digest = info.digest
        precision = {"bf16": "bfloat16", "fp16": "float16"}.get(self.machine.amp, "float32")
        self.teacher = load_teacher(info, self.ranks.device, precision, stay=True)

    def targets_id(self) -> str:
        """Return the ids of labels and teacher."""
        return f"labels {self._store_id}, teacher {self._teacher_digest}"

    def settings(self) -> dict[str, Any]:
        """Return the part of `train.json` that the configuration decides."""
        return {"config": self.config.to_dict(), "machine": asdict(self.machine), "augment": self.spec.to_dict()}

    def train(self, tick: Tick, throughput: Mapping[str, Any] | None) -> dict[str, Any]:
        """Train, keep the best weights by the holdout, test them once; return `result.json`.

        `throughput` is what a run measured of this net; the saved models carry it.
        """
        self._throughput = throughput
        args = FitArgs(
            model=self.model,
            source=self.source,
            config=self.config,
            machine=self.machine,
            dataset=self.dataset,
            spec=self.spec,
            ranks=self.ranks,
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
            teacher=self.teacher,
        )
        started = time.monotonic()
        try:
            result = self._finish(fit(args, self._report, tick))
            result["seconds_here"] = time.monotonic() - started
        except Diverged as error:
            best = (self.folder.path / "best.json").exists()
            result = {
                "status": "diverged",
                "step": error.step,
                "loss": str(error.loss),
                "epoch": error.step // self.source.steps_per_epoch + 1,
                "checkpoint": self.folder.checkpoint.name if self.folder.checkpoint.exists() else None,
                "best": "best.safetensors" if best else None,
            }
        finally:
            if self._board is not None:
                self._board.close()
        if self.ranks.main:
            write_json(self.folder.path / RESULT, result)
        return result

    def _finish(self, rows: list[Row]) -> dict[str, Any]:
        """Save the last weights, test the best ones; return the result."""
        if self.ranks.main:
            self._save("last", self.model.state_dict(), self._score(rows[-1], "raw"))
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
        score = self._score(best, best["best_of"]) | tested.summary("test_")
        notes = flip_notes(self.model, self.dataset, self.spec, device=self.ranks.device)
        for note in notes:
            self.log(note)
        if self.ranks.main:
            self._save("best", state, score)
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
            **({"notes": notes} if notes else {}),
        }

    def _score(self, row: Row, which: str) -> dict[str, Any]:
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

    def _save(self, stem: str, state: Mapping[str, Tensor], score: Mapping[str, Any]) -> None:
        """Write a model in the training's folder."""
        write_model(
            self.folder.path / stem,
            weights_bytes(state, {"epoch": str(score["epoch"])}),
            family=self.family,
            arch=self.arch,
            ctx=self.ctx,
            dataset=self.dataset,
            score=score,
            throughput=self._throughput,
        )

    def _report(self, rows: list[Row], weights: Callable[[], Mapping[str, Tensor]], best: str | None) -> None:
        """Write log, curve and models of an epoch, and a line for the user."""
        row = rows[-1]
        if not self.ranks.main:
            return
        stems = ["best"] if best is not None else []
        every = self.machine.keep_every
        if every is not None and row["epoch"] % every == 0:
            stems.append(f"epochs/epoch-{row['epoch']:04d}")
        for stem in stems:
            self._save(stem, weights(), self._score(row, row["best_of"]))
        if self._board is None:
            self._board = TensorBoardLog(self.folder.path, row["epoch"])
            if self._board.writer is None:
                self.log('log: no TensorBoard here; pip install -e ".[train]"')
        self._board.add(row)
        self.folder.write_log(rows)
        self.log(format_epoch(row, self.config.epochs, best is not None))


def format_epoch(row: Row, epochs: int, best: bool) -> str:
    """Return an epoch's line for the user; a star marks the best so far."""
    parts = [
        f"epoch {row['epoch']}/{epochs}: loss {row['train_loss']:.4f}",
        f"holdout {row['holdout_loss']:.4f}",
        f"top-1 {row['holdout_top1']:.1%} +- {row['holdout_top1_se']:.1%}",
    ]
    if "ema_holdout_top1" in row:
        parts.append(f"averaged {row['ema_holdout_top1']:.1%}")
    parts += [f"lr {row['lr']:.2e}", f"{row['images_per_s']:.0f} images/s"]
    remaining_s = row["seconds"] * (epochs - row["epoch"])
    if remaining_s:
        units = (("days", 86_400.0), ("hours", 3_600.0), ("minutes", 60.0), ("s", 1.0))
        unit, size = next((each for each in units if remaining_s >= 2 * each[1]), units[-1])
        parts.append(f"about {remaining_s / size:.{0 if unit == 's' else 1}f} {unit} left")
    return ", ".join(parts) + (" *" if best else "")
