"""Timing leaves everything as it was, records what it measured, and refuses what it cannot."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from space_cases import TINY_FACTORS, one_thread  # noqa: F401
from torch import nn

from nas.core.requirement import Setting
from nas.measure.fingerprint import take_fingerprint
from nas.measure.interference import Disturbance
from nas.measure.interleave import TimingPlan
from nas.measure.memory import peak_memory_bytes
from nas.measure.throughput import difference, measure, prepare, private_copy, time_prepared
from space import Context, InputError, get_family

CTX = Context(img_size=16, num_classes=4)
SMALL = Context(img_size=32, num_classes=4)
QUICK = TimingPlan(6, 0.0005)


def tiny_vit() -> nn.Module:
    family = get_family("tinyvit")
    return family.build(family.arch(TINY_FACTORS), SMALL)


def cache_ids(model: nn.Module) -> list[int]:
    caches = [getattr(m, "attention_bias_cache", None) for m in model.modules()]
    return [id(tensor) for cache in caches if cache is not None for tensor in cache.values()]


class Sleepy(nn.Module):
    """Takes `cost` seconds of a fake clock a pass."""

    def __init__(self, cost: float, clock: list[float]) -> None:
        super().__init__()
        self.cost, self.clock = cost, clock

    def __deepcopy__(self, memo: object) -> Sleepy:
        return Sleepy(self.cost, self.clock)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.clock[0] += self.cost
        return x


@pytest.fixture
def sleepy(monkeypatch: pytest.MonkeyPatch) -> Sleepy:
    """A network whose pass takes a millisecond; time passes in it only."""
    clock = [0.0]

    class Time:
        perf_counter = staticmethod(lambda: clock[0])

    class Calm:
        def __init__(self, device: str) -> None: ...

        def read(self) -> Disturbance:
            return Disturbance(0.0, "")

    monkeypatch.setattr("nas.measure.runtimes.eager.time", Time)
    monkeypatch.setattr("nas.measure.interleave.time", Time)
    monkeypatch.setattr("nas.measure.interleave.Watch", Calm)
    return Sleepy(0.001, clock)


def test_several_passes_fill_a_block(sleepy: Sleepy) -> None:
    found = measure(sleepy, ctx=CTX, setting=Setting(batch=8), plan=TimingPlan(6))
    assert found.passes == pytest.approx(6 * 60, abs=6)
    assert found.images_per_s == pytest.approx(8 / 0.001, rel=0.05)
    assert found.latency_ms_p50 == pytest.approx(1.0, rel=0.05)
    assert (found.ratio, found.reference_images_per_s) == (None, None)


def test_networks_of_several_settings_alternate(sleepy: Sleepy) -> None:
    """A reference in another batch: images/s count its own images."""
    nets = [prepare(sleepy, ctx=CTX, setting=Setting(batch=b)) for b in (4, 1)]
    found = time_prepared(nets[:1], nets[1], TimingPlan(6, 0.001, min_passes=3))[0]
    assert found.batch == 4
    assert found.passes >= 3 * 6
    assert found.ratio == pytest.approx(4.0, rel=0.01)
    assert found.reference_images_per_s == pytest.approx(1000.0, rel=0.01)


@pytest.mark.parametrize("training", [True, False])
def test_caller_is_left_as_it_was(training: bool) -> None:
    """Mode, weights, gradients, hooks, caches, threads and random state survive a timing."""
    model = tiny_vit()
    model.train(training)
    before = copy.deepcopy(model.state_dict())
    if not training:
        model(torch.zeros(2, 3, 32, 32))  # fills the caches, with gradients: the deepcopy trap
    caches = cache_ids(model)
    assert bool(caches) != training
    state = torch.get_rng_state()
    torch.set_num_threads(2)
    found = measure(model, model, ctx=SMALL, setting=Setting(batch=2), plan=QUICK, threads=1)
    assert (found.threads, torch.get_num_threads()) == (1, 2)
    torch.set_num_threads(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training == training for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert caches == cache_ids(model)


def test_private_copy_drops_stale_bias_caches() -> None:
    """Weights loaded after an eval pass count in the copy, though the model's cache is older."""
    model = tiny_vit().eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(x)
        for name, weight in model.named_parameters():
            if name.endswith("attention_biases"):
                weight.add_(torch.arange(weight.numel()).reshape(weight.shape) / 3)
        fresh = private_copy(model, "cpu")
        found, stale = fresh(x), model(x)
        wanted = model.train().eval()(x)
    assert torch.equal(found, wanted)
    assert not torch.equal(found, stale)
    assert not any(p.requires_grad for p in fresh.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_that_of_the_passes(dtype: str) -> None:
    """Every pass is in the asked dtype, but for one in float32 that the logits are compared with."""
    seen: list[torch.dtype] = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.dtype)
            y: torch.Tensor = self.layer(x)
            assert y.dtype == x.dtype
            assert not torch.is_grad_enabled()
            assert not self.training
            return y

    found = measure(Spy(), ctx=CTX, setting=Setting(dtype=dtype, batch=2), plan=QUICK)
    oracle = [] if dtype == "float32" else [torch.float32]
    assert set(seen[len(oracle) :]) == {getattr(torch, dtype)}
    assert seen[: len(oracle)] == oracle
    assert (found.dtype, found.device, found.runtime, found.agrees) == (dtype, "cpu", "eager", 1)
    assert (found.parity == 0.0) == (dtype == "float32")


