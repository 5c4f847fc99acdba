"""Timing leaves everything as it was, alternates fairly, and its intervals keep their word."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nas.measure.fingerprint import Conditions, Fingerprint, conditions, take_fingerprint
from nas.measure.measurement import MIN_BLOCKS, Measurement, median_interval, verdict
from nas.measure.throughput import measure, planned_looks, private_copy
from space import Context, InputError, get_family

CTX = Context(img_size=16, num_classes=4)
QUICK = {"ctx": CTX, "batch": 2, "blocks": 6, "max_blocks": 12, "min_block_s": 0.0005}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads on a busy machine wait for each other far longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def conv(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Dropout())


def tiny_vit() -> nn.Module:
    family = get_family("tinyvit")
    arch = family.arch(
        {
            "embed_dims": [32, 32, 32, 32], "depths": [1, 1, 1, 1], "window_sizes": [7, 14, 7],
            "mbconv_expand_ratio": 2.0, "mlp_ratio": 2.0, "head_dim": 16,
        }
    )  # fmt: skip
    model = family.build(arch, Context(img_size=32, num_classes=4))
    assert isinstance(model, nn.Module)
    return model


def cache_ids(model: nn.Module) -> list[int]:
    caches = [getattr(m, "attention_bias_cache", None) for m in model.modules()]
    return [id(tensor) for cache in caches if cache is not None for tensor in cache.values()]


class Sleepy(nn.Module):
    """Writes its name down at each pass; `cost` in steps of a fake clock."""

    def __init__(self, name: str, cost: float, log: list[str], clock: list[float]) -> None:
        super().__init__()
        self.name, self.cost, self.log, self.clock = name, cost, log, clock

    def __deepcopy__(self, memo: object) -> Sleepy:
        return Sleepy(self.name, self.cost, self.log, self.clock)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.log.append(self.name)
        # The machine slows down steadily, as under a growing load.
        self.clock[0] += self.cost * (1 + self.clock[0] / 50)
        return x


@pytest.fixture
def fake_clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [0.0]
    monkeypatch.setattr("nas.measure.throughput.time.perf_counter", lambda: clock[0])
    return clock


def test_blocks_alternate_and_drift_cancels(fake_clock: list[float]) -> None:
    """Order A B B A ...; on a machine that becomes 3x slower the ratio stays the true 2."""
    log: list[str] = []
    fast, slow = Sleepy("A", 1.0, log, fake_clock), Sleepy("B", 2.0, log, fake_clock)
    found = measure(fast, slow, ctx=CTX, batch=8, blocks=12, min_block_s=1e-6)
    blocks = log[-24:]
    assert "".join(blocks) == "ABBA" * 6
    assert found.ratio == pytest.approx(2.0, rel=0.03)
    assert found.ratio_lo is not None
    assert found.ratio_hi is not None
    assert found.ratio_lo <= 2.0 <= found.ratio_hi
    assert found.images_per_s_hi > 1.5 * found.images_per_s_lo, "the drift is in images/s"


def test_measures_longer_only_while_a_bound_is_inside(fake_clock: list[float]) -> None:
    def blocks(ratio: float | None) -> int:
        log: list[str] = []
        fake_clock[0] = 0.0
        pair = Sleepy("A", 1.0, log, fake_clock), Sleepy("B", 2.0, log, fake_clock)
        kept = {"blocks": 6, "max_blocks": 40, "min_block_s": 1e-6}
        return measure(*pair, ctx=CTX, batch=8, ratio_at_least=ratio, **kept).blocks

    assert blocks(None) == 6
    assert blocks(1.0) == 6
    assert blocks(4.0) == 6
    assert blocks(2.0) == 40
    pair = Sleepy("A", 1.0, [], fake_clock), Sleepy("B", 2.0, [], fake_clock)
    long = measure(*pair, ctx=CTX, batch=8, ratio_at_least=2.0, min_block_s=1e-6)
    assert (long.blocks, long.coverage >= 0.95) == (48, True), "three looks, one promise"
    assert planned_looks(6, 40) == [6, 12, 24, 40]
    assert planned_looks(12, 12) == [12]


def test_several_passes_fill_a_block(fake_clock: list[float]) -> None:
    log: list[str] = []
    model = Sleepy("A", 0.001, log, fake_clock)
    found = measure(model, ctx=CTX, batch=8, blocks=6, min_block_s=0.06)
    assert found.passes == pytest.approx(60, abs=1)
    assert found.images_per_s == pytest.approx(8 / 0.001, rel=0.05)
    assert found.ratio is None
    assert found.reference_images_per_s is None


def test_caller_is_left_as_it_was() -> None:
    """Mode, weights, gradients, hooks, caches, threads and random state survive a timing."""
    for training in (True, False):
        model = tiny_vit()
        model.train(training)
        before = copy.deepcopy(model.state_dict())
        x = torch.zeros(2, 3, 32, 32)
        if not training:
            model(x)  # fills the attention caches, with gradients: the deepcopy trap
        caches = [
            id(m.attention_bias_cache)
            for m in model.modules()
            if hasattr(m, "attention_bias_cache")
        ]
        state = torch.get_rng_state()
        torch.set_num_threads(threads := 2)
        context = Context(img_size=32, num_classes=4)
        found = measure(model, model, ctx=context, batch=2, blocks=6, min_block_s=0.001, threads=1)
        assert found.threads == 1
        assert torch.get_num_threads() == threads
        torch.set_num_threads(1)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(m.training == training for m in model.modules())
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        after = model.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert caches == [
            id(m.attention_bias_cache)
            for m in model.modules()
            if hasattr(m, "attention_bias_cache")
        ]


def test_private_copy_drops_stale_bias_caches() -> None:
    """Weights loaded after an eval pass count in the copy, though the model's cache is older."""
    model = tiny_vit().eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(x)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("attention_biases"):
                weight.add_(torch.arange(weight.numel()).reshape(weight.shape) / 3)
    fresh = private_copy(model, "cpu")
    with torch.no_grad():
        found = fresh(x)
        stale = model(x)
        for module in model.modules():
            if hasattr(module, "attention_bias_cache"):
                module.attention_bias_cache = {}
        wanted = model(x)
    assert torch.equal(found, wanted)
    assert not torch.equal(found, stale)
    assert not any(p.requires_grad for p in fresh.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_that_of_the_passes(dtype: str) -> None:
    seen: list[torch.dtype] = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.dtype)
            y = self.layer(x)
            assert isinstance(y, torch.Tensor)
            assert y.dtype == x.dtype
            assert not torch.is_grad_enabled()
            assert not self.training
            return y

    found = measure(Spy(), dtype=dtype, **QUICK)
    assert set(seen) == {getattr(torch, dtype)}
    assert (found.dtype, found.device, found.runtime) == (dtype, "cpu", "eager")


