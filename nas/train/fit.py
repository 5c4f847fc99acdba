"""The loop of a full training: global batches over processes, resumable at any step."""

from __future__ import annotations

import hashlib
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import mixup as timm_mixup
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from nas.core.progress import Tick, no_tick
from nas.data import Dataset
from nas.data.augment.spec import AugmentSpec, borrowed_generators, seed_all
from nas.export.weights import place
from nas.train.batches import LiveBatches, MicroBatch, RankShard, ReplayBatches
from nas.train.checkpoint import Position, load_checkpoint_into, save_checkpoint
from nas.train.distributed import Ranks
from nas.train.evaluate import SCORES, evaluate
from nas.train.loop import Diverged, Stepper
from nas.train.losses import DistillLoss, TeacherTargets
from nas.train.norms import settle, settled
from nas.train.optim import layer_lr_scales, make_optimizer, rate_at
from nas.train.train_config import Machine, TrainConfig
from space.errors import refuse

Row = dict[str, Any]
NEVER_LAGS = 1 << 62
"""Updates of batch norms that are frozen."""
AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, eq=False)
class FitArgs:
    """The arguments of a full training.

    `plan` holds the settings that decide its bits, as plain JSON; `teacher` returns the logits of inputs, if one
    teaches online; a checkpoint is written after every epoch and every `machine.save_steps` steps.
    """

    model: nn.Module
    source: LiveBatches | ReplayBatches
    config: TrainConfig
    machine: Machine
    dataset: Dataset
    spec: AugmentSpec
    ranks: Ranks
    plan: Mapping[str, Any]
    checkpoint: Path
    teacher: Callable[[Tensor], Tensor] | None


Report = Callable[[list[Row], Callable[[], Mapping[str, Tensor]], str | None], None]
"""Takes the rows so far, a function that returns the better weights of this epoch, and which they are ("raw" or "ema")
if they are the best of all epochs so far."""


def best_of(rows: Sequence[Row]) -> Row:
    """Return the epoch whose better weights have the best top-1 on the holdout, then loss; the first of equal ones."""

    def merit(row: Row) -> tuple[float, float]:
        prefix = "" if row["best_of"] == "raw" else "ema_"
        return row[f"{prefix}holdout_top1"], -row[f"{prefix}holdout_loss"]

    return max(rows, key=merit)


