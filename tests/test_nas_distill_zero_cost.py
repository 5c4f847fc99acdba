"""Zero-cost proxies: their definitions on nets worked out by hand, and nets left as they were."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nas.data import Dataset, DataSpec, prepare
from nas.distill.jobs import ZeroCostJob, zero_cost
from nas.distill.zero_cost import ZERO_COST, grad_norm, naswot, snip, synflow, zero_cost_scores
from nas.labels.reader import Batch, LabelReader
from nas.labels.store import LabelStore
from space import Context, get_family
from space.errors import InputError
from tests.train_cases import TINY

FAMILY = get_family("tinyvit")
ARCH = {**TINY, "depths": [1, 1, 2, 1]}
CTX = Context(32, 10)
IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def tiny(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return FAMILY.build(FAMILY.arch({**ARCH, **changes}), CTX)


def hard(logits: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1])


def chain(activation: nn.Module, *widths: int) -> nn.Sequential:
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after, bias=False), activation]
    return nn.Sequential(*layers[:-1]).double()


def all_of(model: nn.Module, inputs: Tensor) -> dict[str, float]:
    return {
        "grad_norm": grad_norm(model, inputs, hard),
        "snip": snip(model, inputs, hard),
        "synflow": synflow(model, inputs),
        "naswot": naswot(model, inputs),
    }


@pytest.mark.parametrize("training", [False, True])
def test_the_net_is_left_as_it_was_to_the_bit(training: bool) -> None:
    model = tiny().train(training)
    next(iter(model.children())).train(not training)  # a mode of its own
    model(IMAGES).sum().backward()  # in eval mode this leaves a graph in TinyViT's caches
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    noise = torch.get_rng_state()
    first = all_of(model, IMAGES)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert (parameter.grad is None) == (name not in grads)
        assert parameter.grad is None or torch.equal(parameter.grad, grads[name])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), noise)
    assert all_of(model, IMAGES) == first
    assert all(math.isfinite(value) for value in first.values())


def test_gradient_scores_are_sums_over_layers_by_hand() -> None:
    model = tiny()
    found = all_of(model, IMAGES)
    model.train()
    hard(model(IMAGES)).backward()
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    norms = sum(float(m.weight.grad.norm()) for m in layers)
    saliency = sum(float((m.weight * m.weight.grad).detach().abs().sum()) for m in layers)
    assert found["grad_norm"] == pytest.approx(norms, rel=1e-5)
    assert found["snip"] == pytest.approx(saliency, rel=1e-5)
    assert norms > 0


def test_snip_does_not_see_a_scale_that_the_next_norm_takes_away() -> None:
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8, eps=1e-12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    ).double()
    inputs = IMAGES.double()
    before, norm = snip(net, inputs, hard), grad_norm(net, inputs, hard)
    with torch.no_grad():
        net[0].weight.mul_(7.0)
    assert snip(net, inputs, hard) == pytest.approx(before, rel=1e-9)
    assert grad_norm(net, inputs, hard) < norm
    assert snip(net, inputs, lambda y: 3 * hard(y)) == pytest.approx(3 * before, rel=1e-9)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU()])
def test_synflow_of_a_chain_is_layers_times_the_product_of_absolute_weights(activation: nn.Module) -> None:
    net = chain(activation, 5, 7, 6, 4)
    flow = torch.ones(5, dtype=torch.float64)
    for layer in net:
        if isinstance(layer, nn.Linear):
            flow = layer.weight.detach().abs() @ flow
    found = synflow(net, torch.zeros(2, 5))
    assert found == pytest.approx(3 * float(flow.sum()), rel=1e-12)
    with torch.no_grad():
        net[0].weight.mul_(-2.0)
        net[2].weight.mul_(5.0)
    assert synflow(net, torch.randn(3, 5)) == pytest.approx(10 * found, rel=1e-12)


@pytest.mark.parametrize("fused", [False, True])
def test_synflow_conserves_flow_through_layers_that_all_paths_cross(fused: bool) -> None:
    """Patch embedding, downsampling and head each carry the same flow, attention in between."""
    from nas.distill import zero_cost as module

    model = tiny().double()
    with torch.no_grad():  # published sums keep biases; the law holds without them
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    for m in model.modules():
        if hasattr(m, "fused_attn"):
            m.fused_attn = fused
    kept: dict[str, float] = {}
    original = module._gradients

    def spy(net: nn.Module) -> list[tuple[Tensor, Tensor]]:
        for name, m in net.named_modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)) and m.weight.grad is not None:
                kept[name] = float((m.weight * m.weight.grad).detach().sum())
        return original(net)

    module._gradients = spy
    try:
        total = synflow(model, IMAGES)
    finally:
        module._gradients = original
    all_cross = [n for n in kept if n.startswith("patch_embed") or ".downsample" in n]
    whole = kept["head.fc"]
    assert len(all_cross) >= 5
    for name in all_cross:
        assert kept[name] == pytest.approx(whole, rel=1e-9)
    assert all(-1e-9 * whole <= value <= whole * (1 + 1e-9) for value in kept.values())
    assert total == pytest.approx(sum(kept.values()), rel=1e-12)
    # Blocks whose last norm starts at zero count here, as norms are left out.
    assert all(value > 0 for name, value in kept.items() if "blocks" in name)


@pytest.mark.slow
def test_synflow_is_finite_and_grows_with_width_up_to_the_largest_published() -> None:
    found = []
    for name in ("5M", "11M", "21M"):
        torch.manual_seed(0)
        found.append(synflow(FAMILY.build(FAMILY.seed(name), CTX), IMAGES))
    assert all(0 < a < b < 1e200 for a, b in itertools.pairwise(found))
    assert synflow(tiny(), IMAGES) < synflow(tiny(embed_dims=[32, 64, 96, 128]), IMAGES)


def test_naswot_counts_equal_bits() -> None:
    net = nn.Sequential(chain(nn.ReLU(), 6, 9, 8, 4), nn.GELU())
    inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(3)).double()
    codes, x = [], inputs
    with torch.no_grad():
        for layer in [*net[0], net[1]]:
            if isinstance(layer, (nn.ReLU, nn.GELU)):
                codes.append(x > 0)
            x = layer(x)
    bits = torch.cat(codes, dim=1)
    kernel = (bits[:, None] == bits[None]).sum(-1).double()
    assert naswot(net, inputs) == pytest.approx(float(torch.logdet(kernel)), rel=1e-9)
    with torch.no_grad():  # only signs count
        net[0][0].weight.mul_(3.0)
    assert naswot(net, inputs) == pytest.approx(float(torch.logdet(kernel)), rel=1e-9)


def test_naswot_of_images_that_all_look_alike_is_low_but_finite() -> None:
    net = chain(nn.GELU(), 6, 9, 4)
    apart = torch.randn(5, 6, generator=torch.Generator().manual_seed(4)).double()
    twins = apart.clone()
    twins[1] = twins[0]
    same = apart[:1].repeat(5, 1)
    found = [naswot(net, inputs) for inputs in (same, twins, apart)]
    assert all(math.isfinite(value) for value in found)
    assert found[0] < found[1] < found[2]
    with pytest.raises(InputError, match="activation modules"):
        naswot(nn.Linear(6, 4).double(), apart)


def test_the_job_scores_the_first_replayed_images(dataset: Dataset, store: LabelStore, tmp_path: Path) -> None:
    job = ZeroCostJob(
        family="tinyvit",
        arch=ARCH,
        context=CTX,
        dataset=dataset.folder,
        store=store.folder,
        device="cpu",
        missing="error",
        images=24,
        batch_size=24,
        random_seed=3,
    )
    ticks: list[float] = []
    values = zero_cost(job, ticks.append)
    assert set(values) == {*ZERO_COST, "images"}
    assert sum(ticks) == values["images"] == 24
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert zero_cost(job, ticks.append) == values
    assert zero_cost(replace(job, random_seed=4), ticks.append) != values
    # The oracle: the batches of a training, joined by hand.
    batches = list(LabelReader(dataset.train, store, 24, 3).epoch(0))
    names = ("inputs", "index", "prob", "tail", "truth", "rows")
    parts = (torch.cat([getattr(b, name) for b in batches])[:24] for name in names)
    arch = FAMILY.arch(ARCH)
    by_hand = zero_cost_scores(FAMILY, arch, CTX, Batch(*parts), random_seed=3)
    assert {k: values[k] for k in ZERO_COST} == by_hand
    whole = zero_cost(replace(job, images=10_000, batch_size=20), ticks.append)
    assert whole["images"] == len(dataset.train)
    other = prepare(DataSpec("digits", img_size=48, max_images=60), tmp_path)
    for bad in ({"images": 1}, {"dataset": other.folder}):
        with pytest.raises(InputError):
            zero_cost(replace(job, **bad), ticks.append)
