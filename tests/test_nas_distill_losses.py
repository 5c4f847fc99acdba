"""The sparse loss equals the dense one, values and gradients, at any size and precision."""

from __future__ import annotations

import pytest
import torch
from timm.loss import SoftTargetCrossEntropy

from nas.train.losses import (
    SoftLoss,
    dense_target,
    label_entropy,
    retemper,
    sparse_soft_cross_entropy,
)
from space.errors import InputError


def problem(
    batch: int, classes: int, topk: int, seed: int, spread: float = 3.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, generator=gen) * spread
    teacher = torch.softmax(torch.randn(batch, classes, generator=gen).double() * spread, 1)
    prob, index = teacher.topk(topk, dim=1)
    tail = teacher.scatter(1, index, 0.0).sum(1)
    return logits, index, prob.float(), tail.float()


@pytest.mark.parametrize(
    ("classes", "topk"), [(2, 1), (3, 2), (10, 9), (10, 1), (100, 10), (1000, 10), (5000, 100)]
)
def test_sparse_equals_dense_with_gradients(classes: int, topk: int) -> None:
    for seed in range(5):
        logits, index, prob, tail = problem(7, classes, topk, seed)
        target = dense_target(index, prob, tail, classes)
        assert torch.allclose(target.sum(1), torch.ones(7), atol=1e-6)
        ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        loss = sparse_soft_cross_entropy(ours, index, prob, tail)
        assert loss.shape == (7,)
        assert loss.dtype == torch.float32
        dense = SoftTargetCrossEntropy()(theirs, target)
        assert abs(float((loss.mean() - dense).detach())) <= 1e-6 * max(1.0, float(dense.detach()))
        loss.mean().backward()
        dense.backward()
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)


def test_the_best_student_is_the_teacher() -> None:
    for seed in range(5):
        logits, index, prob, tail = problem(4, 20, 5, seed)
        target = dense_target(index, prob, tail, 20)
        best = sparse_soft_cross_entropy(target.log(), index, prob, tail)
        assert (best <= sparse_soft_cross_entropy(logits, index, prob, tail) + 1e-6).all()


def test_a_zero_tail_costs_nothing_for_impossible_classes() -> None:
    logits = torch.tensor([[200.0, -200.0, -200.0]])
    loss = sparse_soft_cross_entropy(
        logits, torch.tensor([[0]]), torch.tensor([[1.0]]), torch.tensor([0.0])
    )
    assert float(loss) == 0.0


def test_autocast_and_half_logits_do_not_lower_the_precision() -> None:
    logits, index, prob, tail = problem(16, 1000, 10, 0, spread=6.0)
    rounded = logits.bfloat16()
    want = sparse_soft_cross_entropy(rounded.float(), index, prob, tail)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = sparse_soft_cross_entropy(rounded, index, prob, tail)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


@pytest.mark.parametrize("heat", [0.5, 1.0, 2.0, 4.0, 20.0])
@pytest.mark.parametrize(("classes", "topk"), [(2, 1), (10, 9), (100, 10), (1000, 10)])
def test_retempered_labels_are_those_of_softened_logits(
    classes: int, topk: int, heat: float
) -> None:
    _, index, prob, tail = problem(6, classes, topk, 3)
    warm, rest = retemper(prob, tail, classes, heat)
    dense = dense_target(index, prob, tail, classes).double()  # the tail is spread evenly
    want = dense ** (1 / heat)
    want = want / want.sum(1, keepdim=True)
    assert torch.allclose(warm.double(), want.gather(1, index), atol=1e-6)
    assert torch.allclose(warm.sum(1) + rest, torch.ones(6), atol=1e-6)
    assert (rest >= 0).all()
    impossible = retemper(torch.tensor([[1.0, 0.0]]), torch.tensor([0.0]), 5, heat)
    assert impossible[0].tolist() == [[1.0, 0.0]]
    assert impossible[1].tolist() == [0.0]


@pytest.mark.parametrize("heat", [1.0, 3.0])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_every_kind_of_loss_equals_its_dense_definition(heat: float, weight: float) -> None:
    for seed in range(5):
        logits, index, prob, tail = problem(8, 50, 7, seed)
        truth = torch.randint(0, 50, (8,), generator=torch.Generator().manual_seed(seed))
        truth[2] = -1
        target = dense_target(index, prob, tail, 50).double() ** (1 / heat)
        target = target / target.sum(1, keepdim=True)
        log_q = torch.log_softmax(logits.double() / heat, 1)
        soft = {
            "cross-entropy": -(target * log_q).sum(1) * heat**2,
            "kl": (target * (target.log() - log_q)).sum(1) * heat**2,
        }
        hard = -torch.log_softmax(logits.double(), 1).gather(1, truth.clamp(min=0)[:, None])[:, 0]
        for kind, dense in soft.items():
            want = (1 - weight) * dense + weight * hard
            want[2] = dense[2]
            found = SoftLoss(kind, heat, weight)(logits, index, prob, tail, truth)
            assert torch.allclose(found.double(), want, rtol=1e-5, atol=1e-5)
            assert found.dtype == torch.float32
        ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
        SoftLoss("kl", heat)(ours, index, prob, tail).sum().backward()
        SoftLoss("cross-entropy", heat)(theirs, index, prob, tail).sum().backward()
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)


def test_divergence_is_zero_for_the_teacher_itself_and_finite_for_certain_ones() -> None:
    _, index, prob, tail = problem(6, 30, 5, 0)
    itself = dense_target(index, prob, tail, 30).log()
    assert SoftLoss("kl")(itself, index, prob, tail).abs().max() < 1e-5
    certain = torch.tensor([[1.0, 0.0]])
    found = label_entropy(certain, torch.tensor([0.0]), 30)
    assert found.tolist() == [0.0]
    loss = SoftLoss("kl", 2.0)(torch.zeros(1, 30), torch.tensor([[3, 4]]), certain, torch.zeros(1))
    assert torch.isfinite(loss).all()


def test_autocast_lowers_no_kind_of_loss() -> None:
    logits, index, prob, tail = problem(16, 1000, 10, 0, spread=6.0)
    half = logits.bfloat16()
    for loss in (SoftLoss(), SoftLoss("kl", 2.0), SoftLoss(hard_weight=0.5)):
        truth = index[:, 0]
        want = loss(half.float(), index, prob, tail, truth)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(loss(half, index, prob, tail, truth), want)


def test_losses_that_do_not_exist_are_refused() -> None:
    for change in ({"kind": "mse"}, {"temperature": 0.0}, {"hard_weight": 1.5}):
        with pytest.raises(InputError):
            SoftLoss(**change)  # type: ignore[arg-type]
    with pytest.raises(InputError):
        retemper(torch.ones(1, 1), torch.zeros(1), 3, -1.0)
