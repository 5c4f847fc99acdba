"""Every runtime computes the same network, records what it did, and leaves the caller's alone."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from space_cases import TINY_FACTORS, one_thread  # noqa: F401
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from nas.core.requirement import Setting
from nas.export.fuse import fuse_batch_norms
from nas.measure.runtimes import PreparedModel, Runtime, RuntimeRequest, check_setting, find_runtime, runtimes
from nas.measure.runtimes.eager import cuda_timer
from nas.measure.throughput import Prepared, difference, prepare, private_copy
from space import Context, InputError, get_family

CTX = Context(img_size=32, num_classes=4)
EAGER = ["eager", "eager-fused", "eager-channels-last", "eager-fused-channels-last"]
EXACT = [*EAGER, "onnxruntime", "openvino"]
INT8 = ["onnxruntime-int8", "openvino-int8"]
INSTALLED = [name for name in (*EXACT, *INT8) if not runtimes()[name].missing()]


def tiny_vit(seed: int = 0) -> nn.Module:
    """A TinyViT whose norms and biases are those of a trained net: nothing is one or zero."""
    family = get_family("tinyvit")
    arch = family.arch(TINY_FACTORS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family.build(arch, CTX)
    assert isinstance(model, nn.Module)
    return lived(model, seed)


def lived(model: nn.Module, seed: int = 0, size: int = 32) -> nn.Module:
    """Give a net weights and statistics far from those of birth, which would hide mistakes.

    A pass in training mode then fits the norms' statistics to what they see: images differ in their logits.
    """
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("attention_biases"):
                weight.normal_(0.0, 1.0, generator=rng)
            elif weight.ndim >= 2:
                weight.normal_(0.0, 1.5 * weight[0].numel() ** -0.5, generator=rng)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.momentum = 1.0
                module.weight.uniform_(0.5, 1.5, generator=rng)
                module.bias.normal_(0.0, 0.2, generator=rng)
        model.train()(images(99, 16, size))
    return model.eval()


def images(seed: int, batch: int = 2, size: int = 32) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def truth(model: nn.Module, x: Tensor) -> Any:
    with torch.inference_mode():
        return private_copy(model, "cpu")(x).numpy()


def reloaded() -> nn.Module:
    """A TinyViT that made a pass, in eval mode and with gradients, before its weights came."""
    model = tiny_vit()
    model(images(0))  # fills the caches of the attention biases
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if path.endswith("attention_biases"):
                weight.copy_(torch.arange(weight.numel()).reshape(weight.shape) / 2)
    stale = model(images(1)).detach().numpy()
    assert difference(stale, truth(model, images(1))) > 0.1, "the caches matter"
    return model


@pytest.mark.parametrize("name", [n for n in INSTALLED if n in EXACT])
def test_logits_are_eagers_for_any_images(name: str) -> None:
    """Within the stated tolerance, for the images that are timed and for others after timing.

    timm caches attention biases in eval mode: no runtime takes stale ones along.
    """
    model = reloaded()
    before = copy.deepcopy(model.state_dict())
    made = prepare(model, ctx=CTX, setting=Setting(runtime=name, batch=2))
    assert made.agrees is True
    assert made.parity <= made.runtime.tolerance["float32"]
    pieces = made.ready.timer(3)
    assert len(pieces) == 3
    assert all(piece > 0 for piece in pieces)
    several = [truth(model, images(seed)) for seed in (1, 2)]
    assert difference(several[0], several[1]) > 0.1, "the images matter"
    for seed in (1, 2, 1):
        found = made.ready.logits(images(seed).numpy())
        assert found.shape == (2, 4)
        assert found.dtype == np.float32
        assert difference(found, several[seed - 1]) <= made.runtime.tolerance["float32"]
    assert (made.done != "") == (name != "eager")
    assert not model.training
    assert list(before) == list(model.state_dict()), "folding is done to a copy"
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.is_contiguous() for p in model.parameters())
    made.ready.close()


class Separated(nn.Module):
    """Tells images by the place of their bright quarter: logits are far apart."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.pool = nn.AvgPool2d(16)
        self.head = nn.Linear(32, 4)
        with torch.no_grad():
            self.conv.weight.normal_(0.0, 0.05, generator=torch.Generator().manual_seed(0))
            self.conv.weight[:, :, 1, 1] += 0.3
            self.head.weight.zero_()
            for quarter in range(4):
                self.head.weight[quarter, quarter::4] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(F.relu(self.norm(self.conv(x))))
        found: Tensor = self.head(y.flatten(1))
        return found


