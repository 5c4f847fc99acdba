"""Importance: what is worth nothing goes first, against naive oracles; and the job that ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from space_cases import one_thread  # noqa: F401 - a fixture, used by every test here
from torch import nn

from nas.data import Dataset
from nas.distill.jobs import ParentWeights, TrainJob, train
from nas.distill.student import ParentNetwork, start_model
from nas.export.weights import load_weights, save_weights, weights_digest
from nas.inherit.importance import CRITERIA, block_harm, load_order, order_of, rank_units, taylor_scores, weight_norms
from nas.inherit.jobs import ImportanceJob, rank_by_importance
from nas.inherit.slice import inherit
from nas.jobs.job import Job, Result, run_job
from nas.labels.reader import Batch, holdout_batches
from nas.labels.store import LabelStore
from nas.train.losses import sparse_soft_cross_entropy
from nas.train.optim import INHERIT_LR
from space import Context, get_family
from space.errors import InputError
from tests.train_cases import TINY

FAMILY = get_family("tinyvit")
CHANGES = {"embed_dims": [16, 32, 48, 64], "depths": [2, 1, 3, 1], "mlp_ratio": 1.5, "head_dim": 16}
ARCH: Any = FAMILY.arch({**TINY, **CHANGES})
CTX = Context(32, 10)
GROUPS = FAMILY.groups(ARCH, CTX)


def built(random_seed: int = 0, arch: Any = ARCH) -> nn.Module:
    """A net in which everything matters: no zeros, no ones, no tensor like another."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_seed)
        model = FAMILY.build(arch, CTX)
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.rand_like(tensor)
                tensor.add_(noise * (0.5 if name.endswith((".weight", "_var")) else 0.1))
    return model


def made_batches(n: int = 2, dtype: torch.dtype = torch.float32) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(n):
        inputs = torch.randn(4, 3, 32, 32, generator=generator, dtype=dtype)
        index = torch.rand(4, 10, generator=generator).argsort(1)[:, :3]
        prob, tail = torch.tensor([[0.6, 0.2, 0.1]] * 4), torch.full((4,), 0.1)
        rows = torch.arange(4)
        found.append(Batch(inputs, index, prob, tail, index[:, 0], rows))
    return found


def step_loss(net: nn.Module, batch: Batch) -> torch.Tensor:
    return sparse_soft_cross_entropy(net(batch.inputs), batch.index, batch.prob, batch.tail).mean()


def precise(net: nn.Module, batch: Batch) -> torch.Tensor:
    """The same loss in float64, for finite differences."""
    log_q = net(batch.inputs).log_softmax(1)
    return -(batch.prob.double() * log_q.gather(1, batch.index)).sum(1).mean()


def test_the_order_is_the_same_again_and_the_model_is_as_it_was() -> None:
    model = built().train()
    frozen = dict(model.named_parameters())["head.fc.bias"].requires_grad_(False)
    mine = torch.ones(64)
    dict(model.named_parameters())["head.norm.bias"].grad = mine
    digest = weights_digest(model.state_dict())
    given: dict[str, Any] = {"batches": made_batches(), "step_loss": step_loss}
    for criterion in CRITERIA:
        first = rank_units(FAMILY, ARCH, CTX, model, criterion, **given)
        assert rank_units(FAMILY, ARCH, CTX, model, criterion, **given) == first
        units = {name: list(range(1 + members[0].unit.max())) for name, members in GROUPS.items()}
        assert (first if criterion == "prefix" else {k: sorted(v) for k, v in first.items()}) == units
    blocks = order_of(block_harm(model, FAMILY.blocks(ARCH), **given))
    assert {k: sorted(v) for k, v in blocks.items()} == {
        k: list(range(len(names))) for k, names in FAMILY.blocks(ARCH).items()
    }
    assert weights_digest(model.state_dict()) == digest
    assert model.training
    assert not frozen.requires_grad
    assert dict(model.named_parameters())["head.norm.bias"].grad is mine
    model = FAMILY.build(ARCH, CTX)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    equal = rank_units(FAMILY, ARCH, CTX, model, "l1")
    assert all(wanted == list(range(len(wanted))) for wanted in equal.values()), "equal units go by their number"
    with pytest.raises(InputError, match="prefix, l1, l2, taylor"):
        rank_units(FAMILY, ARCH, CTX, model, "magic")


