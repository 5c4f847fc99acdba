"""The proxy: the same training for all, scored image by image, with no teacher in memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from label_cases import built

from nas.core.config import choices_of
from nas.core.per_image import per_image
from nas.core.progress import no_tick
from nas.data import Dataset, DataSpec, prepare
from nas.data.augment.timm_engine import eval_batch
from nas.distill.jobs import EarlierRung, ParentWeights, TrainJob, train
from nas.distill.student import ParentNetwork, start_model
from nas.export.weights import load_weights, weights_digest
from nas.jobs.job import CHECKPOINT
from nas.labels.reader import holdout_batches
from nas.labels.store import LabelStore
from nas.train.loop import Diverged
from nas.train.losses import DistillLoss
from nas.train.optim import SCRATCH_LR
from space import Context, get_family
from space.errors import InputError
from tests.train_cases import TINY, VIT, dense_target

FAMILY, VITS = get_family("tinyvit"), get_family("vit")
ARCH = FAMILY.arch({**TINY, "depths": [1, 1, 2, 1]})
CHILD = FAMILY.arch(TINY)
CTX = Context(32, 10)
TOKEN = {"family": "vit", "arch": {**VIT, "dist_token": True}}
PLAIN = {"family": "vit", "arch": VIT}
KINDS = choices_of("distill")

Run = Callable[..., tuple[dict[str, Any], Path]]


@pytest.fixture(scope="module")
def run(dataset: Dataset, store: LabelStore, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train as a job with some changes; the values that do not pass, and the folder."""
    base, number = tmp_path_factory.mktemp("out"), itertools.count()
    job = TrainJob(
        family="tinyvit",
        arch=FAMILY.to_dict(ARCH),
        context=CTX,
        dataset=dataset.folder,
        store=store.folder,
        store_id=store.id,
        init="scratch",
        epochs=2,
        lr=SCRATCH_LR,
        batch_size=16,
        random_seed=0,
        device="cpu",
        missing="error",
        label_overflow="cycle",
        label_epochs=None,
        out=base,
    )

    def trained(tick: Any = no_tick, **changes: Any) -> tuple[dict[str, Any], Path]:
        out = base / str(next(number))
        values = train(replace(job, **{"out": out, **changes}), tick)
        return {k: v for k, v in values.items() if k not in ("images_per_s", "seconds")}, out

    return trained


@pytest.fixture(scope="module")
def parent(run: Run) -> Path:
    return run()[1] / "weights.safetensors"


def test_scores_are_those_of_the_weights_left(dataset: Dataset, store: LabelStore, run: Run) -> None:
    ticks: list[float] = []
    score, out = run(test=True, tick=ticks.append)
    assert sum(ticks) == 2 * len(dataset.train) + len(dataset.holdout)
    assert score["images"] == 2 * len(dataset.train)
    state = load_weights(out / "weights.safetensors")
    assert score["weights_digest"] == weights_digest(state)
    # The oracle: the dense loss in float64 on a net that never trained here.
    net = FAMILY.build(ARCH, CTX)
    net.load_state_dict(state)
    net.eval()
    losses, right = np.zeros(len(dataset.holdout)), np.zeros(len(dataset.holdout), dtype=bool)
    with torch.no_grad():
        for batch in holdout_batches(dataset, store, 7):
            logits = net(batch.inputs).double()
            target = dense_target(batch.index, batch.prob, batch.tail, 10).double()
            rows = batch.rows.numpy()
            losses[rows] = -(target * logits.log_softmax(1)).sum(1).numpy()
            right[rows] = logits.argmax(1).numpy() == dataset.holdout.labels[rows]
        tested = net(eval_batch(dataset.test.pixels[:], store.spec.augment))
    kept = per_image(out, "holdout")
    np.testing.assert_allclose(kept.soft_loss, losses, rtol=1e-4, atol=1e-5)
    assert ((kept.predicted == kept.truth) == right).all()
    n = len(right)
    assert score["holdout_images"] == n
    assert score["soft_loss"] == pytest.approx(losses.mean(), rel=1e-4)
    assert score["soft_loss_se"] == pytest.approx(losses.std(ddof=1) / math.sqrt(n), rel=1e-3)
    assert score["top1"] == right.mean()
    assert score["top1_se"] == pytest.approx(right.std(ddof=1) / math.sqrt(n))
    labels = torch.from_numpy(dataset.test.labels.copy())
    kept = per_image(out, "test")
    assert kept.predicted.tolist() == tested.argmax(1).tolist()
    want = torch.nn.functional.cross_entropy(tested, labels, reduction="none")
    np.testing.assert_allclose(kept.soft_loss, want.numpy(), rtol=1e-4, atol=1e-5)
    assert score["test_top1"] == float((tested.argmax(1) == labels).double().mean())


