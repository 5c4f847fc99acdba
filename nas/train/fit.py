"""The loop of a full training: whole batches over processes and turns, resumable at any step."""

from __future__ import annotations

import contextlib
import hashlib
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import mixup as timm_mixup
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from nas.core.progress import Tick, no_tick
from nas.data import Split
from nas.data.augment.spec import LOCK, AugmentSpec, borrowed_generators, seed_all
from nas.export.weights import place
from nas.train.batches import Part, Share, Source
from nas.train.checkpoint import Position, load_checkpoint_into, save_checkpoint
from nas.train.distributed import Ranks
from nas.train.evaluate import Outcome, evaluate
from nas.train.groups import block_scales, make_grouped_optimizer
from nas.train.loop import Diverged, Stepper
from nas.train.network import freeze_batch_norms
from nas.train.recipe import Recipe
from nas.train.schedule import cosine_at
from nas.train.teaching import DistillLoss, Taught

Row = dict[str, Any]
AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, eq=False)
class Course:
    """All that a full training takes.

    `plan` is what decides its bits, as plain JSON; `blocks` names the net's blocks for layer decay;
    `teacher` gives the logits of inputs, if it is asked while training; a checkpoint is written
    after every epoch and every `save_steps` steps.
    """

    model: nn.Module
    source: Source
    recipe: Recipe
    holdout: Split
    spec: AugmentSpec
    num_classes: int
    ranks: Ranks
    turns: int
    random_seed: int
    plan: Mapping[str, Any]
    checkpoint: Path
    blocks: tuple[str, ...] = ()
    teacher: Callable[[Tensor], Tensor] | None = None
    amp: str = "none"
    compile: bool = False
    save_steps: int | None = None


Report = Callable[[list[Row], Callable[[], Mapping[str, Tensor]], Outcome, str | None], None]
"""Takes the rows so far, the best of this epoch's weights, their outcome, and which they are ("raw"
or "ema") if they are the best of all so far."""


