"""Short trainings are graded on sound statistics, keep the weights that were graded, and see every image."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nas.data import Dataset
from nas.data.augment.spec import default_spec
from nas.data.augment.timm_engine import eval_batch
from nas.train.batches import LiveBatches, RankShard
from nas.train.norms import lags, settle, settled
from tests.train_cases import TINY, Stop, equal, resume, rows, sets, stop_at, trained, weights


def small_net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = (nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return nn.Sequential(*layers, nn.Dropout(0.5), nn.Linear(4, 10))


def state(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def test_averages_lag_while_what_was_before_has_a_hundredth() -> None:
    net = small_net()
    assert 0.9**43 > 0.01 > 0.9**44
    assert (lags(net, 43), lags(net, 44)) == (True, False)
    assert lags(net, 44, first=0.02)
    assert not lags(nn.Linear(2, 2), 0), "without batch norms nothing lags"
    net[1].momentum = 0.01
    assert lags(net, 400)


def test_statistics_are_those_of_the_training_images_as_evaluation_sees_them(dataset: Dataset) -> None:
    net, spec = small_net(), default_spec(dataset)
    assert settle(net, dataset.train, spec, updates=3, device="cpu")
    seen = net[0](eval_batch(dataset.train.pixels[:], spec))
    torch.testing.assert_close(net[1].running_mean, seen.mean(dim=(0, 2, 3)), rtol=0.02, atol=0.02)
    torch.testing.assert_close(net[1].running_var, seen.var(dim=(0, 2, 3)), rtol=0.05, atol=0.02)
    assert net.training
    once = state(net)
    assert settle(net, dataset.train, spec, updates=3, device="cpu")
    assert equal(once, state(net)), "the same weights have the same statistics"
    assert not settle(net, dataset.train, spec, updates=44, device="cpu")


def test_training_goes_on_with_its_own_statistics(dataset: Dataset) -> None:
    net, spec = small_net(), default_spec(dataset)
    net(torch.randn(8, 3, 32, 32))
    before, drawn = state(net), torch.get_rng_state()
    with settled(net, dataset.train, spec, updates=1, device="cpu"):
        assert not torch.equal(net[1].running_mean, before["1.running_mean"])
    assert equal(before, state(net))
    assert net[1].momentum == 0.1
    assert torch.equal(torch.get_rng_state(), drawn)


def test_what_was_graded_is_saved_and_a_resumed_training_ends_alike(
    cache: Path, digits: Dataset, tmp_path: Path
) -> None:
    arch = tmp_path / "arch.json"
    arch.write_text(json.dumps({"family": "tinyvit", "arch": TINY}))
    more = [*sets(ema_decay=0.9), "--batch-size", "32"]
    whole, cut = trained(cache, tmp_path / "whole", *more, arch=arch), tmp_path / "cut"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 7)
        with pytest.raises(Stop):
            trained(cache, cut, *more, "--save-steps", "2", arch=arch)
    assert resume(cache, cut) == 0
    for name in ("last", "best"):
        assert equal(weights(whole, name), weights(cut, name)), name
    # A saved model scores what its epoch was given.
    from nas.export.load import find_network
    from nas.train.evaluate import evaluate

    log = {int(row["epoch"]): row for row in rows(whole)}
    for name in ("last", "best"):
        saved = find_network(str(whole / f"{name}.json"), "--evaluate").saved()
        prefix = "ema_" if json.loads((whole / f"{name}.json").read_text())["score"]["weights"] == "ema" else ""
        found = evaluate(saved.build(), digits.holdout, default_spec(digits), num_classes=10).summary()
        epoch = json.loads((whole / f"{name}.json").read_text())["score"]["epoch"]
        assert found["loss"] == pytest.approx(float(log[epoch][f"{prefix}holdout_loss"]), abs=1e-5)


@pytest.mark.parametrize("mixing", [False, True])
@pytest.mark.parametrize(("images", "batch"), [(58, 32), (33, 32), (64, 32), (59, 8), (9, 4)])
def test_an_epoch_has_every_image_and_no_batch_of_one(dataset: Dataset, images: int, batch: int, mixing: bool) -> None:
    from dataclasses import replace

    train_split = dataset.train
    split = replace(
        train_split,
        keys=list(train_split.keys)[:images],
        labels=train_split.labels[:images],
        pixels=train_split.pixels[:images],
        names=(),
    )
    shard = RankShard(0, 1, 1)
    source = LiveBatches(
        split,
        default_spec(dataset),
        batch_size=batch,
        repeats=1,
        random_seed=0,
        workers=0,
        device="cpu",
        shard=shard,
        mixing=mixing,
    )
    sizes = [len(step[0].inputs) for step in source.steps(0, 0, shard)]
    rows_seen, _ = source.draws(0)
    assert len(sizes) == source.steps_per_epoch
    assert (
        sum(sizes) == source.images_per_epoch == len(set(rows_seen.tolist())) == images - (images % 2 if mixing else 0)
    )
    assert min(sizes) >= 2
    assert max(sizes) <= batch
    assert max(sizes) - min(sizes) <= (2 if mixing else 1)
    if mixing:
        assert all(size % 2 == 0 for size in sizes)
    assert np.array_equal(np.sort(rows_seen), np.arange(images)) or mixing