def quarters(seed: int, batch: int) -> tuple[Tensor, list[int]]:
    x, places = 0.2 * images(seed, batch), [(seed + i) % 4 for i in range(batch)]
    for i, place in enumerate(places):
        row, column = place // 2 * 16, place % 2 * 16
        x[i, :, row : row + 16, column : column + 16] += 2.0
    return x, places


@pytest.mark.parametrize("name", [n for n in INSTALLED if n in EAGER])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves_agree_within_their_own_tolerance(name: str, dtype: str) -> None:
    """The parity is that of the dtype's rounding: neither float32 nor another network."""
    model = Separated().eval()
    made = prepare(model, ctx=CTX, setting=Setting(runtime=name, dtype=dtype, batch=4))
    assert made.agrees is True
    assert made.parity > 1e-5
    found = made.ready.logits(quarters(1, 4)[0].numpy())
    assert found.dtype == np.float32
    wanted = truth(model, quarters(1, 4)[0])
    assert difference(found, wanted) <= made.runtime.tolerance[dtype]


@pytest.mark.parametrize("name", [n for n in INSTALLED if n in INT8])
def test_int8_says_the_same_of_most_images(name: str) -> None:
    model = Separated().eval()
    calibration = [quarters(seed, 4)[0].numpy() for seed in range(8)]
    setting = Setting(runtime=name, batch=4)
    made = prepare(model, ctx=CTX, setting=setting, calibration=calibration)
    assert made.agrees is None, "int8 changes a network on purpose"
    assert 1e-6 < made.parity < 0.2, "neither float nor another network"
    assert "int8" in made.done
    assert "noise" not in made.done
    same = 0
    for seed in range(100, 110):
        x, _ = quarters(seed, 4)
        same += int((made.ready.logits(x.numpy()).argmax(1) == truth(model, x).argmax(1)).sum())
    assert same >= 36
    assert made.ready.timer(2)[0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in INSTALLED if n in INT8])
def test_int8_of_a_transformer_runs_calibrated_on_noise(name: str) -> None:
    """Without images that is recorded, and how much attention with wild weights loses."""
    model = reloaded()
    made = prepare(model, ctx=CTX, setting=Setting(runtime=name, batch=2))
    assert "calibrated on noise" in made.done
    assert made.agrees is None
    assert 1e-3 < made.parity < 2.0
    assert np.isfinite(made.ready.logits(images(3).numpy())).all()


@pytest.mark.slow
def test_compiled_network_is_the_same() -> None:
    """One graph; many candidates in one process compile each; the caller's net is left alone."""
    for seed in range(2):
        model = tiny_vit(seed)
        made = prepare(model, ctx=CTX, setting=Setting(runtime="compile", batch=2))
        assert made.agrees is True
        assert "inductor" in made.done
        found = made.ready.logits(images(1).numpy())
        assert difference(found, truth(model, images(1))) <= 1e-4
        assert len(made.ready.timer(2)) == 2


def test_no_timed_pass_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither because timm's attention keeps its biases from the first pass on, nor for the images of a comparison."""
    name, graphs, compile_with = "compile-cudagraphs", [], torch.compile

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda net, mode, **given: compile_with(net, backend=backend, **given))
    model = private_copy(tiny_vit(), "cpu")
    request = RuntimeRequest(model, images(0), Setting(runtime=name, batch=2), 1, tmp_path)
    ready = find_runtime(name).prepare(request)
    assert len(graphs) == 1
    ready.timer(2)
    assert difference(ready.logits(images(1).numpy()), truth(tiny_vit(), images(1))) <= 1e-4
    assert len(graphs) == 1
    assert "compiled in " in ready.done