def test_the_same_job_gives_the_same_bytes_and_another_another_score(dataset: Dataset, run: Run) -> None:
    before = torch.get_rng_state()
    one, out = run()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12345)  # nobody's business
    two, again = run()
    torch.set_rng_state(before)
    assert one == two == run(images=10**6)[0]
    for name in ("weights.safetensors", "holdout.safetensors"):
        assert (out / name).read_bytes() == (again / name).read_bytes()
    few = run(images=24)[0]
    assert few["images"] == 48
    others = [{"random_seed": 1}, {"first_epoch": 1}, {"hard_weight": 0.5}, {"epochs": 5}]
    scores = [run(**change)[0]["soft_loss"] for change in others]
    assert len({one["soft_loss"], few["soft_loss"], *scores}) == 6
    assert scores[-1] < one["soft_loss"], "more epochs teach more"


def test_a_child_starts_from_its_parent(run: Run, parent: Path) -> None:
    source = ParentNetwork(arch=ARCH, weights=parent)
    same, copied = start_model(FAMILY, ARCH, CTX, random_seed=5, parent=source)
    state = load_weights(parent)
    assert weights_digest(same.state_dict()) == weights_digest(state)
    assert copied == sum(t.numel() for t in state.values())
    frozen: dict[str, Any] = {"arch": FAMILY.to_dict(CHILD), "lr": 0.0}
    kept = ParentWeights(arch=FAMILY.to_dict(ARCH), weights=parent)
    inherited, fresh = run(**frozen, init="inherit", parent=kept)[0], run(**frozen)[0]
    assert 0 < inherited["copied"] <= sum(t.numel() for t in FAMILY.build(CHILD, CTX).state_dict().values())
    assert fresh["copied"] == 0
    assert inherited["soft_loss"] != fresh["soft_loss"]


def test_a_diverging_candidate_is_an_outcome(run: Run) -> None:
    with pytest.raises(Diverged, match="loss became"):
        run(lr=1e30)


def test_every_kind_of_distillation_trains_and_is_scored_alike(run: Run, dataset: Dataset, store: LabelStore) -> None:
    scores = {}
    for kind in KINDS:
        found, out = run(**TOKEN, distill=kind)
        scores[kind] = found["soft_loss"]
        # As anybody has it who loads the weights: both heads' mean, the plain cross-entropy.
        net = VITS.build(VITS.arch(TOKEN["arch"]), CTX)
        net.load_state_dict(load_weights(out / "weights.safetensors"))
        (batch,) = holdout_batches(dataset, store, 1000)
        with torch.no_grad():
            logits = net.eval()(batch.inputs)
        target = dense_target(batch.index, batch.prob, batch.tail, 10)
        losses = -(target * logits.log_softmax(1)).sum(1)
        assert found["soft_loss"] == pytest.approx(float(losses.mean()), rel=1e-4)
        assert not found["notes"]
    assert len(set(scores.values())) == len(KINDS)


def test_a_race_by_token_in_rungs_ends_like_one_run(run: Run) -> None:
    job = {**TOKEN, "distill": "token"}
    whole = run(**job)[0]
    first, out = run(**job, rung=1)
    assert first["epochs"] == 1
    last = run(**job, continue_from=EarlierRung(epochs=1, checkpoint=out / CHECKPOINT))[0]
    assert last == whole


def test_a_net_that_has_lost_its_token_learns_hard(run: Run) -> None:
    found, hard = run(**PLAIN, distill="token")[0], run(**PLAIN, distill="hard")[0]
    assert found["notes"] == ["no distillation token here: hard distillation on its one head"]
    assert {**found, "notes": []} == hard


def test_of_mixed_images_the_classes_of_both_are_learnt(
    dataset: Dataset, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"mixup": 0.8, "cutmix": 1.0}
    mixed = built(tmp_path / "s", dataset, **changes, epochs=2, topk=4)
    seen: list[torch.Tensor] = []
    learns = DistillLoss.__call__

    def watched(self: DistillLoss, outputs: Any, target: torch.Tensor, taught: Any) -> Any:
        seen.append(target)
        return learns(self, outputs, target, taught)

    monkeypatch.setattr(DistillLoss, "__call__", watched)
    job = {**TOKEN, "store": mixed.folder, "store_id": mixed.id}
    assert math.isfinite(run(**job, distill="hard")[0]["soft_loss"])
    shares = torch.cat(seen)
    assert shares.shape == (2 * len(dataset.train), 10)
    assert torch.allclose(shares.sum(1), torch.ones(len(shares)))
    assert ((shares > 0).sum(1) == 2).any()
    seen.clear()
    run(**job)
    assert all(target.ndim == 1 for target in seen), "nothing is counted that nobody asks for"


def test_images_without_a_label_are_skipped_only_where_asked(dataset: Dataset, run: Run, tmp_path: Path) -> None:
    larger = prepare(DataSpec("digits", img_size=32, max_images=120), tmp_path)
    with pytest.raises(InputError, match="no label for"):
        run(dataset=larger.folder)
    score, _ = run(dataset=larger.folder, missing="skip")
    assert any("images skipped" in note for note in score["notes"])
    assert score["holdout_images"] == len(set(larger.holdout.keys) & set(dataset.holdout.keys))
