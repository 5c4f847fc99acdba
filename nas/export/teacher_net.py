"""Which net a teacher is, and how it sees the student's inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from nas.core.io import read_json
from nas.export.weights import State, load_checkpoint, load_into, load_timm_model
from space.errors import refuse

AUTO_MODEL = "resnet10t"
AUTO_KWARGS: Mapping[str, Any] = {"channels": (32, 64, 128, 256), "stem_width": 16}
"""The `auto` teacher: timm's smallest residual net at half width, 1.27M parameters at 100 classes.
Convolutions learn small image sets quickly, which is all that is asked of it."""

_WANT = (
    "auto, a timm model, MODEL:FILE such as resnet18:weights.safetensors, or a folder in timm's "
    "hub layout (config.json and model.safetensors)"
)


@dataclass(frozen=True)
class TeacherSpec:
    """What the user asked for: `kind` is "auto", "timm" (pretrained, `model` a timm name or tag) or
    "file" (`model` a timm name, or "" to read it from the folder `path`)."""

    kind: str
    model: str
    path: str | None = None

    @property
    def name(self) -> str:
        """The spelling that `parse_teacher` takes."""
        if self.kind == "auto":
            return "auto"
        return ":".join(part for part in (self.model, self.path) if part)


def parse_teacher(text: str) -> TeacherSpec:
    """Read `--teacher`. Needs timm only to tell names apart; raises InputError."""
    import timm

    if text == "auto":
        return TeacherSpec("auto", AUTO_MODEL)
    if (Path(text).expanduser() / "config.json").is_file():
        return TeacherSpec("file", "", text)
    model, colon, path = text.partition(":")
    if colon and timm.is_model(model):
        if not Path(path).expanduser().is_file():
            raise refuse("--teacher", text, "a checkpoint file after the colon", "check the path")
        return TeacherSpec("file", model, path)
    if timm.is_model(text.split(".")[0]):
        return TeacherSpec("timm", text)
    if Path(text).expanduser().exists():
        raise refuse("--teacher", text, _WANT, "say which timm model it is: MODEL:FILE")
    raise refuse("--teacher", text, _WANT, "see timm.list_models(pretrained=True)")


@dataclass(frozen=True, eq=False)
class Source:
    """A net to make a teacher of: timm call, starting weights (None: fresh), and its input.

    `num_classes` counts the classes of `state`; `input_size` None means the student's size.
    """

    model: str
    kwargs: Mapping[str, Any]
    state: State | None
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: int | None
    notes: tuple[str, ...] = field(default=())


def find_source(
    spec: TeacherSpec, num_classes: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> Source:
    """Resolve a specification; `mean`, `std` and `num_classes` are the data's. Raises InputError.

    A pretrained timm model sees images at the size it was trained at. A MODEL:FILE checkpoint sees
    the data's size unless the model takes only one, and is taken to normalise as timm's model does.
    """
    if spec.kind == "auto":
        return Source(spec.model, AUTO_KWARGS, None, num_classes, mean, std, None)
    if spec.kind == "timm":
        model = load_timm_model(spec.model, name="--teacher")
        config: Mapping[str, Any] = dict(getattr(model, "pretrained_cfg", {}) or {})
        state = dict(model.state_dict())
        classes = int(getattr(model, "num_classes", num_classes))
        return _with_config(spec.model, {}, state, classes, config, always_resize=True)
    assert spec.path is not None
    if spec.model:
        state = load_checkpoint(spec.path, name="--teacher")
        classes = _fit(spec, state)
        config = _config_of(spec.model)
        return _with_config(spec.model, {}, state, classes, config, always_resize=False)
    return _from_folder(spec.path)


def _from_folder(folder: str) -> Source:
    """Read timm's hub layout, which `timm.models.save_for_hf` writes."""
    path = Path(folder).expanduser()
    config = read_json(path / "config.json", "timm's config.json of a model")
    name = config.get("architecture") if isinstance(config, dict) else None
    if not isinstance(name, str):
        raise refuse("--teacher", path, "a config.json naming an architecture", "see timm's hub")
    state = load_checkpoint(folder, name="--teacher")
    try:
        preprocess = {**config, **(config.get("pretrained_cfg") or {})}
        classes = int(preprocess.get("num_classes", 0)) or 1
        # The classes are told apart below, as the data may have others.
        given = config.get("model_args") or {}
        kwargs = {k: v for k, v in given.items() if k != "num_classes"}
        source = _with_config(name, kwargs, state, classes, preprocess, always_resize=True)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        got = f"{path / 'config.json'} ({type(error).__name__}: {error})"
        raise refuse("--teacher", got, "timm's config.json of a model", "see timm's hub") from None
    load_checked(source, classes)
    return source


