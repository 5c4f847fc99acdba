"""Every loss equals its definition and timm's, from a teacher in memory or from stored labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.loss import SoftTargetCrossEntropy
from timm.task import LogitDistillationTask, TokenDistillationTask
from torch import Tensor, nn

from nas.core.config import choices_of
from nas.train.losses import (
    DistillLoss,
    TeacherTargets,
    both_heads,
    fuse,
    has_token,
    label_entropy,
    retemper,
    set_token_training,
    sparse_soft_cross_entropy,
)
from nas.train.recipe import CHOICES
from space import Context, get_family
from space.errors import InputError
from tests.train_cases import VIT as SMALL
from tests.train_cases import dense_target


def problem(
    batch: int, classes: int, topk: int, seed: int, spread: float = 3.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, generator=gen) * spread
    teacher = torch.softmax(torch.randn(batch, classes, generator=gen).double() * spread, 1)
    prob, index = teacher.topk(topk, dim=1)
    tail = teacher.scatter(1, index, 0.0).sum(1)
    return logits, index, prob.float(), tail.float()


@pytest.mark.parametrize(("classes", "topk"), [(2, 1), (3, 2), (10, 9), (10, 1), (100, 10), (1000, 10), (5000, 100)])
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


@pytest.mark.parametrize("heat", [0.5, 1.0, 2.0, 4.0, 20.0])
@pytest.mark.parametrize(("classes", "topk"), [(2, 1), (10, 9), (100, 10), (1000, 10)])
def test_retempered_labels_are_those_of_softened_logits(classes: int, topk: int, heat: float) -> None:
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


def test_the_divergence_of_certain_teachers_is_finite() -> None:
    certain = torch.tensor([[1.0, 0.0]])
    far = torch.tensor([[200.0, -200.0, -200.0]])
    assert float(sparse_soft_cross_entropy(far, torch.tensor([[0]]), torch.ones(1, 1), torch.zeros(1))) == 0.0
    assert label_entropy(certain, torch.tensor([0.0]), 30).tolist() == [0.0]
    sure = TeacherTargets(index=torch.tensor([[3, 4]]), prob=certain, tail=torch.zeros(1))
    assert torch.isfinite(sure.divergence(torch.zeros(1, 30), 2.0)).all()


VIT, KINDS = get_family("vit"), CHOICES["distill"]
BATCH, CLASSES = 8, 12


def drawn(seed: int, *shape: int, spread: float = 2.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


def heads(seed: int, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    return drawn(seed, BATCH, classes), drawn(seed + 100, BATCH, classes)


def classes_of(seed: int, classes: int = CLASSES) -> Tensor:
    return torch.randint(classes, (BATCH,), generator=torch.Generator().manual_seed(seed))


def stored(seed: int, topk: int, classes: int = CLASSES) -> tuple[TeacherTargets, TeacherTargets]:
    """The same teacher twice: as a store keeps it, and as logits of an evenly spread tail."""
    prob, index = drawn(seed + 200, BATCH, classes).softmax(1).topk(topk, dim=1)
    tail = 1 - prob.sum(1)
    dense = dense_target(index, prob, tail, classes).log()
    return TeacherTargets(index=index, prob=prob, tail=tail), TeacherTargets(logits=dense + 3.0)


def oracle(loss: DistillLoss, outputs: Any, target: Tensor, teacher: Tensor) -> Tensor:
    """Ten lines in float64, image by image; `teacher` are dense logits [B, C]."""
    found = []
    for i, said in enumerate(teacher.double()):
        one, two = (o[i].double() for o in (outputs if isinstance(outputs, tuple) else [outputs] * 2))
        if loss.kind != "token":
            one = two = (one + two) / 2
        t, classes = loss.temperature, len(said)
        truth = torch.zeros(classes, dtype=torch.float64)
        known = target.ndim == 2 or int(target[i]) >= 0
        if target.ndim == 2:
            truth = target[i].double()
        elif known:
            truth += loss.label_smoothing / classes
            truth[target[i]] += 1 - loss.label_smoothing
        p = (said / t).softmax(0)
        soft = t**2 * (p * (p.log() - (two / t).log_softmax(0))).sum()
        soft = soft / classes if loss.reduction == "numel" else soft
        hard = -two.log_softmax(0)[said.argmax()]
        own = -(truth * one.log_softmax(0)).sum()
        share = loss.alpha if known else 1.0
        taught = {
            "none": own,
            "sparse": -(said.softmax(0) * one.log_softmax(0)).sum(),
            "soft": soft,
            "hard": hard,
            "token": hard if loss.token_loss == "hard" else soft,
        }
        if loss.kind == "sparse":
            share = 1 - loss.hard_weight if known else 1.0
        found.append((1 - share) * own + share * taught[loss.kind])
    return torch.stack(found)


LOSSES = [
    DistillLoss("none", label_smoothing=0.1),
    DistillLoss("sparse", temperature=4.0),
    DistillLoss("sparse", hard_weight=0.3),
    DistillLoss("sparse", hard_weight=1.0),
    *(DistillLoss("soft", 0.3, t, r) for t in (1.0, 3.0) for r in ("batchmean", "numel")),
    DistillLoss("soft", 0.0),
    DistillLoss("hard", 0.7, label_smoothing=0.1),
    DistillLoss("hard", 1.0),
    DistillLoss("token", 0.4, label_smoothing=0.1),
    *(DistillLoss("token", 0.5, 2.5, r, "soft") for r in ("batchmean", "numel")),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda each: f"{each.kind}-{each.alpha}")
@pytest.mark.parametrize("mixed", [False, True])
def test_every_kind_equals_its_definition(loss: DistillLoss, mixed: bool) -> None:
    for seed in range(4):
        outputs: Any = heads(seed) if seed % 2 or loss.kind == "token" else heads(seed)[0]
        target = classes_of(seed)
        if mixed:
            other = nn.functional.one_hot(target.flip(0), CLASSES)
            target = 0.7 * nn.functional.one_hot(target, CLASSES) + 0.3 * other
        elif loss.kind != "none":
            target[[1, 4]] = -1
        kept, dense = stored(seed, 5)
        assert dense.logits is not None
        for taught in (kept, dense):
            found = loss(outputs, target, taught)
            want = oracle(loss, outputs, target, dense.logits)
            assert (found.dtype, found.shape) == (torch.float32, (BATCH,))
            assert torch.allclose(found.double(), want, rtol=1e-5, atol=2e-6)


def learned(loss: Callable[..., Tensor], outputs: Any) -> tuple[Tensor, list[Tensor]]:
    """The mean over a batch, and its gradients."""
    leaves = [o.clone().requires_grad_() for o in outputs]
    value = loss(*leaves)
    value.backward()  # type: ignore[no-untyped-call]
    return value.detach(), [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


class Says(nn.Module):
    """A net that says the same of all images: timm's tasks take nets, not logits."""

    num_classes, in_chans = CLASSES, 3
    pretrained_cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # noqa: RUF012

    def __init__(self, *outputs: Tensor) -> None:
        super().__init__()
        self.outputs = nn.ParameterList([nn.Parameter(each.clone()) for each in outputs])

    def set_distilled_training(self, enable: bool = True) -> None: ...

    def forward(self, images: Tensor) -> Any:
        return self.outputs[0] if len(self.outputs) == 1 else tuple(self.outputs)


