"""Inheriting: a child gets exactly the numbers that its slicing names, and nothing else."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from space_cases import SMALL, random_arch
from torch import nn

from nas.export.arch_of_weights import checkpoint_context
from nas.export.weights import weights_digest
from nas.inherit.batchnorm import first_change, recalibrate
from nas.inherit.slice import inherit
from space import Context, get_family
from space.errors import InputError
from space.family import Slice

FAMILY = get_family("tinyvit")
PARENT = {**SMALL, "depths": [2, 2, 3, 1], "mbconv_expand_ratio": 3.0}
CTX = Context(32, 5)


def built(arch: Any, ctx: Context = CTX, random_seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_seed)
        model = FAMILY.build(arch, ctx)
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():  # so that no two tensors agree by their usual init
                tensor.add_(torch.rand_like(tensor) * 0.05)
            else:
                tensor.fill_(len(name) + random_seed)
    return model


def as_arrays(order: dict[str, list[int]]) -> dict[str, np.ndarray]:
    return {name: np.array(units) for name, units in order.items()}


def heir(change: dict[str, Any]) -> tuple[dict[str, torch.Tensor], nn.Module, Any]:
    """A parent's weights, a child that took them over, and the slicing."""
    arch, child_arch = FAMILY.arch(PARENT), FAMILY.arch({**PARENT, **change})
    state, child = dict(built(arch).state_dict()), built(child_arch, random_seed=1)
    slicing = FAMILY.slicing(arch, child_arch, CTX, CTX)
    inherit(child, state, slicing)
    return state, child, slicing


def naive(child: dict[str, torch.Tensor], parent: dict[str, torch.Tensor], slicing: Any) -> Any:
    """Copy, or blend, number by number."""
    result = {k: v.clone() for k, v in child.items()}
    copied = 0
    for name, source in slicing.items():
        for place in np.ndindex(tuple(child[name].shape)):
            at = tuple(int(rows[i]) for rows, i in zip(source.index, place, strict=True))
            if min(at, default=0) >= 0:
                value = parent[source.source][at]
                if source.blends:
                    lines = [
                        enumerate(source.blends[dim][i].tolist()) if dim in source.blends else [(at[dim], 1.0)]
                        for dim, i in enumerate(place)
                    ]
                    value = sum(
                        math.prod(w for _, w in each) * float(parent[source.source][tuple(j for j, _ in each)])
                        for each in itertools.product(*lines)
                    )
                result[name][place] = value
                copied += 1
    return result, copied


def test_removing_hidden_units_is_the_same_as_silencing_them() -> None:
    arch = FAMILY.arch({**PARENT, "mlp_ratio": 2.0, "mbconv_expand_ratio": 2.0})
    narrow = FAMILY.arch({**PARENT, "mlp_ratio": 1.25, "mbconv_expand_ratio": 1.25})
    parent, child = built(arch).double().eval(), built(narrow, random_seed=1).double().eval()
    rng = np.random.default_rng(0)
    groups = FAMILY.groups(arch, CTX)
    hidden = {name: m for name, m in groups.items() if name.endswith((".hidden", ".expand"))}
    order = {name: rng.permutation(1 + m[0].unit.max()) for name, m in hidden.items()}
    order = {name: wanted for name, wanted in order.items() if "downsample" not in name}
    inherit(child, parent.state_dict(), FAMILY.slicing(arch, narrow, CTX, CTX, order))
    kept = {n: 1 + m[0].unit.max() for n, m in FAMILY.groups(narrow, CTX).items()}
    state = parent.state_dict()
    for name, wanted in order.items():
        last = name.replace("hidden", "mlp.fc2.weight").replace("expand", "conv3.conv.weight")
        state[last][:, wanted[kept[name] :]] = 0  # in place: what reads them hears nothing
    inputs = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(child(inputs), parent(inputs), rtol=0, atol=1e-9)


RECALIBRATED: list[tuple[dict[str, Any], dict[str, list[int]]]] = [
    ({"embed_dims": [32, 32, 64, 64]}, {}),
    ({"embed_dims": [32, 64, 64, 64]}, {}),
    ({"depths": [2, 2, 2, 1]}, {}),
    ({"depths": [2, 2, 2, 1]}, {"stages.2.blocks": [0, 1, 2]}),  # the last one goes
    ({"depths": [2, 1, 3, 1]}, {"stages.1.blocks": [1, 0]}),
    ({"depths": [1, 2, 3, 1]}, {}),
    ({"mlp_ratio": 2.0}, {}),
    ({"mbconv_expand_ratio": 2.0}, {}),
    ({"head_dim": 16}, {}),
    ({"window_sizes": [7, 7, 7]}, {}),
    ({"depths": [2, 2, 4, 1]}, {}),
    ({"embed_dims": [48, 64, 64, 96]}, {}),
]