@pytest.mark.parametrize("power", [1, 2])
def test_norms_are_those_of_kernels_with_their_batch_norm_folded_in(power: int) -> None:
    model = built()
    state = {k: v.double() for k, v in model.state_dict().items()}

    def folded(at: str) -> torch.Tensor:
        scale = state[f"{at}.bn.weight"] / (state[f"{at}.bn.running_var"] + 1e-5).sqrt()
        return state[f"{at}.conv.weight"] * scale[:, None, None, None]

    def part(weight: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
        found = (weight.abs() ** power).sum(dims)
        return found / found.mean()

    got = weight_norms(model, GROUPS, power)
    at = "stages.0.blocks.1"
    want = sum(part(folded(f"{at}.conv{i}"), (1, 2, 3) if i < 3 else (0, 2, 3)) for i in (1, 2, 3))
    np.testing.assert_allclose(got[f"{at}.expand"], want, rtol=1e-10)
    at = "stages.2.blocks.1"
    want = part(state[f"{at}.mlp.fc1.weight"], (1,)) + part(state[f"{at}.mlp.fc2.weight"], (0,))
    np.testing.assert_allclose(got[f"{at}.hidden"], want, rtol=1e-10)
    rows = state[f"{at}.attn.qkv.weight"].view(3, 48 * 48)
    columns = state[f"{at}.attn.proj.weight"].T.reshape(3, 16 * 48)
    np.testing.assert_allclose(got[f"{at}.heads"], part(rows, (1,)) + part(columns, (1,)))
    # Scale before a batch norm means nothing, and changes nothing here.
    with torch.no_grad():
        own = model.state_dict()
        for key, factor in (("conv.weight", 7.0), ("bn.running_mean", 7.0), ("bn.running_var", 49)):
            own[f"stages.0.blocks.1.conv2.{key}"][3] *= factor
    again = weight_norms(model, GROUPS, power)["stages.0.blocks.1.expand"]
    np.testing.assert_allclose(again, got["stages.0.blocks.1.expand"], rtol=1e-3)


@pytest.mark.parametrize(
    "name",
    [
        "stem",
        "dim2",
        "dim4",
        "stages.0.blocks.0.expand",
        "stages.2.blocks.1.hidden",
        "stages.3.downsample.hidden",
        "stages.3.blocks.0.heads",
    ],
)
def test_taylor_is_the_slope_of_the_loss_in_a_unit_scaled_as_a_whole(name: str) -> None:
    model = built().double().eval()
    batches = made_batches(2, torch.float64)
    got = taylor_scores(model, GROUPS, batches, precise)[name]
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    for unit in (0, len(got) - 1):
        slopes = []
        for batch in batches:
            losses = []
            for step in (1e-5, -1e-5):
                kept = {m.key: parameters[m.key].clone() for m in GROUPS[name] if m.key in parameters}
                for m in GROUPS[name]:
                    if m.key in parameters:
                        at = torch.from_numpy(np.flatnonzero(m.unit == unit))
                        part = parameters[m.key].index_select(m.dim, at)
                        parameters[m.key].index_copy_(m.dim, at, part * (1 + step))
                model.train()
                model.eval()
                with torch.no_grad():
                    losses.append(float(precise(model, batch)))
                for key, value in kept.items():
                    parameters[key].copy_(value)
            slopes.append((losses[0] - losses[1]) / 2e-5)
        assert got[unit] == pytest.approx(np.mean(np.square(slopes)), rel=1e-3, abs=1e-13)


def test_a_blocks_harm_is_the_loss_of_the_child_without_it() -> None:
    model, batches = built().eval(), made_batches()
    harm = block_harm(model, FAMILY.blocks(ARCH), batches, step_loss)
    with torch.no_grad():
        whole = np.mean([float(step_loss(model, b)) for b in batches])
    for stage, name in ((0, "stages.0.blocks"), (2, "stages.2.blocks")):
        depth = ARCH.depths[stage]
        depths = tuple(d - (i == stage) for i, d in enumerate(ARCH.depths))
        child_arch = replace(ARCH, depths=depths)
        for j in range(depth):
            order = {name: np.array([*(i for i in range(depth) if i != j), j])}
            child = FAMILY.build(child_arch, CTX).eval()
            slicing = FAMILY.slicing(ARCH, child_arch, CTX, CTX, order)
            assert inherit(child, model.state_dict(), slicing).kept == 0
            with torch.no_grad():
                without = np.mean([float(step_loss(child, b)) for b in batches])
            assert harm[name][j] == pytest.approx(without - whole, rel=1e-4, abs=1e-6)
    for name, wanted in order_of(harm).items():
        assert (np.diff(harm[name][wanted]) <= 0).all()


@pytest.fixture(scope="module")
def given(dataset: Dataset, store: LabelStore) -> dict[str, Any]:
    return {
        "family": "tinyvit",
        "arch": FAMILY.to_dict(ARCH),
        "context": CTX,
        "dataset": dataset.folder,
        "store": store.folder,
        "batch_size": 8,
        "random_seed": 0,
        "device": "cpu",
        "missing": "error",
    }


def ranked(given: dict[str, Any], criterion: str, out: Path, weights: Path) -> Result:
    job = ImportanceJob(**given, images=24, criterion=criterion, out=out, weights=weights)
    return run_job(Job(rank_by_importance, job, "rank"))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_job_ranks_on_replayed_images(given: dict[str, Any], criterion: str, tmp_path: Path) -> None:
    weights = tmp_path / "parent.safetensors"
    save_weights(weights, built().state_dict())
    files = [tmp_path / "deep" / name for name in ("1.json", "2.json")]
    for file in files:
        result = ranked(given, criterion, file, weights)
        assert result.ok, result.reason
        assert result.values == {"file": str(file), "criterion": criterion}
    assert files[0].read_bytes() == files[1].read_bytes()
    assert json.loads(files[0].read_text())["criterion"] == criterion
    order = load_order(files[0])
    blocks = set() if criterion == "prefix" else set(FAMILY.blocks(ARCH))
    assert set(order) == set(GROUPS) | blocks
    child = replace(ARCH, embed_dims=(16, 32, 32, 48), depths=(1, 1, 2, 1), mlp_ratio=1.0)
    FAMILY.slicing(ARCH, child, CTX, CTX, order)  # which asserts that all are permutations


def test_a_training_starts_from_what_is_wanted_most(
    given: dict[str, Any], dataset: Dataset, store: LabelStore, tmp_path: Path
) -> None:
    parent, order = tmp_path / "parent.safetensors", tmp_path / "order.json"
    save_weights(parent, built().state_dict())
    assert ranked(given, "taylor", order, parent).ok
    child = replace(ARCH, embed_dims=(16, 32, 32, 48), depths=(2, 1, 2, 1), mlp_ratio=1.0)
    losses = []
    for number, chosen in enumerate((order, None)):
        job = TrainJob(
            **{**given, "arch": FAMILY.to_dict(child)},
            store_id=store.id,
            init="inherit",
            lr=INHERIT_LR,
            epochs=1,
            parent=ParentWeights(arch=FAMILY.to_dict(ARCH), weights=parent, order=chosen),
            label_overflow="cycle",
            label_epochs=None,
            out=tmp_path / f"out{number}",
        )
        result = run_job(Job(train, job, "train"))
        assert result.ok, result.reason
        losses.append(result.values["soft_loss"])
    assert losses[0] != losses[1]
    # Its very first weights, and statistics that were estimated on the first batches.
    inputs = [b.inputs for b in holdout_batches(dataset, store, 8)]
    source = ParentNetwork(arch=ARCH, weights=parent, order=load_order(order))
    model, copied = start_model(FAMILY, child, CTX, random_seed=0, parent=source, inputs=inputs)
    plain, _ = start_model(FAMILY, child, CTX, random_seed=0, parent=source)
    state, slicing = model.state_dict(), FAMILY.slicing(ARCH, child, CTX, CTX, load_order(order))
    assert copied == sum(t.numel() for t in state.values())
    old = load_weights(parent)
    key = "stages.2.blocks.1.mlp.fc1.bias"
    rows = torch.from_numpy(slicing[key].index[0])
    assert torch.equal(state[key], old[slicing[key].source][rows])
    moved = {k for k, v in plain.state_dict().items() if not torch.equal(v, state[k])}
    assert moved
    assert all("running" in k or "num_batches" in k for k in moved)


def test_a_damaged_order_is_refused(given: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "order.json"
    for text in ("{", "[]", '{"order": 3}', '{"order": {"stem": ["a"]}}', '{"order": {"a": [1e99]}}'):
        file.write_text(text)
        with pytest.raises(InputError, match="order of units") as caught:
            load_order(file)
        assert "\n" not in str(caught.value)
    save_weights(tmp_path / "parent.safetensors", built().state_dict())
    result = ranked(given, "magic", tmp_path / "o.json", tmp_path / "parent.safetensors")
    assert not result.ok
    assert "--importance" in result.reason
