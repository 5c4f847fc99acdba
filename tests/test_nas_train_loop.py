"""Laws of the training loop: its schedule, divergence, and resuming to the same bits."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from nas.export.weights import weights_digest
from nas.train import loop
from nas.train.loop import Diverged, TrainSettings, train
from nas.train.optim import lr_at
from space import Context, get_family
from space.errors import InputError
from tests.train_cases import TINY

SETTINGS = TrainSettings(epochs=3, lr=1e-2, batch_size=8, warmup_epochs=1.0)
IMAGES, CLASSES, PX = 24, 3, 32


def make_model(random_seed: int = 0, small: bool = False, **options: float) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_seed)
        if small:
            return nn.Sequential(nn.Flatten(), nn.Linear(3 * PX * PX, CLASSES))
        family = get_family("tinyvit")
        return family.build(family.arch(TINY), Context(PX, CLASSES), **options)


def batches(epoch: int):
    """Give three batches of eight that depend on the epoch alone."""
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(IMAGES // 8):
        labels = torch.randint(0, CLASSES, (8,), generator=generator)
        noise = torch.randn(8, 3, PX, PX, generator=generator)
        yield noise * 0.1 + labels.view(-1, 1, 1, 1), labels


def step_loss(model, batch):
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels, reduction="none")


def run(model, plan=SETTINGS, *, batches=batches, loss=step_loss, device="cpu", **kwargs):
    return train(model, batches, loss, plan, steps_per_epoch=3, device=device, **kwargs)


def test_steps_use_the_schedule_and_settings(monkeypatch):
    seen = []

    class Recorder(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(loop, "make_optimizer", lambda model, **_: Recorder(model.parameters(), lr=0.0))
    run(make_model(small=True))
    want = [lr_at(s, total_steps=9, warmup_steps=3, lr=1e-2, min_lr=1e-5) for s in range(9)]
    assert seen == want


def test_training_learns_and_reports():
    ticks = []
    model = make_model()
    history = run(model, replace(SETTINGS, epochs=4), tick=ticks.append)
    assert sum(ticks) == sum(e.images for e in history.epochs) == 4 * IMAGES
    assert history.epochs[-1].loss < history.epochs[0].loss
    assert history.final_loss == history.epochs[-1].loss
    assert history.images_per_s > 0
    assert model.training


def test_stopped_and_resumed_equals_undisturbed_to_the_bit(tmp_path):
    """Between epochs, or inside one: that one starts again."""
    path, ticks = tmp_path / "position.safetensors", []

    def breaking(epoch):
        for at, batch in enumerate(batches(epoch)):
            if (epoch, at) == (1, 2):
                raise KeyboardInterrupt
            yield batch

    with torch.random.fork_rng(devices=[]):  # dropout draws from the generator
        torch.manual_seed(5)
        history = run(whole := make_model(drop_rate=0.2))
        for stop in (1, 2, None):
            path.unlink(missing_ok=True)
            torch.manual_seed(5)
            with contextlib.nullcontext() if stop else pytest.raises(KeyboardInterrupt):
                run(make_model(drop_rate=0.2), batches=batches if stop else breaking, checkpoint=path, stop_after=stop)
            ticks.clear()
            torch.manual_seed(99)
            # Another random start: everything that matters must come from the file.
            resumed = make_model(random_seed=7, drop_rate=0.2)
            again = run(resumed, checkpoint=path, tick=ticks.append)
            assert weights_digest(resumed.state_dict()) == weights_digest(whole.state_dict()), stop
            assert [e.loss for e in again.epochs] == [e.loss for e in history.epochs]
            assert sum(ticks) == 3 * IMAGES
            assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_foreign_and_damaged_checkpoints_are_refused(tmp_path):
    path = tmp_path / "position.safetensors"
    run(make_model(small=True), checkpoint=path, stop_after=1)
    with pytest.raises(InputError, match=r"other settings \(lr\)"):
        run(make_model(small=True), replace(SETTINGS, lr=1e-3), checkpoint=path)
    with pytest.raises(InputError, match="architecture"):
        run(make_model(), checkpoint=path)
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(InputError, match="whole, readable"):
        run(make_model(small=True), checkpoint=path)


@pytest.mark.parametrize("at", [0, 1, 4, 8])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_divergence_is_seen_at_its_step(at, value):
    calls = []

    def poisoned(model, batch):
        calls.append(None)
        losses = step_loss(model, batch)
        return losses * value if len(calls) == at + 1 else losses

    with pytest.raises(Diverged) as caught:
        run(make_model(small=True), loss=poisoned)
    assert caught.value.step == at
    assert not math.isfinite(caught.value.loss)


def test_late_checks_still_see_divergence(monkeypatch):
    """On a GPU the loss is looked at now and then; its sum keeps a NaN until the epoch's end."""
    monkeypatch.setitem(loop.CHECK_EVERY, "cpu", 10**9)

    def poisoned(model, batch):
        return step_loss(model, batch) * math.nan

    with pytest.raises(Diverged):
        run(make_model(small=True), loss=poisoned)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_mixed_precision_trains_on_a_gpu(tmp_path):
    def moved(model, batch):
        return step_loss(model, (batch[0].cuda(), batch[1].cuda())).float()

    path = tmp_path / "p.safetensors"
    history = run(make_model(), loss=moved, device="cuda", checkpoint=path)
    assert math.isfinite(history.final_loss)