@pytest.mark.parametrize(("change", "order"), RECALIBRATED)
def test_statistics_are_estimated_anew_wherever_a_batch_norm_sees_something_new(
    change: dict[str, Any], order: dict[str, list[int]]
) -> None:
    ctx = Context(64, 5)
    parent_arch, child_arch = FAMILY.arch(PARENT), FAMILY.arch({**PARENT, **change})
    parent, child = built(parent_arch, ctx).eval(), built(child_arch, ctx, random_seed=1).eval()
    for name, tensor in parent.state_dict().items():
        if name.endswith("num_batches_tracked"):
            tensor.fill_(777)
    state = parent.state_dict()
    slicing = FAMILY.slicing(parent_arch, child_arch, ctx, ctx, as_arrays(order))
    inherit(child, state, slicing)
    batches = [torch.randn(3, 3, 64, 64) for _ in range(3)]
    with torch.no_grad():
        before, there = (seen_by_norms(net, batches[:1]) for net in (child, parent))
    differs = set()
    for name, got in before.items():
        source = slicing.get(f"{name}.running_mean")
        if source is None or (source.index[0] < 0).any():
            differs.add(name)
            continue
        rows = torch.from_numpy(source.index[0])
        same = there[source.source.removesuffix(".running_mean")][0].index_select(1, rows)
        if got[0].shape != same.shape or not torch.allclose(got[0], same, rtol=1e-4, atol=1e-5):
            differs.add(name)
    kept = {k: v.clone() for k, v in child.state_dict().items()}
    shuffled = {k: state[k] for k in sorted(state)}  # as a file would have it
    number = recalibrate(child, shuffled, slicing, iter(batches), "cpu")
    now = child.state_dict()
    changed = {n for n in before if now[f"{n}.num_batches_tracked"] == len(batches)}
    assert len(changed) == number
    assert differs <= changed
    assert differs, "the oracle saw nothing"
    spared = [n for n in before if n not in changed]
    for key, value in kept.items():
        norm = key.rpartition(".")[0]
        if norm not in changed or key.endswith((".weight", ".bias")):
            assert torch.equal(now[key], value), key
    names = list(before)
    if change.keys() & {"mlp_ratio", "head_dim", "window_sizes"} or "depths" in change:
        assert spared == names[: len(spared)]
    if "depths" in change and change["depths"][2] != 3:  # all of stages 1 and 2 stays
        assert {n for n in names if n.startswith(("patch", "stages.0", "stages.1"))} <= set(spared)
    assert not child.training
    assert all(m.momentum == 0.1 for m in child.modules() if isinstance(m, nn.BatchNorm2d))


def seen_by_norms(net: nn.Module, batches: list[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """Run a net and keep the inputs of its batch norms."""
    found: dict[str, list[torch.Tensor]] = {}
    hooks = []
    for name, module in net.named_modules():
        if isinstance(module, nn.BatchNorm2d):

            def keep(_: Any, inputs: Any, name: str = name) -> None:
                found.setdefault(name, []).append(inputs[0].detach().clone())

            hooks.append(module.register_forward_pre_hook(keep))
    for batch in batches:
        net(batch)
    for hook in hooks:
        hook.remove()
    return found


def test_statistics_are_the_mean_over_batches_and_the_mode_is_kept() -> None:
    state, child, slicing = heir({"mbconv_expand_ratio": 2.0})
    child.train()
    seen: list[torch.Tensor] = []
    norm = child.get_submodule("stages.2.blocks.1.local_conv.bn")
    hook = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    batches = [torch.randn(4, 3, 32, 32) for _ in range(3)]
    recalibrate(child, state, slicing, batches, "cpu")
    hook.remove()
    assert len(seen) == 3
    assert child.training
    now = child.state_dict()
    mean = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    var = torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0)
    key = "stages.2.blocks.1.local_conv.bn.running_"
    torch.testing.assert_close(now[f"{key}mean"], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(now[f"{key}var"], var, rtol=1e-4, atol=1e-5)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in child.modules())
    assert len(seen) < norms, "images of another size are news to all of them"
    assert recalibrate(child, state, slicing, batches[:1], "cpu", new_input=True) == norms


def test_the_first_change_is_where_a_plain_walk_finds_it() -> None:
    """Against the walk over both nets in their own order, which sees what is skipped."""
    rng = random.Random(0)
    for _ in range(12):
        pair = [random_arch(rng, most=64, deepest=3) for _ in range(2)]
        if rng.random() < 0.7:  # near enough to share a beginning
            pair[1] = replace(pair[0], depths=pair[1].depths)
        states = [dict(FAMILY.build(a, CTX).state_dict()) for a in pair]
        order = {
            name: np.random.default_rng(len(blocks)).permutation(len(blocks))
            for name, blocks in FAMILY.blocks(pair[0]).items()
        }
        slicing = FAMILY.slicing(pair[0], pair[1], CTX, CTX, order)
        want = 0
        for theirs, ours in zip(*states, strict=False):
            s = slicing.get(ours)
            if s is None or theirs != ours or s.source != ours:
                break
            if any(i.tolist() != list(range(n)) for i, n in zip(s.index, states[0][ours].shape, strict=True)):
                break
            want += 1
        assert first_change(states[1], states[0], slicing) == want


@pytest.mark.parametrize("seed", range(40))
def test_random_slices_against_the_naive_copy(seed: int) -> None:
    """With and without a blended dimension."""
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(1, 6, size=rng.integers(0, 5)))
    child = nn.Module()
    child.register_parameter("w", nn.Parameter(torch.randn(shape)))
    child.register_parameter("own", nn.Parameter(torch.randn(3)))
    wide = tuple(int(n + rng.integers(0, 4)) for n in shape)
    parent = {"w": torch.randn(wide)}
    index = tuple(rng.integers(-1, size, size=n).astype(np.int64) for n, size in zip(shape, wide, strict=True))
    blended = range(int(rng.integers(0, 2)) if shape else 0)
    slicing = {"w": Slice("w", index, {dim: rng.random((shape[dim], wide[dim])) for dim in blended})}
    want, copied = naive(dict(child.state_dict()), parent, slicing)
    found = inherit(child, parent, slicing)
    assert (found.copied, found.kept) == (copied, math.prod(shape) + 3 - copied)
    torch.testing.assert_close(child.state_dict()["w"], want["w"], rtol=0, atol=1e-6 if blended else 0)
    assert torch.equal(child.state_dict()["own"], want["own"])