def _config_of(model: str) -> Mapping[str, Any]:
    import timm

    config: Any = timm.get_pretrained_cfg(model, allow_unregistered=True)
    return dict(config.to_dict()) if config is not None else {}


def _with_config(
    model: str,
    kwargs: Mapping[str, Any],
    state: State,
    classes: int,
    config: Mapping[str, Any],
    *,
    always_resize: bool,
) -> Source:
    size = config.get("input_size")
    fixed = bool(config.get("fixed_input_size"))
    side = int(size[-1]) if size and (always_resize or fixed) else None
    mean = tuple(float(v) for v in config.get("mean", (0.485, 0.456, 0.406)))
    std = tuple(float(v) for v in config.get("std", (0.229, 0.224, 0.225)))
    return Source(model, kwargs, state, classes, mean, std, side)


def _fit(spec: TeacherSpec, state: State) -> int:
    """Find the class count with which a model takes a checkpoint."""
    model = create(spec.model, {}, 2)
    wider = create(spec.model, {}, 3).state_dict()
    for key, tensor in model.state_dict().items():
        if tensor.shape != wider[key].shape and key in state and state[key].ndim == tensor.ndim:
            return max(1, int(state[key].shape[0]))
    raise refuse("--teacher", spec.name, f"weights of timm's {spec.model}", "name its own model")


def create(model: str, kwargs: Mapping[str, Any], num_classes: int) -> nn.Module:
    """Build a timm model with fresh weights; what timm refuses is refused in one line."""
    import timm

    try:
        net: nn.Module = timm.create_model(
            model.split(".")[0], pretrained=False, num_classes=num_classes, **_tuples(kwargs)
        )
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        why = f"{model} ({type(error).__name__}: {str(error)[:80]})"
        raise refuse("--teacher", why, "a model that timm can build", "check its name") from error
    return net


def load_checked(source: Source, num_classes: int) -> nn.Module:
    """Build the source's net for `num_classes`, with its weights; another head starts fresh."""
    net = create(source.model, source.kwargs, num_classes)
    if source.state is None:
        return net
    if source.num_classes == num_classes:
        load_into(net, source.state, name="--teacher")
        return net
    own = net.state_dict()
    shared = create(source.model, source.kwargs, source.num_classes).state_dict()
    mixed = {
        k: source.state[k] if k in source.state and shared[k].shape == v.shape else v
        for k, v in own.items()
    }
    load_into(net, mixed, name="--teacher")
    return net


class TeacherNet(nn.Module):
    """A net behind the student's inputs: other mean and std, other size, undone here."""

    def __init__(
        self,
        net: nn.Module,
        student: tuple[tuple[float, ...], tuple[float, ...]],
        own: tuple[tuple[float, ...], tuple[float, ...]],
        input_size: int | None,
    ) -> None:
        super().__init__()
        (mean, std), (own_mean, own_std) = student, own
        if not len(mean) == len(std) == len(own_mean) == len(own_std):
            raise refuse("--teacher", f"{len(own_mean)} channels", f"{len(mean)} channels")
        self.net = net
        self.input_size = input_size
        self.same = (mean, std) == (own_mean, own_std)
        scale = [s / o for s, o in zip(std, own_std, strict=True)]
        shift = [(m - o) / d for m, o, d in zip(mean, own_mean, own_std, strict=True)]
        self.scale: torch.Tensor
        self.shift: torch.Tensor
        self.register_buffer("scale", torch.tensor(scale).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", torch.tensor(shift).view(1, -1, 1, 1), persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Student-normalised [B, 3, S, S] -> logits [B, C]."""
        if not self.same:
            inputs = inputs * self.scale + self.shift
        if self.input_size is not None and inputs.shape[-1] != self.input_size:
            inputs = functional.interpolate(
                inputs, size=(self.input_size, self.input_size), mode="bicubic", antialias=True
            )
        logits: torch.Tensor = self.net(inputs)
        return logits


def _tuples(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Undo what JSON did to tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in kwargs.items()}