def test_measurement_names_its_setting_and_its_device() -> None:
    """The fingerprint's id is that of the device under the setting."""
    setting = Setting(batch=2)
    found = measure(tiny_vit(), ctx=SMALL, setting=setting, plan=QUICK)
    on = take_fingerprint("cpu", threads=1).under(setting, f"torch {torch.__version__}", 32)
    assert found.fingerprint == on.id
    assert (found.batch, found.img_size, found.num_classes, found.threads) == (2, 32, 4, 1)
    assert (found.visits, found.coverage, found.images_per_s_lo) == (1, 0.0, None), (
        "one process tells nothing of the next"
    )
    assert 0 < found.latency_ms_p50 <= found.latency_ms_p90 <= found.latency_ms_p99


def test_errors_of_a_network_come_through_and_state_is_restored() -> None:
    class Bomb(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("out of memory")

    threads = torch.get_num_threads()
    with pytest.raises(torch.OutOfMemoryError):
        measure(Bomb(), ctx=CTX, setting=Setting(batch=2), threads=threads + 1, plan=QUICK)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("bad", [{"blocks": 0}, {"min_block_s": 0.0}, {"min_block_s": float("nan")}])
def test_bad_plans_are_refused_in_one_line(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(bad))) as caught:
        TimingPlan(**bad)
    assert "\n" not in str(caught.value)


def test_difference_is_a_share_of_the_largest_and_never_nan() -> None:
    wanted = torch.tensor([[4.0, -8.0]]).numpy()
    found = [difference(of, wanted) for of in (wanted, wanted + 2, wanted * float("nan"))]
    assert found == [0.0, pytest.approx(0.25), float("inf")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("runtime", "dtype"),
    [
        *(("eager", dtype) for dtype in ("float32", "bfloat16", "float16")),
        *((runtime, "bfloat16") for runtime in ("compile", "compile-cudagraphs")),
    ],
)
def test_on_a_gpu(runtime: str, dtype: str) -> None:
    model = tiny_vit()
    setting = Setting("cuda", runtime, dtype, 8)
    peak = peak_memory_bytes(tiny_vit, ctx=SMALL, setting=setting, staged=None)
    assert 0 < peak < 1e9
    found = measure(model, model, ctx=SMALL, setting=setting, plan=TimingPlan(6))
    assert found.ratio == pytest.approx(1.0, rel=0.5)
    assert found.agrees == 1
    assert next(model.parameters()).device.type == "cpu"
    assert take_fingerprint("cuda").cuda == torch.version.cuda
    assert found.clock_mhz is not None
    assert found.clock_mhz > 100
