"""The net that a teacher is made of; a trained teacher: its values, its net behind the student's inputs, its logits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from nas.core.class_match import match_classes
from nas.core.dataclass_json import from_json
from nas.core.io import read_json
from nas.export.arch_of_weights import class_dims
from nas.export.weights import State, check_state, load_into, load_weights, place, weights_digest
from space.errors import InputError, refuse

SCHEMA = 2


@dataclass(frozen=True, eq=False)
class NetSource:
    """A net to make a teacher of: its timm call, weights and input.

    `state` None means fresh weights, which take the data's classes, mean and std; `num_classes`
    counts the classes of `state`; `input_size` None means the student's size.
    """

    model: str
    kwargs: Mapping[str, Any]
    state: State | None = None
    num_classes: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    input_size: int | None = None


def net_source(
    model: str,
    kwargs: Mapping[str, Any],
    state: State,
    classes: int,
    config: Mapping[str, Any],
    *,
    always_resize: bool = True,
) -> NetSource:
    """Describe a timm model with weights, by its preprocessing `config`.

    It sees images at the size of `config` if it `always_resize`s or takes only one size, else at the data's.
    """
    size = config.get("input_size")
    fixed = bool(config.get("fixed_input_size"))
    side = int(size[-1]) if size and (always_resize or fixed) else None
    mean = tuple(float(v) for v in config.get("mean", (0.485, 0.456, 0.406)))
    std = tuple(float(v) for v in config.get("std", (0.229, 0.224, 0.225)))
    # The data may have other classes: `build_teacher_net` sets their number.
    given = {k: v for k, v in kwargs.items() if k != "num_classes"}
    return NetSource(model, given, state, classes, mean, std, side)


def count_classes(model: str, state: State, kwargs: Mapping[str, Any]) -> int:
    """Return the class count with which a timm model takes a checkpoint. Raises InputError."""
    for key, dim in class_dims(lambda count: create_timm_model(model, kwargs, count)).items():
        if key in state and state[key].ndim > dim:
            return max(1, int(state[key].shape[dim]))
    raise refuse("--teacher", model, f"weights of timm's {model}", "name its own model")


def create_timm_model(model: str, kwargs: Mapping[str, Any], num_classes: int) -> nn.Module:
    """Build a timm model with fresh weights; raises InputError for what timm refuses."""
    import timm

    options: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in kwargs.items()}
    try:
        net: nn.Module = timm.create_model(model.split(".")[0], pretrained=False, num_classes=num_classes, **options)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        got = f"{model} ({type(error).__name__}: {str(error)[:80]})"
        raise refuse("--teacher", got, "a model that timm can build", "check its name") from error
    return net


def check_fits(source: NetSource) -> None:
    """Refuse weights of another net by their names and shapes; no weight is read. Raises InputError."""
    if source.state is None:
        return
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                net = create_timm_model(source.model, source.kwargs, source.num_classes)
        except InputError:  # a few of timm's models compute while they are built
            net = create_timm_model(source.model, source.kwargs, source.num_classes)
    check_state(net, source.state, name="--teacher")


def in_timms_names(model: str, state: State) -> State:
    """Rename the weights of a model's authors by timm's own rule for it, where the names are not timm's already.

    Swin's authors' and DINO's are such. Returns `state` itself where nothing changes or timm has no rule.
    """
    import timm

    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        net = create_timm_model(model, {}, 2)
    wanted = net.state_dict().keys()
    rule = getattr(sys.modules[timm.models.model_entrypoint(model).__module__], "checkpoint_filter_fn", None)
    if rule is None or state.keys() == wanted:
        return state
    try:
        found = rule(dict(state), net)
    except Exception:  # a rule for other weights than these raises almost anything
        return state
    return dict(found) if len(found.keys() ^ wanted) < len(state.keys() ^ wanted) else state


def build_teacher_net(source: NetSource, num_classes: int, rows: Sequence[int] | None = None) -> nn.Module:
    """Build a net for `num_classes` with the source's weights; raises InputError.

    `rows` are those of the source's heads that each class has, -1 to start fresh; None: all in order.
    """
    net = create_timm_model(source.model, source.kwargs, num_classes)
    if source.state is None:
        return net
    state = dict(source.state)
    if rows is not None and list(rows) != list(range(source.num_classes)):
        fresh, index = net.state_dict(), torch.tensor(rows)
        for key, dim in class_dims(lambda count: create_timm_model(source.model, source.kwargs, count)).items():
            if key not in state or state[key].ndim <= dim or state[key].shape[dim] != source.num_classes:
                raise refuse("--teacher", f"{key} without {source.num_classes} rows", f"weights of {source.model}")
            known = (index >= 0).view([-1 if d == dim else 1 for d in range(state[key].ndim)])
            taken = state[key].index_select(dim, index.clamp(min=0))
            state[key] = torch.where(known, taken, fresh[key].to(taken.dtype))
    load_into(net, state, name="--teacher")
    return net


@dataclass(frozen=True)
class TeacherInfo:
    """A trained teacher as plain values.

    `folder` holds weights.safetensors and info.json; `digest` hashes the weights; `model` and `kwargs` are the timm
    call; `classes` names its logits in order: the data's classes, or its own where the data has none; `mean`, `std`,
    `input_size` (None: as given) describe its own inputs, `student_mean` and `student_std` the student's.
    `holdout_top1` is a share, with its standard error over `holdout_images` (none without ground truth).
    """

    folder: str
    id: str
    digest: str
    model: str
    kwargs: Mapping[str, Any]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: int | None
    student_mean: tuple[float, ...]
    student_std: tuple[float, ...]
    epochs: int
    holdout_top1: float
    holdout_top1_se: float
    holdout_images: int
    notes: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)


def read_teacher(folder: Path) -> TeacherInfo:
    """Read the `info.json` of a teacher's folder. Raises InputError."""
    path, what = folder / "info.json", "a teacher of this toolkit"
    data = read_json(path, what)
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        schema = data.get("schema") if isinstance(data, dict) else None
        raise refuse(str(folder), f"schema {schema}", f"schema {SCHEMA}", "delete it")
    try:
        info: TeacherInfo = from_json(TeacherInfo, {**data["info"], "folder": str(folder)})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise refuse(str(path), f"{type(error).__name__}: {error}", what, "delete the folder") from None
    return info