def test_an_equal_child_is_its_parent_and_drops_stale_attention_biases() -> None:
    def never() -> Iterator[torch.Tensor]:
        raise AssertionError("a batch was drawn, where there is nothing to estimate")
        yield

    arch = FAMILY.arch(PARENT)
    parent, child = built(arch), built(arch, random_seed=1).eval()
    inputs, state, slicing = torch.randn(2, 3, 32, 32), parent.state_dict(), FAMILY.slicing(arch, arch, CTX, CTX)
    with torch.no_grad():
        child(inputs)
        inherit(child, state, slicing)
        assert recalibrate(child, state, slicing, never(), "cpu") == 0
        assert weights_digest(child.state_dict()) == weights_digest(state)
        assert torch.equal(child(inputs), parent.eval()(inputs))


def test_another_arch_as_parent_is_refused() -> None:
    arch, child_arch = FAMILY.arch(PARENT), FAMILY.arch({**PARENT, "depths": [2, 2, 4, 1]})
    smaller = FAMILY.arch({**PARENT, "embed_dims": [32, 32, 64, 64], "depths": [1, 1, 1, 1]})
    slicing = FAMILY.slicing(arch, child_arch, CTX, CTX)
    for state in (built(smaller).state_dict(), {}):
        with pytest.raises(InputError, match="parent weights") as caught:
            inherit(built(child_arch), state, slicing)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("size", "classes"), [(32, 5), (48, 5), (224, 5), (224, 7), (384, 1000)])
def test_the_context_of_a_checkpoint_is_found_and_inherited_from(size: int, classes: int) -> None:
    arch = FAMILY.arch(PARENT)
    there = Context(size, classes)
    state = built(arch, there).state_dict()
    found = checkpoint_context(FAMILY, arch, CTX, state)
    assert found.num_classes == classes
    shapes = {k: v.shape for k, v in built(arch, found).state_dict().items()}
    assert shapes == {k: v.shape for k, v in state.items()}
    child = built(arch, random_seed=1)
    own_head = child.state_dict()["head.fc.weight"].clone()
    inherit(child, state, FAMILY.slicing(arch, arch, found, CTX))
    now = child.state_dict()
    assert torch.equal(now["patch_embed.conv1.conv.weight"], state["patch_embed.conv1.conv.weight"])
    kept = state["head.fc.weight"] if classes == CTX.num_classes else own_head
    assert torch.equal(now["head.fc.weight"], kept)


def test_checkpoints_of_other_archs_are_refused_with_the_first_difference() -> None:
    arch = FAMILY.arch(PARENT)
    other = built(FAMILY.arch({**PARENT, "embed_dims": [32, 64, 96, 96]})).state_dict()
    with pytest.raises(InputError, match=r"--seed-weights: got .* instead of") as caught:
        checkpoint_context(FAMILY, arch, CTX, other)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="is missing"):
        checkpoint_context(FAMILY, arch, replace(CTX, num_classes=3), {"a": torch.zeros(2)})
