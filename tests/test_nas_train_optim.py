"""The optimizer: the authors' layer decay and weight decay, and the schedule's formula."""

from __future__ import annotations

import math
import re

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.inherit.slice import map_head
from nas.train.fit import freeze_batch_norms
from nas.train.optim import layer_lr_scales, lr_at, make_optimizer
from space import Context, get_family
from tests.train_cases import TINY

CTX = Context(64, 5)


def tinyvit(depths: tuple[int, int, int, int]) -> tuple[torch.nn.Module, list[str]]:
    family = get_family("tinyvit")
    arch = family.arch({**TINY, "depths": list(depths)})
    blocks = [b for group in family.blocks(arch).values() for b in group]
    return family.build(arch, CTX), blocks


def official_scale(name: str, depths: tuple[int, ...], decay: float) -> float:
    """The TinyViT repository's rule, for timm's names: its stage begins with the downsampling that
    the official one's predecessor ends with."""
    total = sum(depths)
    if name.startswith("patch_embed"):
        return decay ** (total - 1)
    if name.startswith("head"):
        return 1.0
    stage = int(re.match(r"stages\.(\d+)", name).group(1))  # type: ignore[union-attr]
    before = sum(depths[:stage])
    block = re.match(r"stages\.\d+\.blocks\.(\d+)", name)
    index = before + int(block.group(1)) if block else before - 1
    return decay ** (total - 1 - index)


@pytest.mark.parametrize("depths", [(2, 2, 6, 2), (1, 1, 1, 1), (2, 1, 3, 1)])
@pytest.mark.parametrize("decay", [0.8, 0.5, 1.0])
def test_layer_decay_is_the_authors(depths: tuple[int, int, int, int], decay: float) -> None:
    model, blocks = tinyvit(depths)
    scales = layer_lr_scales(model, blocks, decay)
    assert set(scales) == {name for name, _ in model.named_parameters()}
    for name, scale in scales.items():
        assert scale == pytest.approx(official_scale(name, depths, decay)), name
    optimizer = make_optimizer(model, lr=1.0, weight_decay=0.05, betas=(0.9, 0.999), eps=1e-8, scales=scales)
    names = {id(p): n for n, p in model.named_parameters()}
    grouped = [names[id(p)] for g in optimizer.param_groups for p in g["params"]]
    assert sorted(grouped) == sorted(scales)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["lr_scale"] == scales[name]
            bare = parameter.ndim <= 1 or name.endswith(".bias") or "attention_biases" in name
            assert group["weight_decay"] == (0.0 if bare else 0.05), name


def test_without_layer_decay_the_groups_are_timms() -> None:
    model, _ = tinyvit((1, 1, 1, 1))
    ours = make_optimizer(model, lr=1e-3, weight_decay=0.1, betas=(0.8, 0.99), eps=1e-7, scales=None)
    theirs = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1)
    assert [(len(g["params"]), g["weight_decay"]) for g in ours.param_groups] == [
        (len(g["params"]), g["weight_decay"]) for g in theirs.param_groups
    ]
    assert ours.defaults["betas"] == (0.8, 0.99)
    assert ours.defaults["eps"] == 1e-7


def test_frozen_batch_norms_keep_their_statistics_and_the_rest_trains() -> None:
    model, _ = tinyvit((1, 1, 1, 1))
    model.train()
    freeze_batch_norms(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    images = torch.randn(4, 3, 64, 64)
    model(images).sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    grads = [p.grad for n, p in model.named_parameters() if ".bn." in n]
    assert grads
    assert all(g is not None for g in grads)  # scale and shift still learn


def test_a_mapped_head_takes_rows_and_the_mean_for_what_is_missing() -> None:
    torch.manual_seed(0)
    state = {"w": torch.randn(6, 4), "b": torch.randn(6), "other": torch.randn(3)}
    rows = [5, -1, 0, 5]
    mapped = map_head(state, ["w", "b"], rows)
    for key in ("w", "b"):
        # The official code's: the mean of the rows taken, appended, so that -1 finds it.
        index = torch.tensor(rows)
        v = state[key]
        wanted = torch.cat([v, v[index[index != -1]].mean(0, keepdim=True)], 0)[index]
        assert torch.equal(mapped[key], wanted)
    assert mapped["other"] is state["other"]


@given(total=st.integers(1, 60), share=st.floats(0, 1), lr=st.floats(1e-6, 1.0), low=st.floats(0, 1))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_the_schedule_is_its_formula(total: int, share: float, lr: float, low: float) -> None:
    warm = min(int(share * total), total - 1)
    floor = low * lr
    rates = [lr_at(s, total_steps=total, warmup_steps=warm, lr=lr, min_lr=floor) for s in range(total)]
    for s in range(warm):
        assert math.isclose(rates[s], lr * (s + 1) / (warm + 1))
    for s in range(warm, total):
        angle = math.pi * (s - warm) / (total - warm)
        assert math.isclose(rates[s], floor + (lr - floor) * (1 + math.cos(angle)) / 2)
    assert lr_at(total, total_steps=total, warmup_steps=warm, lr=lr, min_lr=floor) == floor