def rate_at(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of a 0-based step."""
    peak, least, first = recipe.rates()
    if recipe.schedule == "epoch":
        return cosine_at(
            step // steps_per_epoch,
            total=recipe.epochs,
            warmup=recipe.warmup_epochs,
            lr=peak,
            min_lr=least,
            first=first,
        )
    total = recipe.epochs * steps_per_epoch
    warmup = int(recipe.warmup_epochs * steps_per_epoch)
    return cosine_at(step, total=total, warmup=warmup, lr=peak, min_lr=least, first=first)


def best_of(rows: Sequence[Row]) -> Row:
    """Return the epoch whose better weights, averaged or not, are the best on the holdout: by
    top-1, then loss; of equal ones the first, which was kept."""

    def merit(row: Row) -> tuple[float, float]:
        prefix = "" if row["best_of"] == "raw" else "ema_"
        return row[f"{prefix}holdout_top1"], -row[f"{prefix}holdout_loss"]

    return max(rows, key=merit)


def part_seed(random_seed: int, step: int, part: int) -> int:
    """Seed of what a part of a step draws: the same for one process in turns and for several."""
    text = f"{random_seed}/{step}/{part}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def fit(course: Course, report: Report, tick: Tick = no_tick) -> list[Row]:
    """Train `course.model` in place, from its checkpoint on if there is one; a row for each epoch.

    `report` is called after every epoch, by every process; `tick` counts images of all processes.
    What is drawn inside the net follows from (random seed, step, part) alone, so that a run goes on
    to the same weights wherever it stopped, on the CPU to the bit. Raises `Diverged`.
    """
    with torch.random.fork_rng(devices=[]):
        return _Loop(course, tick).run(report)


class _Loop:
    def __init__(self, course: Course, tick: Tick) -> None:
        self._c, self._tick = course, tick
        recipe, ranks = course.recipe, course.ranks
        self._model = place(course.model, ranks.device)
        self._share = Share(ranks.rank, ranks.world, course.turns)
        scales = None
        if recipe.layer_decay is not None:
            scales = block_scales(self._model, course.blocks, recipe.layer_decay)
        optimizer = make_grouped_optimizer(
            self._model,
            lr=recipe.rates()[0],
            weight_decay=recipe.weight_decay,
            betas=(recipe.beta1, recipe.beta2),
            eps=recipe.eps,
            scales=scales,
        )
        self._ema: Any = None
        if recipe.ema_decay is not None:
            self._ema = ModelEmaV3(
                self._model, decay=recipe.ema_decay, use_warmup=recipe.ema_warmup
            )
        self._stepper = Stepper(
            self._model,
            optimizer,
            device=ranks.device,
            dtype=AMP[course.amp],
            clip_norm=recipe.clip_norm,
            everyone=ranks.sum,
        )
        self._loss = DistillLoss(
            kind=recipe.distill,
            alpha=recipe.distill_alpha,
            temperature=recipe.temperature,
            reduction=recipe.kl_reduction,
            token_loss=recipe.token_loss,
            label_smoothing=recipe.label_smoothing,
        )
        self._mixup: Any = None
        if recipe.mixes:
            make: Any = timm_mixup.Mixup  # has no types
            self._mixup = make(
                mixup_alpha=recipe.mixup,
                cutmix_alpha=recipe.cutmix,
                prob=recipe.mix_prob,
                switch_prob=recipe.mix_switch_prob,
                mode=recipe.mix_mode,
                label_smoothing=recipe.label_smoothing,
                num_classes=course.num_classes,
            )
        self._rows: list[Row] = []
        self._step_seed = 0

    def run(self, report: Report) -> list[Row]:
        """Train to the end of the recipe."""
        c = self._c
        with c.ranks.all_or_none():
            epoch, start, seconds = self._resume()
        at, remedy = f"epoch {epoch}, step {start}", "a folder that all machines share"
        c.ranks.same("checkpoint", at, remedy)
        if c.compile:
            self._model.compile()
        network = c.ranks.wrap(self._model)
        while epoch < c.recipe.epochs:
            row, weights, outcome, which = self._epoch(network, epoch, start, seconds)
            self._rows.append(row)
            epoch, start, seconds = epoch + 1, 0, 0.0
            best = best_of(self._rows) is row
            report(self._rows, weights, outcome, which if best else None)
            self._save(epoch, 0, 0.0, 0, 0.0)
        return self._rows

    def _epoch(
        self, network: nn.Module, epoch: int, start: int, before: float
    ) -> tuple[Row, Callable[[], Mapping[str, Tensor]], Outcome, str]:
        c, steps = self._c, self._c.source.steps_per_epoch
        self._model.train()
        if c.recipe.bn == "eval":
            freeze_batch_norms(self._model)
        if start == 0:
            self._stepper.begin()
        began, rate = time.perf_counter(), 0.0
        at = start
        for parts in c.source.steps(epoch, start, self._share):
            step = epoch * steps + at
            rate = rate_at(c.recipe, step, steps)
            self._take(network, parts, rate, step)
            at += 1
            if c.save_steps is not None and at % c.save_steps == 0 and at < steps:
                total = self._good(step)
                images = int(c.ranks.sum(torch.tensor(float(self._stepper.images))))
                spent = before + time.perf_counter() - began
                self._save(epoch, at, total, images, spent)
        assert at == steps, f"{at} of {steps} steps"
        total = self._good((epoch + 1) * steps - 1)
        images = int(c.ranks.sum(torch.tensor(float(self._stepper.images))))
        spent = before + time.perf_counter() - began
        row: Row = {
            "epoch": epoch + 1,
            "lr": rate,
            "train_loss": total / max(images, 1),
            "images": images,
            "seconds": spent,
            "images_per_s": images / max(spent, 1e-9),
            "peak_mem_bytes": peak_memory(c.ranks.device),
        }
        c.ranks.agree(self._model)
        candidates: list[tuple[str, nn.Module]] = [("raw", self._model)]
        if self._ema is not None:
            c.ranks.agree(self._ema.module)
            candidates.append(("ema", self._ema.module))
        told = []
        for which, model in candidates:
            outcome = evaluate(
                model,
                c.holdout,
                c.spec,
                num_classes=c.num_classes,
                device=c.ranks.device,
                ranks=c.ranks,
            )
            prefix = "" if which == "raw" else "ema_"
            (top1, se), (top5, _) = outcome.top(1), outcome.top(5)
            row |= {
                f"{prefix}holdout_loss": outcome.mean_loss,
                f"{prefix}holdout_top1": top1,
                f"{prefix}holdout_top1_se": se,
                f"{prefix}holdout_top5": top5,
            }
            if not math.isfinite(outcome.mean_loss):
                raise Diverged((epoch + 1) * steps - 1, outcome.mean_loss)
            told.append((top1, -outcome.mean_loss, which, model, outcome))
        best = max(told, key=lambda one: one[:2])
        row["best_of"], chosen = best[2], best[3]
        return row, lambda: chosen.state_dict(), best[4], best[2]

    def _good(self, step: int) -> float:
        """Return the sum of losses, or raise `Diverged`: what is kept must be good.

        On a GPU the loss may not have been looked at yet; and a loss may be finite whose gradients
        are not.
        """
        total = self._stepper.look(step)
        sums = torch.stack([p.detach().float().sum() for p in self._model.parameters()])
        if not bool(torch.isfinite(sums).all()):
            raise Diverged(step, math.nan)
        return total

    def _take(self, network: nn.Module, parts: list[Part], rate: float, step: int) -> None:
        c = self._c
        last = len(parts) - 1

        @contextlib.contextmanager
        def before(turn: int) -> Iterator[None]:
            self._step_seed = part_seed(c.random_seed, step, parts[turn].number)
            torch.manual_seed(self._step_seed)
            with contextlib.ExitStack() as stack:
                if turn < last and isinstance(network, nn.parallel.DistributedDataParallel):
                    stack.enter_context(network.no_sync())
                yield

        # Processes average their gradients; together they see `whole` images.
        share = c.ranks.world / parts[0].whole
        self._stepper.take(
            network, parts, self._step_loss, rate, step=step, share=share, before=before
        )
        if self._ema is not None:
            self._ema.update(self._model, step=step + 1)
        self._tick(float(parts[0].whole))

    def _step_loss(self, network: nn.Module, part: Part) -> Tensor:
        inputs, target = part.inputs, part.truth
        if self._mixup is not None:
            with LOCK, borrowed_generators():
                seed_all(self._step_seed)
                inputs, target = self._mixup(inputs, target)
        device = self._c.ranks.device
        inputs = inputs.to(device, memory_format=torch.channels_last, non_blocking=True)
        taught = part.taught.to(device) if part.taught is not None else None
        if taught is None and self._c.teacher is not None:
            taught = Taught(logits=self._c.teacher(inputs))
        return self._loss(network(inputs), target.to(device, non_blocking=True), taught)

    def _more(self) -> dict[str, Tensor]:
        if self._ema is None:
            return {}
        return {f"ema.{k}": v for k, v in self._ema.module.state_dict().items()}

    def _save(self, epoch: int, at: int, loss_sum: float, images: int, seconds: float) -> None:
        """Write where this stands; the first process does."""
        c = self._c
        if c.ranks.main:
            extra = {
                "step": at,
                "rows": self._rows,
                "loss_sum": loss_sum,
                "images": images,
                "seconds": seconds,
                "scaler": self._stepper.scaler.state_dict(),
            }
            position = Position(epoch, c.plan, extra)
            save_checkpoint(
                c.checkpoint, self._model, self._stepper.optimizer, position, self._more()
            )
        c.ranks.wait()

    def _resume(self) -> tuple[int, int, float]:
        """Return epoch, step in it and its seconds so far."""
        c = self._c
        if not c.checkpoint.exists():
            return 0, 0, 0.0
        found = load_checkpoint_into(
            c.checkpoint, self._model, self._stepper.optimizer, c.plan, self._more()
        )
        extra = found.extra
        self._rows = list(extra["rows"])
        if extra["scaler"] and self._stepper.scaler.is_enabled():
            self._stepper.scaler.load_state_dict(extra["scaler"])
        main = c.ranks.main  # sums over processes count what was before once
        self._stepper.begin(extra["loss_sum"] if main else 0.0, extra["images"] if main else 0)
        steps = c.source.steps_per_epoch
        done = (found.epoch * steps + int(extra["step"])) / max(steps, 1)
        self._tick(done * c.source.images_per_epoch)
        return found.epoch, int(extra["step"]), float(extra["seconds"])


def peak_memory(device: str) -> int:
    """Bytes that this process has held at most: of the GPU, or of main memory."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most) * (1 if sys.platform == "darwin" else 1024)


__all__ = ["AMP", "Course", "Diverged", "Row", "best_of", "fit", "part_seed", "rate_at"]