def test_errors_of_a_network_come_through_and_state_is_restored() -> None:
    class Bomb(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("out of memory")

    threads = torch.get_num_threads()
    with pytest.raises(torch.OutOfMemoryError):
        measure(Bomb(), threads=threads + 1, **QUICK)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    "bad",
    [
        {"batch": 0}, {"dtype": "int8"}, {"blocks": 5}, {"max_blocks": 5}, {"min_block_s": 0.0},
        {"device": "tpu"}, {"min_block_s": float("nan")},
    ],
)  # fmt: skip
def test_bad_settings_are_refused_in_one_line(bad: dict[str, object]) -> None:
    with pytest.raises(InputError) as caught:
        measure(conv(), **{**QUICK, **bad})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_interval_coverage_by_simulation() -> None:
    """The stated coverage is the true one, whatever the distribution; 6 blocks reach 95 %."""
    rng = random.Random(0)
    for n in (MIN_BLOCKS, 7, 12, 25, 48):
        stated = median_interval(range(n)).coverage
        assert stated >= 0.95
        hits = 0
        for _ in range(2000):
            found = median_interval([rng.lognormvariate(0, 1.5) for _ in range(n)])
            hits += found.lo <= 1.0 <= found.hi
        assert hits / 2000 == pytest.approx(stated, abs=0.02)


def test_sequential_looks_together_keep_their_coverage() -> None:
    """Stopping at the first look that decides is wrong in at most 5 % of trials, at the bound."""
    rng = random.Random(1)
    looks = planned_looks(6, 48)
    share = 1 - 0.05 / len(looks)
    wrong = 0
    for _ in range(2000):
        values = [rng.gauss(1, 0.2) for _ in range(48)]
        for n in looks:
            found = median_interval(values[:n], share)
            decided = verdict(found.lo, found.hi, 1.0)
            if decided != "undecided":
                wrong += 1
                break
    # Six values cannot reach the share of one of four looks: their 3.1 % is what is spent there.
    assert wrong / 2000 <= 0.031 + 0.0375