def in_class_order(info: TeacherInfo, classes: Sequence[str]) -> tuple[str, list[int] | None]:
    """Return the digest of a teacher's weights with its classes in another order, and the row of each of them.

    Its own digest and None where they stand in this order, or are others.
    """
    match = match_classes(info.classes, classes)
    if match.in_order or not match.whole:
        return info.digest, None
    state = load_weights(Path(info.folder) / "weights.safetensors", name="teacher")
    source = NetSource(info.model, info.kwargs, state, info.num_classes)
    with torch.random.fork_rng(devices=[]):
        net = build_teacher_net(source, len(classes), match.rows)
    return weights_digest(net.state_dict()), list(match.rows)


class TeacherNet(nn.Module):
    """A net that takes the student's inputs and converts their mean, std and size to its own.

    Raises InputError for another number of channels.
    """

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


def load_teacher(
    info: TeacherInfo, device: str = "cpu", precision: str = "float32", *, stay: bool = False
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Load a teacher as a function: student-normalised [B, 3, S, S] -> logits float32 [B, C].

    Logits go to the CPU, or `stay` on its device; `precision` "bfloat16" or "float16" is autocast. Raises InputError
    for weights that are not those of `info`.
    """
    path = Path(info.folder) / "weights.safetensors"
    state = load_weights(path, name="teacher")
    if weights_digest(state) != info.digest:
        raise refuse("teacher", f"other weights in {path}", info.digest[:12], "delete the folder")
    inner = create_timm_model(info.model, info.kwargs, info.num_classes)
    load_into(inner, state, name="teacher")
    student = (info.student_mean, info.student_std)
    net = TeacherNet(inner, student, (info.mean, info.std), info.input_size)
    place(net, device).eval()

    def logits(inputs: torch.Tensor) -> torch.Tensor:
        kind = getattr(torch, precision)
        autocast = torch.autocast(device.split(":")[0], dtype=kind, enabled=kind != torch.float32)
        with torch.no_grad(), autocast:
            out: torch.Tensor = net(to_device(inputs, device))
        return out.float() if stay else out.float().cpu()

    return logits


def to_device(inputs: torch.Tensor, device: str) -> torch.Tensor:
    """Move inputs to a device, in the memory layout of its nets."""
    return inputs.to(device, memory_format=torch.channels_last, non_blocking=True)
