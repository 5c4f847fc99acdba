"""Partners, lambda and box come from codes alone; mixing equals its naive definition."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from timm.data.mixup import Mixup

from nas.data import Dataset, DataSpec, prepare
from nas.data.augment.mixing import draws, mix, partners, shares
from nas.data.augment.spec import PRESETS, AugmentSpec, borrowed_generators, default_spec, preset_spec
from space.errors import InputError

PLAIN = AugmentSpec(16, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
BOTH = replace(PLAIN, mixup_alpha=0.8, cutmix_alpha=1.0)
MIXES = pytest.mark.parametrize(
    "spec",
    [
        BOTH,
        replace(PLAIN, mixup_alpha=0.2),
        replace(PLAIN, cutmix_alpha=1.0),
        replace(BOTH, mix_prob=0.5, mix_switch_prob=0.1),
    ],
)


def codes(n: int, seed: int = 0) -> NDArray[np.uint64]:
    return np.random.default_rng(seed).integers(0, 1 << 63, n, dtype=np.uint64)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.integers(0, 300), st.integers(0, 5))
def test_partners_are_an_involution_of_the_codes(n: int, seed: int) -> None:
    drawn = codes(n, seed)
    found = partners(drawn)
    alone = np.flatnonzero(found < 0)
    assert len(alone) == n % 2
    paired = np.flatnonzero(found >= 0)
    assert (found[found[paired]] == paired).all()
    assert (found[paired] != paired).all()
    order = np.random.default_rng(seed + 1).permutation(n)
    again = partners(drawn[order])  # rows elsewhere, the same pairs
    for at in range(n):
        other = again[at]
        assert (order[other] if other >= 0 else -1) == found[order[at]]


@MIXES
def test_mixing_is_its_definition_row_by_row(spec: AugmentSpec) -> None:
    n = 60
    own, other = codes(n), codes(n, 1)
    views, theirs = torch.randn(n, 3, 16, 16), torch.randn(n, 3, 16, 16)
    mixed = mix(views, theirs, own.tolist(), other.tolist(), spec)
    back = mix(theirs, views, other.tolist(), own.tolist(), spec)
    drawn = draws(own.tolist(), other.tolist(), (16, 16), spec)
    assert draws(other.tolist(), own.tolist(), (16, 16), spec) == drawn, "both of a pair agree"
    for row, (share, box) in enumerate(drawn):
        for made, mine, partner in ((mixed, views, theirs), (back, theirs, views)):
            want = mine[row] * share + partner[row] * (1 - share)
            if box is not None:
                top, bottom, left, right = box
                for y in range(top, bottom):
                    for x in range(left, right):
                        want[:, y, x] = partner[row, :, y, x]
            elif share == 1.0:
                want = mine[row]
            assert torch.equal(made[row], want)
    some = [5, 3, 40]
    part = mix(views[some], theirs[some], own[some].tolist(), other[some].tolist(), spec)
    assert torch.equal(part, mixed[some])


@MIXES
def test_shares_are_what_is_left_of_an_image(spec: AugmentSpec) -> None:
    """White mixed into black: the mean of an input is the partner's share."""
    own, other = codes(60).tolist(), codes(60, 1).tolist()
    mixed = mix(torch.zeros(60, 3, 16, 24), torch.ones(60, 3, 16, 24), own, other, spec)
    found = shares(own, other, (16, 24), spec)
    assert np.allclose(1 - mixed.mean((1, 2, 3)).numpy(), found, atol=1e-6)
    assert np.array_equal(shares(other, own, (16, 24), spec), found)


def test_draws_follow_the_distributions_of_timm() -> None:
    """Two samples: ours by code, and timm's own from its generator."""
    spec = replace(BOTH, mix_prob=0.8, mix_switch_prob=0.3)
    ours = draws(codes(4000).tolist(), codes(4000, 1).tolist(), (64, 64), spec)
    kinds = Counter("cut" if box else "none" if share == 1.0 else "mix" for share, box in ours)
    assert abs(kinds["none"] / 4000 - 0.2) < 0.03
    assert abs(kinds["cut"] / 4000 - 0.24) < 0.03
    timms: Any = Mixup(0.8, 1.0, prob=0.8, switch_prob=0.3)  # type: ignore[no-untyped-call]
    with borrowed_generators():
        np.random.seed(0)
        theirs = [timms._params_per_batch() for _ in range(4000)]
    mine = np.sort([share for share, box in ours if box is None and share < 1.0])
    reference = np.sort([share for share, cut in theirs if not cut and share < 1.0])
    grid = np.linspace(0, 1, 50)
    gap = np.searchsorted(mine, grid) / len(mine) - np.searchsorted(reference, grid) / len(reference)
    assert np.abs(gap).max() < 0.05  # Kolmogorov and Smirnov's distance: 1.36 sqrt(2/2200) = 0.041
    areas = [(b - t) * (r - x) / 64**2 for _, box in ours if box for t, b, x, r in [box]]
    assert 0.3 < float(np.mean(areas)) < 0.5


def test_mixing_leaves_the_generators_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    draws([1, 2], [3, 4], (33, 33), BOTH)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1][1])  # type: ignore[index]
    assert random.getstate() == before[2]


def test_nothing_is_mixed_without_an_alpha() -> None:
    assert not PLAIN.mixes
    assert not replace(BOTH, mix_prob=0.0).mixes
    assert BOTH.mixes
    views = torch.randn(4, 3, 16, 16)
    never = replace(BOTH, mix_prob=1e-12)
    assert torch.equal(mix(views, views.flip(0), [1, 2, 3, 4], [4, 3, 2, 1], never), views)


def test_presets_are_the_official_pipelines(tmp_path_factory: pytest.TempPathFactory) -> None:
    cache = tmp_path_factory.mktemp("c")
    digits: Dataset = prepare(DataSpec("digits", img_size=16, max_images=60), cache)
    photos = replace(digits, name="photos", hflip=True)
    assert preset_spec("default", digits) == default_spec(digits)
    for name in ("22k", "1k", "finetune"):
        spec = preset_spec(name, photos)
        assert (spec.scale, spec.ratio, spec.hflip) == ((0.08, 1.0), (3 / 4, 4 / 3), 0.5)
        assert (spec.policy, spec.erase_prob, spec.erase_mode) == ("rand-m9-mstd0.5-inc1", 0.25, "pixel")
        mixing = (0.8, 1.0, 1.0, 0.5) if name == "1k" else (0.0, 0.0, 1.0, 0.5)
        assert mixing == (spec.mixup_alpha, spec.cutmix_alpha, spec.mix_prob, spec.mix_switch_prob)
        assert preset_spec(name, digits).hflip == 0.0
        assert spec.interpolation == "bicubic"
    batched = preset_spec("batched", photos)
    assert (batched.engine, batched.policy, batched.color_jitter) == ("batched", None, 0.4)
    assert preset_spec("batched", digits).scale == default_spec(digits).scale
    assert len({preset_spec(name, photos).digest() for name in PRESETS}) == 4, "22k is finetune"
    with pytest.raises(InputError, match="--augment: got 2k"):
        preset_spec("2k", photos)