@given(st.lists(st.floats(0.1, 1e6), min_size=1, max_size=60))
@settings(derandomize=True, deadline=None)
def test_interval_orders_and_ignores_order(values: list[float]) -> None:
    found = median_interval(values)
    assert min(values) <= found.lo <= found.median <= found.hi <= max(values)
    assert median_interval(values[::-1]) == found


def sample(**changes: object) -> Measurement:
    return Measurement(
        **{
            "images_per_s": 100.0, "images_per_s_lo": 90.0, "images_per_s_hi": 110.0,
            "ratio": 2.0, "ratio_lo": 1.9, "ratio_hi": 2.1, "reference_images_per_s": 50.0,
            "coverage": 0.96, "blocks": 12, "passes": 3, "seconds": 1.5, "img_size": 48,
            "num_classes": 10, "in_chans": 3, "batch": 32, "dtype": "float32",
            "runtime": "eager", "device": "cpu", "threads": 2, "fingerprint": "0123456789ab",
            "load": 0.5, "when": "2026-01-01T00:00:00+00:00", **changes,
        }
    )  # type: ignore[arg-type]  # fmt: skip


def test_verdicts_by_interval_ends() -> None:
    found = sample()
    assert found.meets() == "pass"
    assert [found.meets(r) for r in (1.9, 1.95, 2.1, 2.2)] == [
        "pass", "undecided", "undecided", "fail",
    ]  # fmt: skip
    assert found.meets(images_per_s_at_least=111) == "fail"
    assert found.meets(1.5, 100) == "undecided"
    assert found.meets(2.2, 100) == "fail"
    assert found.meets(1.9, 90) == "pass"


def test_measurement_round_trip_and_nonsense() -> None:
    for found in (sample(), sample(ratio=None, ratio_lo=None, ratio_hi=None, load=None)):
        assert Measurement.from_dict(found.to_dict()) == found
    with pytest.raises(InputError, match="ratio_lo"):
        Measurement.from_dict({k: v for k, v in sample().to_dict().items() if k != "ratio_lo"})
    for bad in (
        {"images_per_s": float("nan")}, {"images_per_s_lo": 101.0}, {"ratio_lo": None},
        {"ratio": -1.0}, {"blocks": 0}, {"batch": 0},
    ):  # fmt: skip
        with pytest.raises(InputError):
            sample(**bad)


def test_fingerprint_is_identity_without_conditions() -> None:
    here = take_fingerprint("cpu", threads=2)
    assert take_fingerprint("cpu", threads=2) == here
    assert take_fingerprint("cpu", threads=2).id == here.id
    assert take_fingerprint("cpu", threads=3).id != here.id
    assert here.torch == torch.__version__
    assert Fingerprint.from_dict(here.to_dict()) == here
    assert here.device_name in here.describe()
    with pytest.raises(InputError):
        Fingerprint.from_dict({**here.to_dict(), "id": "0" * 12})
    with pytest.raises(InputError):
        Fingerprint.from_dict({"id": "x"})
    now = conditions()
    assert isinstance(now, Conditions)
    assert now.when.endswith("+00:00")


def test_an_absent_device_is_refused() -> None:
    names = ["tpu", "mps", ""] + ([] if torch.cuda.is_available() else ["cuda", "cuda:1"])
    for name in names:
        with pytest.raises(InputError, match="--device"):
            take_fingerprint(name, threads=1)


def test_values_import_without_torch() -> None:
    """What the driver imports must not load torch."""
    code = (
        "import sys; import nas.measure.table, nas.measure.fingerprint, nas.measure.measurement, "
        "nas.report, nas.report.charts, nas.report.figure, benchmarks.pareto; "
        "from nas.measure.fingerprint import take_fingerprint; take_fingerprint('cpu', threads=1); "
        "assert 'torch' not in sys.modules; assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_torch_version_is_the_same_with_and_without_torch_loaded() -> None:
    code = (
        "from nas.measure.fingerprint import take_fingerprint as f; a = f('cpu', threads=1).id; "
        "import torch; assert a == f('cpu', threads=1).id"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_on_a_gpu(dtype: str) -> None:
    model = tiny_vit()
    context = Context(img_size=32, num_classes=4)
    found = measure(
        model, model, ctx=context, batch=8, dtype=dtype, device="cuda", blocks=6, max_blocks=6
    )
    assert found.ratio == pytest.approx(1.0, rel=0.5)
    assert next(model.parameters()).device.type == "cpu"
    assert take_fingerprint("cuda").cuda == torch.version.cuda