@pytest.mark.parametrize(
    ("kind", "alpha", "heat", "smoothing"),
    [
        ("logit", 0.5, 1.0, 0.0),
        ("logit", 0.3, 4.0, 0.1),
        ("logit", 1.0, 2.0, 0.0),
        ("soft", 0.5, 1.0, 0.0),
        ("soft", 0.2, 3.0, 0.1),
        ("hard", 0.5, 1.0, 0.1),
        ("hard", 0.9, 1.0, 0.0),
    ],
)
def test_values_and_gradients_are_those_of_timms_tasks(kind: str, alpha: float, heat: float, smoothing: float) -> None:
    for seed in range(3):
        outputs = heads(seed)[:1] if kind == "logit" else heads(seed)
        target, teacher = classes_of(seed), drawn(seed + 7, BATCH, CLASSES)
        shared: dict[str, Any] = {
            "student_model": Says(*outputs),
            "teacher_model": Says(teacher),
            "criterion": nn.CrossEntropyLoss(label_smoothing=smoothing),
            "task_loss_weight": 1 - alpha,
            "temperature": heat,
            "verbose": False,
        }
        if kind == "logit":
            task: Any = LogitDistillationTask(**shared)
            loss = DistillLoss("soft", alpha, heat, label_smoothing=smoothing)
        else:
            task = TokenDistillationTask(**shared, distill_type=kind)
            loss = DistillLoss("token", alpha, heat, token_loss=kind, label_smoothing=smoothing)
        told = task(torch.zeros(BATCH, 3, 4, 4), target)["loss"]
        told.backward()
        wanted = [p.grad for p in shared["student_model"].outputs]
        taught = TeacherTargets(logits=teacher)
        value, grads = learned(
            lambda *o, loss=loss, target=target, taught=taught: loss(o[0] if len(o) == 1 else o, target, taught).mean(),
            outputs,
        )
        assert torch.allclose(value, told.detach(), rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(grads, wanted, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda each: f"{each.kind}-{each.alpha}")
@pytest.mark.parametrize("topk", [1, 5, CLASSES - 1])
def test_stored_labels_teach_what_the_teacher_does(loss: DistillLoss, topk: int) -> None:
    for seed in range(3):
        outputs, target = heads(seed), classes_of(seed)
        kept, dense = stored(seed, topk)
        assert torch.equal(kept.best(), dense.best())
        found = [
            learned(lambda *o, t=taught: loss(o, target, t).mean(), outputs)  # noqa: B023
            for taught in (kept, dense)
        ]
        assert torch.allclose(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(found[0][1], found[1][1], strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda each: f"{each.kind}-{each.alpha}")
def test_autocast_lowers_no_kind(loss: DistillLoss) -> None:
    outputs = tuple(o.bfloat16() for o in heads(0))
    target = classes_of(0)
    for taught in stored(0, 3):
        want = loss((outputs[0].float(), outputs[1].float()), target, taught)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = loss((outputs[0], outputs[1]), target, taught)
        assert found.dtype == torch.float32
        assert torch.equal(found, want)


def test_the_choices_of_a_run_are_kinds_that_learn_from_a_teacher() -> None:
    assert choices_of("distill") == KINDS[1:]
    assert [kind for kind in KINDS if not DistillLoss(kind).needs_truth] == ["sparse"]


def small(token: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return VIT.build(VIT.arch({**SMALL, "dist_token": token}), Context(32, CLASSES))


def test_evaluation_is_the_mean_of_both_heads_logits() -> None:
    net = small()
    # What drops in training only would tell the heads of training from those of evaluation.
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    inputs = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        for module in (net, *list(net.modules())[3:5]):
            module.train()
        for training in (True, False):
            set_token_training(net, training)
            modes = [m.training for m in net.modules()]
            one, other = both_heads(net, inputs)
            assert [m.training for m in net.modules()] == modes
            assert net.distilled_training == training
            assert not torch.allclose(one, other)
            net.eval()
            assert torch.equal(net(inputs), fuse((one, other), "logits"))
            net.train()
        set_token_training(net, True)
        assert isinstance(net(inputs), tuple)
        set_token_training(net, False)
        assert isinstance(net(inputs), Tensor)


def test_late_fusion_is_the_mean_of_softmaxes_and_may_choose_otherwise() -> None:
    one, other = heads(8)
    late = fuse((one, other), "softmax")
    assert torch.allclose(late.exp(), (one.softmax(1) + other.softmax(1)) / 2, atol=1e-6)
    assert torch.equal(fuse((one, other), "logits"), (one + other) / 2)
    sure = torch.tensor([[8.0, 0.0, 0.0]]), torch.tensor([[-9.0, 0.4, 0.5]])
    assert int(fuse(sure, "softmax").argmax()) == 0, "one head is sure, the other does not mind"
    assert int(fuse(sure, "logits").argmax()) == 2
    assert fuse((one.bfloat16(), other.bfloat16()), "softmax").dtype == torch.float32


def test_a_net_without_a_token_is_refused_or_learns_on_its_one_head() -> None:
    net, plain = small(), small(token=False)
    assert has_token(net)
    assert not has_token(plain)
    set_token_training(plain, False)
    for act in (lambda: set_token_training(plain, True), lambda: both_heads(plain, torch.zeros(1))):
        with pytest.raises(InputError, match=r"--distill: got token .*; hard distils") as refusal:
            act()
        assert "\n" not in str(refusal.value)
    for kind in KINDS:
        loss = DistillLoss(kind, 0.3, 2.0)
        assert loss.on(net) == loss
        assert loss.on(plain) == (replace(loss, kind="hard") if kind == "token" else loss)
    assert DistillLoss("token", token_loss="soft").on(plain).kind == "soft"
