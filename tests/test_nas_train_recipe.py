"""Recipes: published values, what the rates are, and every way of overriding one wrongly."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.scheduler.cosine_lr import CosineLRScheduler

from nas.train.optim import rate_at
from nas.train.recipe import PIPELINE, PRESETS, Recipe, changed, find_recipe, read_recipe
from space.errors import InputError

M5, M11, M21 = 5_392_764, 10_996_972, 21_198_568

# What the authors publish; the rates are those of the whole batch. "drops": of 5M/11M/21M.
COLUMNS = ["epochs", "batch", "peak", "least", "first", "warm", "wd", "layer", "bn", "drops", "mixup", "cutmix", "clip"]
PUBLISHED = {
    name: dict(zip(COLUMNS, values.split(), strict=True))
    for name, values in {
        "tinyvit-22k-distill": "90 4096 2e-3 4e-5 4e-6 5 0.01 none train 0/0/0.1 0 0 5",
        "tinyvit-22k-1k": "30 1024 5e-4 2e-5 1e-6 5 1e-8 0.8 eval 0/0/0.1 0 0 5",
        "tinyvit-1k": "300 1024 1e-3 1e-5 1e-6 20 0.05 none train 0/0.1/0.2 0.8 1 5",
        "tinyvit-384": "30 1024 4e-5 4e-7 4e-8 5 1e-8 none eval 0.1/0.1/0.1 0 0 5",
        "tinyvit-512": "30 1024 4e-5 4e-7 4e-8 5 1e-8 none eval 0.1/0.1/0.1 0 0 5",
        "deit": "300 1024 1e-3 1e-5 1e-6 5 0.05 none train 0.1/0.1/0.1 0.8 1 none",
        "deit-token": "300 1024 1e-3 1e-5 1e-6 5 0.05 none train 0.1/0.1/0.1 0.8 1 none",
        "deit-384": "30 512 5e-6 5e-6 1e-6 5 1e-8 none train 0.1/0.1/0.1 0.8 1 none",
    }.items()
}


def number(text: str) -> float | None:
    return None if text == "none" else float(text)


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_values(name: str) -> None:
    want = PUBLISHED[name]
    deit = name.startswith("deit")
    for params, drop in zip((M5, M11, M21), want["drops"].split("/"), strict=True):
        r = find_recipe(name, params)
        assert (r.epochs, r.batch_size) == (int(want["epochs"]), int(want["batch"]))
        rates = [float(want[rate]) for rate in ("peak", "least", "first")]
        assert r.rates() == pytest.approx(rates, rel=1e-12)
        found = (r.warmup_epochs, r.weight_decay, r.layer_decay, r.drop_path, r.mixup or 0.0, r.cutmix or 0.0)
        names = ("warm", "wd", "layer")
        numbers = [*(want[n] for n in names), drop, want["mixup"], want["cutmix"]]
        assert list(found) == [number(text) for text in numbers]
        assert (r.bn, r.clip_norm, r.mix_mode) == (want["bn"], number(want["clip"]), "batch")
        assert (r.label_smoothing, r.augment) == (0.1, "official")
        assert (r.eps, r.beta1, r.beta2) == (1e-8, 0.9, 0.999)
        own = (3, 0.99996, "epoch") if deit else (1, None, "step")
        assert (r.repeats, r.ema_decay, r.schedule) == own
    assert set(PRESETS) == {*PUBLISHED, "small"}


@given(batch=st.integers(2, 8192), name=st.sampled_from(sorted(PRESETS)))
def test_rates_scale_with_the_whole_batch_as_each_recipe_says(batch: int, name: str) -> None:
    recipe = changed(PRESETS[name], {"batch_size": batch})
    peak, least, first = recipe.rates()
    scale = batch / recipe.lr_batch if recipe.lr_batch else 1.0
    assert peak == pytest.approx(recipe.lr * scale)
    ends = scale if recipe.lr_scales == "all" else 1.0  # DeiT's command scales the peak alone
    assert (least, first) == pytest.approx((recipe.min_lr * ends, recipe.warmup_lr * ends))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(PRESETS)), epochs=st.integers(2, 40), steps=st.integers(1, 30), share=st.floats(0, 0.9)
)
def test_the_schedules_trace_is_timms_from_the_first_step_to_the_last(
    name: str, epochs: int, steps: int, share: float
) -> None:
    warm = float(int(share * epochs))
    recipe = changed(PRESETS[name], {"epochs": epochs, "warmup_epochs": warm})
    peak, least, first = recipe.rates()
    by_epoch = recipe.schedule == "epoch"
    clock = 1 if by_epoch else steps
    oracle = CosineLRScheduler(
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak),
        t_initial=epochs * clock,
        lr_min=least,
        warmup_t=int(warm * clock),
        warmup_lr_init=first,
        t_in_epochs=by_epoch,
    )
    for step in range(epochs * steps):
        wanted = oracle._get_lr(step // steps if by_epoch else step)[0]
        assert rate_at(recipe, step, steps) == pytest.approx(wanted, rel=1e-9, abs=1e-18)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("weigth_decay=0.1", "did you mean weight_decay?"),
        ("weight_decay", "key=value"),
        ("weight_decay=lots", "a number"),
        ("epochs=2.5", "an integer"),
        ("bn=frozen", "one of train, eval"),
        ("distill=mild", "one of none, sparse, soft, hard, token"),
        ("label_smoothing=1", "below 1"),
        ("lr=nan", "finite"),
        ("warmup_epochs=1000", "at most the 300 epochs"),
        ("erase_prob=often", "a number"),
        ("ema_warmup=maybe", "true or false"),
        ("batch_size=1", ">= 2"),
        ("img_size=8", "16 to 1024"),
    ],
)
def test_a_wrong_override_is_one_line_with_the_remedy(override: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        find_recipe("tinyvit-1k", M5, [override])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_shorter_training_warms_up_for_a_fifth_at_most() -> None:
    assert find_recipe("tinyvit-1k", M5, ["epochs=50"]).warmup_epochs == 10
    assert find_recipe("tinyvit-1k", M5, ["epochs=300"]).warmup_epochs == 20
    assert find_recipe("tinyvit-1k", M5, ["epochs=50", "warmup_epochs=20"]).warmup_epochs == 20


@pytest.mark.parametrize("saved", [[], {"lr": 1}, {"config": 3}, {"epochs": {}}])
def test_a_damaged_recipe_is_one_line(saved: Any, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(saved))
    with pytest.raises(InputError) as error:
        find_recipe(str(tmp_path / "r.json"), M5)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_saved_recipe_reads_back_and_every_value_can_be_overridden(name: str, tmp_path: Path) -> None:
    recipe = find_recipe(name, M21)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe.to_dict()))
    assert find_recipe(str(path), M5) == recipe
    for saved in ({"recipe": recipe.to_dict()}, {"config": {"recipe": recipe.to_dict()}}):
        path.write_text(json.dumps(saved))
        assert find_recipe(str(path), M5) == recipe
    assert read_recipe(recipe.to_dict()) == recipe
    for field in fields(Recipe):
        value = getattr(recipe, field.name)
        none = "default" if field.name in PIPELINE else "none"
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        text = f"{field.name}={none if value is None else shown}"
        assert find_recipe(name, M21, [text]) == recipe, text
    off = find_recipe(name, M21, [f"{key}=none" for key in PIPELINE])
    assert (off.hflip, off.policy, off.color_jitter, off.erase_prob, off.mixes) == (0.0, "none", 0.0, 0.0, False)
    assert off.crop_scale == off.crop_ratio == (1.0, 1.0)
    short = recipe.to_dict()
    del short["epochs"]
    with pytest.raises(InputError, match="epochs"):
        read_recipe(short)