def micro_batch_seed(random_seed: int, step: int, number: int) -> int:
    """Return the seed of a micro-batch's draws, the same however the batch is divided."""
    text = f"{random_seed}/{step}/{number}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def freeze_batch_norms(model: nn.Module) -> None:
    """Put batch norms into eval mode: they use and keep the statistics that they have."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def fit(args: FitArgs, report: Report, tick: Tick = no_tick) -> list[Row]:
    """Train `args.model` in place, from its checkpoint on if there is one; a row for each epoch.

    Every process calls `report` after every epoch; `tick` counts images of all processes. Draws inside the net depend
    on (random seed, step, micro-batch) alone, so that a resumed run ends in the same weights wherever it stopped, on
    the CPU to the bit. Raises `Diverged`, InputError.
    """
    with torch.random.fork_rng(devices=[]):
        return _Loop(args, tick).run(report)


class _Loop:
    def __init__(self, args: FitArgs, tick: Tick) -> None:
        self._args, self._tick = args, tick
        self._recipe = recipe = args.config.recipe
        ranks = args.ranks
        self._model = place(args.model, ranks.device)
        self._shard = RankShard(ranks.rank, ranks.world, args.machine.accumulation_steps)
        optimizer = make_optimizer(
            self._model,
            lr=recipe.rates()[0],
            weight_decay=recipe.weight_decay,
            betas=(recipe.beta1, recipe.beta2),
            eps=recipe.eps,
            scales=self._layer_scales(),
        )
        self._ema: Any = None
        if recipe.ema_decay is not None:
            self._ema = ModelEmaV3(self._model, decay=recipe.ema_decay, use_warmup=recipe.ema_warmup)
        self._stepper = Stepper(
            self._model,
            optimizer,
            device=ranks.device,
            dtype=AMP[args.machine.amp],
            clip_norm=recipe.clip_norm,
            all_reduce=ranks.sum,
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
                mixup_alpha=recipe.mixup or 0.0,
                cutmix_alpha=recipe.cutmix or 0.0,
                prob=recipe.mix_prob,
                switch_prob=recipe.mix_switch_prob,
                mode=recipe.mix_mode,
                label_smoothing=recipe.label_smoothing,
                num_classes=args.dataset.num_classes,
            )
        self._rows: list[Row] = []
        self._step = 0

    def _layer_scales(self) -> dict[str, float] | None:
        """Return each parameter's share of the rate, if the recipe has a layer decay."""
        decay = self._recipe.layer_decay
        if decay is None:
            return None
        family, arch = self._args.config.family_and_arch
        blocks = [name for names in family.blocks(arch).values() for name in names]
        if not blocks:
            raise refuse("layer_decay", decay, "none for this family", "it names no blocks")
        return layer_lr_scales(self._model, blocks, decay)

    def run(self, report: Report) -> list[Row]:
        """Train to the end of the recipe, and as far as it was extended."""
        args = self._args
        with args.ranks.raise_on_all_ranks():
            epoch, start, seconds = self._resume()
        position = f"epoch {epoch}, step {start}"
        args.ranks.check_same("checkpoint", position, "a folder that all machines share")
        if args.machine.compile:
            self._model.compile()
        network = args.ranks.wrap(self._model)
        while epoch < self._args.config.epochs:
            row = self._train_epoch(network, epoch, start, seconds)
            weights = self._evaluate(row)
            self._rows.append(row)
            epoch, start, seconds = epoch + 1, 0, 0.0
            report(self._rows, weights, row["best_of"] if best_of(self._rows) is row else None)
            self._save(epoch, 0, 0.0, 0, 0.0)
        args.ranks.broadcast_buffers(self._model)
        settle(self._model, args.dataset.train, args.spec, **self._updates(epoch, "raw"))  # as it was evaluated
        return self._rows

    def _train_epoch(self, network: nn.Module, epoch: int, start: int, before: float) -> Row:
        """Train one epoch from step `start` on; `before`: seconds already spent on it."""
        args, steps = self._args, self._args.source.steps_per_epoch
        self._model.train()
        if self._recipe.bn == "eval":
            freeze_batch_norms(self._model)
        if start == 0:
            self._stepper.begin()
        started, rate, done = time.perf_counter() - before, 0.0, start
        for micro_batches in args.source.steps(epoch, start, self._shard):
            step = epoch * steps + done
            rate = rate_at(self._recipe, step, steps)
            self._take(network, micro_batches, rate, step)
            done += 1
            every = args.machine.save_steps
            if every is not None and done % every == 0 and done < steps:
                total, images = self._checked_sums(step)
                self._save(epoch, done, total, images, time.perf_counter() - started)
        assert done == steps, f"{done} of {steps} steps"
        total, images = self._checked_sums((epoch + 1) * steps - 1)
        seconds = time.perf_counter() - started
        return {
            "epoch": epoch + 1,
            "lr": rate,
            "train_loss": total / max(images, 1),
            "images": images,
            "seconds": seconds,
            "images_per_s": images / max(seconds, 1e-9),
            "peak_mem_bytes": peak_memory(args.ranks.device),
        }

    def _evaluate(self, row: Row) -> Callable[[], Mapping[str, Tensor]]:
        """Add the holdout's scores to an epoch's row, and which weights are better (`best_of`); return those.

        Raises `Diverged` for a loss that is not finite.
        """
        args, models = self._args, {"raw": self._model}
        if self._ema is not None:
            models["ema"] = self._ema.module
        merits, buffers = {}, {}
        for which, model in models.items():
            args.ranks.broadcast_buffers(model)
            classes, device = args.dataset.num_classes, args.ranks.device
            with settled(model, args.dataset.train, args.spec, **self._updates(row["epoch"], which)):
                result = evaluate(
                    model, args.dataset.holdout, args.spec, num_classes=classes, device=device, ranks=args.ranks
                )
                buffers[which] = {name: buffer.clone() for name, buffer in model.named_buffers()}
            scores = result.summary()
            prefix = "" if which == "raw" else "ema_"
            row |= {f"{prefix}holdout_{name}": scores[name] for name in SCORES}
            if not math.isfinite(scores["loss"]):
                raise Diverged(row["epoch"] * args.source.steps_per_epoch - 1, scores["loss"])
            merits[which] = scores["top1"], -scores["loss"]
        best = row["best_of"] = max(merits, key=lambda which: merits[which])
        state = models[best].state_dict
        return lambda: {name: buffers[best].get(name, value) for name, value in state().items()}

    def _updates(self, epochs: int, which: str) -> dict[str, Any]:
        """Return what decides whether batch norms lag after so many epochs; frozen ones never do.

        Averaged weights have averaged statistics, in which the first ones keep a share of decay^steps.
        """
        args, steps, device = self._args, self._args.source.steps_per_epoch, self._args.ranks.device
        if self._recipe.bn == "eval":
            return {"updates": NEVER_LAGS, "device": device}
        decay = self._recipe.ema_decay or 0.0 if which == "ema" else 0.0
        updates = steps * args.machine.accumulation_steps
        return {"updates": updates, "device": device, "first": decay ** (epochs * steps)}

    def _checked_sums(self, step: int) -> tuple[float, int]:
        """Return the sum of losses and the images of this epoch, over all processes.

        Raises `Diverged` unless losses and weights are finite, since what follows is kept: on a GPU the loss may not
        have been looked at yet, and gradients may not be finite where it is.
        """
        total = self._stepper.check_loss(step)
        sums = torch.stack([p.detach().float().sum() for p in self._model.parameters()])
        if not bool(torch.isfinite(sums).all()):
            raise Diverged(step, math.nan)
        return total, int(self._args.ranks.sum(torch.tensor(float(self._stepper.images))))

    def _take(self, network: nn.Module, micro_batches: list[MicroBatch], rate: float, step: int) -> None:
        images, self._step = micro_batches[0].global_batch, step
        # Processes average their gradients; together they see `images` images.
        weight = self._args.ranks.world / images
        self._stepper.take(network, micro_batches, self._step_loss, rate, step=step, weight=weight)
        if self._ema is not None:
            self._ema.update(self._model, step=step + 1)
        self._tick(float(images))

    def _step_loss(self, network: nn.Module, batch: MicroBatch) -> Tensor:
        seed = micro_batch_seed(self._args.config.random_seed, self._step, batch.number)
        torch.manual_seed(seed)
        inputs, truth = batch.inputs, batch.truth
        if self._mixup is not None:
            with borrowed_generators():
                seed_all(seed)
                inputs, truth = self._mixup(inputs, truth)
        device = self._args.ranks.device
        inputs = inputs.to(device, memory_format=torch.channels_last, non_blocking=True)
        targets = batch.targets.to(device) if batch.targets is not None else None
        if targets is None and self._args.teacher is not None:
            targets = TeacherTargets(logits=self._args.teacher(inputs))
        return self._loss(network(inputs), truth.to(device, non_blocking=True), targets)

    def _ema_state(self) -> dict[str, Tensor]:
        if self._ema is None:
            return {}
        return {f"ema.{k}": v for k, v in self._ema.module.state_dict().items()}

    def _save(self, epoch: int, step: int, loss_sum: float, images: int, seconds: float) -> None:
        """Write the checkpoint, in the first process; all wait for it."""
        args = self._args
        if args.ranks.main:
            extra = {
                "step": step,
                "rows": self._rows,
                "loss_sum": loss_sum,
                "images": images,
                "seconds": seconds,
                "scaler": self._stepper.scaler.state_dict(),
            }
            position = Position(epoch, args.plan, extra)
            save_checkpoint(args.checkpoint, self._model, self._stepper.optimizer, position, self._ema_state())
        args.ranks.wait()

    def _resume(self) -> tuple[int, int, float]:
        """Restore the checkpoint; return the epoch, the step in it and its seconds so far."""
        args = self._args
        if not args.checkpoint.exists():
            return 0, 0, 0.0
        found = load_checkpoint_into(
            args.checkpoint, self._model, self._stepper.optimizer, args.plan, self._ema_state()
        )
        extra = found.extra
        self._rows = list(extra["rows"])
        if extra["scaler"] and self._stepper.scaler.is_enabled():
            self._stepper.scaler.load_state_dict(extra["scaler"])
        main = args.ranks.main  # sums over processes count what was before once
        self._stepper.begin(extra["loss_sum"] if main else 0.0, extra["images"] if main else 0)
        steps = args.source.steps_per_epoch
        done = (found.epoch * steps + int(extra["step"])) / max(steps, 1)
        self._tick(done * args.source.images_per_epoch)
        return found.epoch, int(extra["step"]), float(extra["seconds"])


def peak_memory(device: str) -> int:
    """Return the most bytes that this process has held: of the GPU, or of main memory."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most) * (1 if sys.platform == "darwin" else 1024)