def test_events_mark_the_work_of_the_device_that_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the current one: `cuda:1` beside a current `cuda:0` would seem to take no time."""
    current, marks = ["cuda:0"], []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            marks.append(current[-1])

        def synchronize(self) -> None: ...

        def elapsed_time(self, other: Event) -> float:
            return 8.0

    @contextlib.contextmanager
    def device(name: str) -> Iterator[None]:
        current.append(name)
        yield
        current.pop()

    for name, fake in {"Event": Event, "device": device, "synchronize": lambda: None}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    for batch, pieces in ((1, 4), (8, 1)):
        ran: list[str] = []
        assert cuda_timer(lambda to=ran: to.append(current[-1]), Setting("cuda:1", batch=batch))(4) == [0.008] * pieces
        assert ran == ["cuda:1"] * 4
    assert set(marks) == {"cuda:1"}


# Folding batch norms.


def norms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in model.modules())


@pytest.mark.parametrize("name", ["", "resnet10t", "mobilenetv3_small_050", "tf_mobilenetv3_small_075"])
def test_norms_behind_layers_are_folded_and_nothing_changes(name: str) -> None:
    """Statistics far from those of birth: a wrong or a lost activation would be seen."""
    size = 64 if name else 32
    model = lived(timm.create_model(name, num_classes=4), 0, size) if name else tiny_vit()
    x, total = images(0, 2, size), norms(model)
    wanted = truth(model, x)
    assert fuse_batch_norms(model, x[:1]) == total
    assert norms(model) == 0
    assert difference(truth(model, x), wanted) < 1e-4


class Net(nn.Module):
    """Named layers and how they are applied."""

    def __init__(self, apply: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.applied = apply
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.applied(self, x)


def conv_norm(apply: Callable[[Any, Tensor], Tensor], **more: nn.Module) -> Callable[[], nn.Module]:
    return lambda: Net(apply, **{"conv": nn.Conv2d(3, 3, 3, padding=1), "norm": nn.BatchNorm2d(3), **more})


def beside(net: Any, x: Tensor) -> Tensor:
    """The convolution's output is used by the norm and beside it."""
    y = net.conv(x)
    return (net.norm(y) + 3.0 * y).mean((2, 3))


def mutated(net: Any, x: Tensor) -> Tensor:
    """The convolution's output is changed in place before the norm sees it."""
    return net.norm(F.relu_(net.conv(x))).mean((2, 3))


