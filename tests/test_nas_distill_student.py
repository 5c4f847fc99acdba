"""The proxy: the same training for all, scored image by image, with no teacher in memory."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from label_cases import built

from nas.core.config import choices_of
from nas.core.progress import no_tick
from nas.data import Dataset, DataSpec, prepare
from nas.data.augment.spec import default_spec
from nas.data.augment.timm_engine import eval_batch
from nas.data.augment.views import EVAL_BATCH
from nas.distill.jobs import TrainJob, train
from nas.distill.student import (
    Evaluation,
    ParentNetwork,
    ProxyScore,
    StudentTraining,
    evaluate,
    evaluate_test,
    mean_se,
    proxy_settings,
    start_model,
    train_and_score,
)
from nas.export.weights import load_weights, weights_digest
from nas.labels.reader import holdout_batches
from nas.labels.store import LabelStore
from nas.train.loop import Diverged
from nas.train.losses import DistillLoss
from nas.train.optim import SCRATCH_LR
from space import Context, get_family
from space.errors import InputError
from tests.train_cases import dense_target

FAMILY = get_family("tinyvit")
ARCH = FAMILY.arch(
    {
        "embed_dims": [32, 32, 64, 64],
        "depths": [1, 1, 2, 1],
        "window_sizes": [7, 14, 7],
        "mbconv_expand_ratio": 2.0,
        "mlp_ratio": 2.0,
        "head_dim": 32,
    }
)
CHILD = replace(ARCH, depths=(1, 1, 1, 1))
CTX = Context(32, 10)
SETTINGS = proxy_settings(2, SCRATCH_LR, batch_size=16)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return prepare(DataSpec("digits", img_size=32, max_images=80), tmp_path_factory.mktemp("d"))


@pytest.fixture(scope="module")
def store(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> LabelStore:
    return built(tmp_path_factory.mktemp("stores") / "s", dataset, epochs=3, topk=4)


def run(dataset: Dataset, store: LabelStore, arch: Any = ARCH, family: Any = FAMILY, **changes: Any) -> ProxyScore:
    """Train an arch; `changes` are of the training, or options of `train_and_score`."""
    own = {f.name for f in fields(StudentTraining)}
    given = {"settings": SETTINGS, "random_seed": 0}
    given |= {name: value for name, value in changes.items() if name in own}
    training = StudentTraining(family=family, arch=arch, context=CTX, **given)
    options = {name: value for name, value in changes.items() if name not in own}
    return train_and_score(training, dataset, store, **options)


def answer(score: ProxyScore) -> dict[str, Any]:
    """Leave out what no two runs share: times and places."""
    timed = ("images_per_s", "seconds", "weights", "per_image")
    return {k: v for k, v in score.to_dict().items() if k not in timed}


@pytest.fixture(scope="module")
def parent(dataset: Dataset, store: LabelStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("p") / "weights.safetensors"
    run(dataset, store, out_weights=path)
    return path


def test_scores_are_those_of_the_weights_left(dataset: Dataset, store: LabelStore, tmp_path: Path) -> None:
    out = tmp_path / "weights.safetensors"
    ticks: list[float] = []
    score = run(dataset, store, out_weights=out, tick=ticks.append)
    assert sum(ticks) == 2 * len(dataset.train) + len(dataset.holdout)
    assert score.images == 2 * len(dataset.train)
    assert json.loads(json.dumps(score.to_dict())) == score.to_dict()
    state = load_weights(out)
    assert score.weights_digest == weights_digest(state)
    # The oracle: the dense loss in float64 on a net that never trained here.
    net = FAMILY.build(ARCH, CTX)
    net.load_state_dict(state)
    losses = np.zeros(len(dataset.holdout))
    right = np.zeros(len(dataset.holdout), dtype=bool)
    for batch in holdout_batches(dataset, store, 7):
        with torch.no_grad():
            logits = net.eval()(batch.inputs).double()
        target = dense_target(batch.index, batch.prob, batch.tail, 10).double()
        rows = batch.rows.numpy()
        losses[rows] = -(target * logits.log_softmax(1)).sum(1).numpy()
        right[rows] = logits.argmax(1).numpy() == dataset.holdout.labels[rows]
    kept = Evaluation.load(Path(score.per_image or ""))
    np.testing.assert_allclose(kept.soft_loss, losses, rtol=1e-4, atol=1e-5)
    assert (kept.correct == right).all()
    n = len(right)
    assert score.holdout_images == n
    assert score.soft_loss == pytest.approx(losses.mean(), rel=1e-4)
    assert score.soft_loss_se == pytest.approx(losses.std(ddof=1) / math.sqrt(n), rel=1e-3)
    assert score.top1 == right.mean()
    assert score.top1_se == pytest.approx(right.std(ddof=1) / math.sqrt(n))


def test_the_same_job_gives_the_same_bytes_and_leaves_the_generator_alone(
    dataset: Dataset, store: LabelStore, tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    one = run(dataset, store, out_weights=tmp_path / "1.safetensors")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12345)  # nobody's business
    two = run(dataset, store, out_weights=tmp_path / "2.safetensors")
    torch.set_rng_state(before)
    assert answer(one) == answer(two)
    for kind in (".safetensors", ".holdout.safetensors"):
        assert (tmp_path / f"1{kind}").read_bytes() == (tmp_path / f"2{kind}").read_bytes()
    assert answer(run(dataset, store, random_seed=1))["soft_loss"] != one.soft_loss


def test_a_race_in_rungs_ends_like_one_run(dataset: Dataset, store: LabelStore, tmp_path: Path) -> None:
    whole = run(dataset, store, out_weights=tmp_path / "w.safetensors")
    position = tmp_path / "position.safetensors"
    rung = run(dataset, store, checkpoint=position, stop_after=1)
    assert rung.epochs == 1
    last = run(dataset, store, checkpoint=position, out_weights=tmp_path / "r.safetensors")
    assert answer(last) == answer(whole)


def test_scoring_learns(dataset: Dataset, store: LabelStore) -> None:
    longer = run(dataset, store, settings=proxy_settings(8, SCRATCH_LR, batch_size=16))
    assert longer.soft_loss < run(dataset, store).soft_loss


def test_an_untouched_child_is_its_parent(dataset: Dataset, store: LabelStore, parent: Path) -> None:
    source = ParentNetwork(arch=ARCH, weights=parent)
    same, copied = start_model(FAMILY, ARCH, CTX, random_seed=5, parent=source)
    state = load_weights(parent)
    assert weights_digest(same.state_dict()) == weights_digest(state)
    assert copied == sum(t.numel() for t in state.values())


def test_a_child_starts_from_its_parent(dataset: Dataset, store: LabelStore, parent: Path) -> None:
    source = ParentNetwork(arch=ARCH, weights=parent)
    frozen = replace(SETTINGS, lr=0.0, weight_decay=0.0, min_lr=0.0)
    inherited = run(dataset, store, CHILD, settings=frozen, parent=source)
    fresh = run(dataset, store, CHILD, settings=frozen)
    assert 0 < inherited.copied <= sum(t.numel() for t in FAMILY.build(CHILD, CTX).state_dict().values())
    assert fresh.copied == 0
    assert inherited.soft_loss != fresh.soft_loss


def test_later_epochs_of_the_store_are_other_epochs(dataset: Dataset, store: LabelStore) -> None:
    assert run(dataset, store).soft_loss != run(dataset, store, first_epoch=1).soft_loss


def test_a_subset_is_fixed_by_content(dataset: Dataset, store: LabelStore) -> None:
    some = run(dataset, store, images=24)
    assert some.images == 48
    assert answer(some) == answer(run(dataset, store, images=24))
    assert answer(run(dataset, store, images=10**6)) == answer(run(dataset, store))


def test_a_diverging_candidate_is_an_outcome(dataset: Dataset, store: LabelStore) -> None:
    wild = replace(SETTINGS, lr=1e30, clip_norm=None, warmup_epochs=0.0)
    with pytest.raises(Diverged, match="loss became"):
        run(dataset, store, settings=wild)


def test_the_test_split_is_scored_image_by_image(dataset: Dataset, store: LabelStore, parent: Path) -> None:
    augment = default_spec(dataset)
    ticks: list[float] = []
    got = evaluate_test(FAMILY, ARCH, CTX, parent, dataset, augment, device="cpu", tick=ticks.append)
    assert sum(ticks) == len(dataset.test) == len(got.correct)
    net = FAMILY.build(ARCH, CTX)
    net.load_state_dict(load_weights(parent))
    with torch.no_grad():
        logits = net.eval()(eval_batch(dataset.test.pixels[:], augment))
    labels = torch.from_numpy(dataset.test.labels.copy())
    assert (got.correct == (logits.argmax(1) == labels).numpy()).all()
    want = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    np.testing.assert_allclose(got.soft_loss, want.numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="exactly this architecture"):
        evaluate_test(FAMILY, CHILD, CTX, parent, dataset, augment, device="cpu")


@pytest.mark.parametrize("n", [1, 2, 17])
def test_means_and_standard_errors(n: int) -> None:
    values = np.random.default_rng(n).normal(size=n)
    mean, se = mean_se(values)
    assert mean == pytest.approx(values.mean())
    assert se == pytest.approx(values.std(ddof=1) / math.sqrt(n) if n > 1 else 0.0)


@pytest.mark.slow
def test_a_hard_label_term_and_a_temperature_change_training_but_not_the_score(
    dataset: Dataset, store: LabelStore
) -> None:
    plain = run(dataset, store)
    assert answer(run(dataset, store, loss=DistillLoss())) == answer(plain)
    scores = {
        run(dataset, store, loss=loss).soft_loss
        for loss in (
            DistillLoss("soft", 1.0, temperature=2.0),
            DistillLoss(hard_weight=0.5),
            DistillLoss("soft", 1.0, temperature=3.0),
        )
    }
    assert len(scores | {plain.soft_loss}) == 4
    assert all(math.isfinite(score) for score in scores)


KINDS = choices_of("distill")
VIT = get_family("vit")
TOKEN = VIT.arch({"embed_dim": 32, "depth": 2, "head_dim": 16, "mlp_ratio": 2.0, "patch_size": 8, "dist_token": 1})
PLAIN = replace(TOKEN, dist_token=False)


def learn(dataset: Dataset, store: LabelStore, arch: Any, kind: str, **changes: Any) -> ProxyScore:
    """Train a ViT as `run` does, by a kind of distillation."""
    return run(dataset, store, arch, VIT, loss=DistillLoss(kind), **changes)


def test_every_kind_of_distillation_trains_and_is_scored_alike(
    dataset: Dataset, store: LabelStore, tmp_path: Path
) -> None:
    scores = {}
    for kind in KINDS:
        out = tmp_path / f"{kind}.safetensors"
        scores[kind] = learn(dataset, store, TOKEN, kind, out_weights=out)
        # As anybody has it who loads the weights: both heads' mean, the plain cross-entropy.
        net = VIT.build(TOKEN, CTX)
        net.load_state_dict(load_weights(out))
        batches = holdout_batches(dataset, store, EVAL_BATCH)
        found = evaluate(net, batches, dataset.holdout.labels, "cpu")
        assert mean_se(found.soft_loss)[0] == scores[kind].soft_loss
        assert not scores[kind].notes
    assert len({score.soft_loss for score in scores.values()}) == len(KINDS)
    default = answer(run(dataset, store, TOKEN, VIT))
    assert default == {**answer(scores["sparse"]), "weights_digest": None}


def test_a_race_by_token_in_rungs_ends_like_one_run(dataset: Dataset, store: LabelStore, tmp_path: Path) -> None:
    whole = learn(dataset, store, TOKEN, "token", out_weights=tmp_path / "w.safetensors")
    position = tmp_path / "position.safetensors"
    learn(dataset, store, TOKEN, "token", checkpoint=position, stop_after=1)
    last = learn(dataset, store, TOKEN, "token", checkpoint=position, out_weights=tmp_path / "r.safetensors")
    assert answer(last) == answer(whole)


def test_a_net_that_has_lost_its_token_learns_hard(dataset: Dataset, store: LabelStore) -> None:
    found = learn(dataset, store, PLAIN, "token")
    assert "no distillation token here: hard distillation on its one head" in found.notes
    assert {**answer(found), "notes": []} == answer(learn(dataset, store, PLAIN, "hard"))


def test_of_mixed_images_the_classes_of_both_are_learnt(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}
    mixed = built(tmp_path / "s", dataset, changes=changes, epochs=2, topk=4)
    seen: list[torch.Tensor] = []
    learns = DistillLoss.__call__

    def watched(self: DistillLoss, outputs: Any, target: torch.Tensor, taught: Any) -> Any:
        seen.append(target)
        return learns(self, outputs, target, taught)

    monkeypatch.setattr(DistillLoss, "__call__", watched)
    assert math.isfinite(learn(dataset, mixed, TOKEN, "hard").soft_loss)
    shares = torch.cat(seen)
    assert shares.shape == (2 * len(dataset.train), 10)
    assert torch.allclose(shares.sum(1), torch.ones(len(shares)))
    assert ((shares > 0).sum(1) == 2).any()
    seen.clear()
    learn(dataset, mixed, TOKEN, "sparse")
    assert all(target.ndim == 1 for target in seen), "nothing is counted that nobody asks for"


def test_a_job_trains_by_the_asked_distillation(dataset: Dataset, store: LabelStore, tmp_path: Path) -> None:
    job = TrainJob(
        family="vit",
        arch=VIT.to_dict(TOKEN),
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
        label_overflow="error",
        label_epochs=3,
        out=tmp_path / "sparse",
    )
    for kind in ("sparse", "token"):
        told = train(replace(job, distill=kind, out=tmp_path / kind), no_tick)
        want = learn(dataset, store, TOKEN, kind, label_epochs=3, label_overflow="error")
        assert told["soft_loss"] == want.soft_loss
        assert not told["notes"]
    lost = replace(job, arch=VIT.to_dict(PLAIN), distill="token", out=tmp_path / "lost")
    assert "no distillation token" in train(lost, no_tick)["notes"][0]


def test_images_without_a_label_are_skipped_only_where_asked(
    dataset: Dataset, store: LabelStore, tmp_path: Path
) -> None:
    larger = prepare(DataSpec("digits", img_size=32, max_images=120), tmp_path)
    with pytest.raises(InputError, match="no label for"):
        run(larger, store)
    score = run(larger, store, missing="skip")
    assert any("images skipped" in note for note in score.notes)
    labelled = set(larger.holdout.keys) & set(dataset.holdout.keys)
    assert score.holdout_images == len(labelled)
