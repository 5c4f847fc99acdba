"""The sparse loss equals the dense one, values and gradients, at any size and precision."""

from __future__ import annotations

import pytest
import torch
from timm.loss import SoftTargetCrossEntropy

from nas.distill.losses import dense_target, sparse_soft_cross_entropy


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