def two_norms(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    return torch.cat([net.norm(y), net.other(y)], 1).mean((2, 3))


def returned(net: Any, x: Tensor) -> Tensor:
    """The convolution's output is an output of the network too."""
    y = net.conv(x)
    return torch.cat([net.norm(y), y], 1).flatten(1)


def twice(net: Any, x: Tensor) -> Tensor:
    """One convolution runs twice, its norm once."""
    return net.norm(net.conv(net.conv(x))).mean((2, 3))


def tokens(net: Any, x: Tensor) -> Tensor:
    """The norm is over tokens, as many as the layer has channels: another axis."""
    return net.norm(net.conv(x.flatten(1, 2))).mean(2)


class Standardised(nn.Conv2d):
    """A convolution that scales its weights itself: scaling them further does nothing."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / self.weight.std()
        return F.conv2d(x, weight, self.bias)


KEPT = {
    **{apply.__name__: conv_norm(apply) for apply in (beside, mutated, returned, twice)},
    "two norms": conv_norm(two_norms, other=nn.BatchNorm2d(3)),
    "tokens": conv_norm(tokens, conv=nn.Linear(32, 96), norm=nn.BatchNorm1d(96)),
    "standardised": lambda: nn.Sequential(Standardised(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()),
    "parametrised": lambda: nn.Sequential(weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.Flatten()),
}


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(3600, 5),
        nn.BatchNorm1d(5),
    )


@pytest.mark.parametrize("name", ["plain", *KEPT])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_norm_is_kept_where_folding_would_change_something(name: str, fresh: bool) -> None:
    """Also with statistics of birth, where a comparison of outputs would see no mistake."""
    model = {"plain": plain, **KEPT}[name]()
    model = model.eval() if fresh else lived(model)
    wanted = truth(model, images(0))
    assert fuse_batch_norms(model, images(0)[:1]) == (2 if name == "plain" else 0)
    assert difference(truth(model, images(0)), wanted) < 1e-5


# The registry.


@pytest.mark.parametrize("name", runtimes())
def test_every_runtime_states_what_it_needs_and_promises(name: str) -> None:
    """One that is not installed is refused with the line that installs it."""
    runtime = find_runtime(name)
    assert runtime.name == name
    assert set(runtime.dtypes) <= {"float32", "bfloat16", "float16"}
    assert runtime.tolerance is None or set(runtime.dtypes) <= set(runtime.tolerance)
    assert runtime.install.startswith("pip install ")
    if not runtime.missing():
        assert "none" not in runtime.version(), runtime.version()
        return
    with pytest.raises(InputError) as caught:
        check_setting(Setting(runtime.devices[0], name, runtime.dtypes[0]))
    assert runtime.install in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "want"),
    [
        (Setting(runtime="tensorflow"), "one of eager"),
        (Setting(runtime="Eager"), "one of eager"),
        (Setting(runtime="onnxruntime", dtype="bfloat16"), "a dtype of float32"),
        (Setting(runtime="openvino-int8", dtype="float16"), "a dtype of float32"),
        (Setting("cuda", "openvino"), "a device of cpu"),
        (Setting("cuda:1", "onnxruntime-int8"), "a device of cpu"),
    ],
)
def test_what_a_runtime_does_not_serve_is_refused(setting: Setting, want: str) -> None:
    if setting.runtime in runtimes() and runtimes()[setting.runtime].missing():
        pytest.skip(f"{setting.runtime} is not installed")
    with pytest.raises(InputError, match=want) as caught:
        check_setting(setting)
    assert "\n" not in str(caught.value)


class Plugged(Runtime):
    """A runtime of another package."""

    name = "plugged"

    def prepare(self, order: RuntimeRequest) -> PreparedModel:
        """Compute something else on purpose."""
        model = order.model

        def logits(x: Any) -> Any:
            with torch.inference_mode():
                return 1.5 * model(torch.from_numpy(x)).numpy()

        return PreparedModel(lambda passes: [0.001] * passes, logits, "plugged in")


class Eclipse(Plugged):
    """Would replace one of our own."""

    name = "eager"


def test_a_runtime_of_another_package_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through its entry point; a name of ours stays ours; what computes otherwise is recorded."""

    def entry_points(*, group: str) -> list[SimpleNamespace]:
        kinds = (Plugged, Eclipse) if group == "vision_contraction.runtimes" else ()
        return [SimpleNamespace(name=kind.name, load=lambda kind=kind: kind) for kind in kinds]

    monkeypatch.setattr(metadata, "entry_points", entry_points)
    assert isinstance(find_runtime("plugged"), Plugged)
    assert not isinstance(find_runtime("eager"), Plugged)
    made: Prepared = prepare(tiny_vit(), ctx=CTX, setting=Setting(runtime="plugged", batch=2))
    assert made.done == "plugged in"
    assert made.agrees is False
    assert made.parity == pytest.approx(0.5, rel=1e-3)


def test_an_onnx_file_holds_everything(tmp_path: Path) -> None:
    """One file, input `images`, output `logits`, of fixed shape; nothing is left beside it."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from nas.export.onnx import OPSET, export_onnx

    target = export_onnx(private_copy(plain(), "cpu"), images(0), tmp_path / "net.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    graph = onnx.load(str(target), load_external_data=False)
    assert [i.name for i in graph.graph.input] == ["images"]
    assert [o.name for o in graph.graph.output] == ["logits"]
    shape = [d.dim_value for d in graph.graph.input[0].type.tensor_type.shape.dim]
    assert shape == [2, 3, 32, 32]
    assert [o.version for o in graph.opset_import if o.domain == ""] == [OPSET]
