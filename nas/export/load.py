"""The one loader of networks: timm names, checkpoints, hub folders, and models that a run saved.

`load_checkpoint` returns the weights that a user names, `find_teacher_net` the net and weights of a
teacher, `load_saved_model` a model of a run or a training. torch is imported inside functions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.core.io import check_sha256, read_json, read_object
from space import Context, get_family
from space.errors import InputError, refuse
from space.family import Arch, Family

if TYPE_CHECKING:
    from torch import nn

    from nas.export.weights import State

AUTO_MODEL = "resnet10t"
AUTO_KWARGS: Mapping[str, Any] = {"channels": (32, 64, 128, 256), "stem_width": 16}
"""The `auto` teacher: timm's smallest residual net at half width, 1.27M parameters at 100 classes.
Convolutions learn small image sets quickly, which is all that is asked of it."""

_WANT_TEACHER = (
    "auto, a timm model, MODEL:FILE such as resnet18:weights.safetensors, or a folder in timm's "
    "hub layout (config.json and model.safetensors)"
)
_PICKLED = (".pt", ".pth", ".bin", ".tar", ".ckpt")
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "model.")
_IN_FOLDER = ("model.safetensors", "best.safetensors", "weights.safetensors")

SAVED = {
    **{"family": str, "arch": dict, "img_size": int, "num_classes": int},
    **{"timm": dict, "classes": list, "sha256": str},
}
"""The JSON of a saved model: required names and their types."""
PREPROCESSING = ("crop_pct", "interpolation", "mean", "std")
"""The preprocessing that is read from the JSON of a saved model."""


# Weights of a checkpoint or a timm model


def load_checkpoint(where: str, *, name: str = "--seed-weights") -> State:
    """Load the weights that a user names: a file, a folder with one, or a timm tag.

    Files are .safetensors, or .pt/.pth with tensors only. A pickle may wrap its state dict under
    "state_dict" or "model" (EMA first); prefixes that wrappers leave ("module.") are taken off. A
    timm tag is fetched through timm. Raises InputError under `name` for what is unknown, damaged
    or unreachable.
    """
    path = Path(where).expanduser()
    if path.is_dir():
        found = next((path / n for n in _IN_FOLDER if (path / n).is_file()), None)
        if found is None:
            raise refuse(name, where, "a folder with model.safetensors", "name the file itself")
        path = found
    if path.is_file():
        if path.suffix == ".safetensors":
            from nas.export.weights import load_weights

            return _state_dict(load_weights(path, name=name), name, where)
        if path.suffix in _PICKLED:
            return _state_dict(_load_pickle(path, name), name, where)
        want = f"a checkpoint ending in .safetensors, {', '.join(_PICKLED)}"
        raise refuse(name, where, want, "convert it with safetensors.torch.save_file")
    if path.suffix in (".safetensors", *_PICKLED) or len(path.parts) > 1:
        raise refuse(name, where, "an existing file or a timm tag", "check the path")
    return dict(load_timm_model(where, name=name).state_dict())


def load_timm_model(tag: str, *, name: str) -> nn.Module:
    """Load a timm model with its pretrained weights; an unknown or unreachable one is refused."""
    import timm

    if not timm.is_model(tag.split(".")[0]):
        close = timm.list_models(f"*{tag.split('_')[0].split('.')[0]}*")[:4]
        hint = f"for example {', '.join(close)}" if close else "see timm.list_models()"
        raise refuse(name, tag, "a file, or a model that timm knows", hint)
    try:
        model: nn.Module = timm.create_model(tag, pretrained=True)
    except Exception as error:  # hubs raise their own kinds; every one means "not to be had"
        got = f"{tag} ({type(error).__name__}: {str(error)[:80]})"
        want = "a timm model whose pretrained weights can be fetched"
        remedy = "check the tag and the network, or name a downloaded file"
        raise refuse(name, got, want, remedy) from error
    return model


def _load_pickle(path: Path, name: str) -> object:
    from pickle import UnpicklingError  # the exception alone: torch.load raises it

    import torch

    from nas.export.weights import unreadable

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        want = "tensors only (objects in pickles can run code)"
        remedy = "save model.state_dict() alone, best as .safetensors"
        raise refuse(name, path, want, remedy) from error
    except Exception as error:  # a damaged pickle raises almost anything
        raise unreadable(name, path, error) from error


def _state_dict(content: object, name: str, where: str) -> State:
    """Unwrap a loaded checkpoint to its state dict. Raises InputError."""
    import torch

    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    is_state = isinstance(content, Mapping) and all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items()
    )
    if not is_state or not content:
        want = 'a state dict, or one under "state_dict" or "model"'
        raise refuse(name, where, want, "save model.state_dict()")
    assert isinstance(content, Mapping)
    state: State = dict(content)
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key[len(prefix) :]: value for key, value in state.items()}
    return state


# The net of a teacher


@dataclass(frozen=True)
class TeacherSpec:
    """A teacher that a user names.

    `kind` is "auto", "timm" (pretrained, `model` a timm name or tag) or "file" (`model` a timm
    name, or "" to read it from the hub folder `path`).
    """

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
    """Parse `--teacher`, with timm for its names alone. Raises InputError."""
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
    remedy = "see timm.list_models(pretrained=True)"
    if Path(text).expanduser().exists():
        remedy = "say which timm model it is: MODEL:FILE"
    raise refuse("--teacher", text, _WANT_TEACHER, remedy)


@dataclass(frozen=True, eq=False)
class NetSource:
    """A net to make a teacher of: its timm call, weights (None: fresh) and input.

    `num_classes` counts the classes of `state`; `input_size` None means the student's size.
    """

    model: str
    kwargs: Mapping[str, Any]
    state: State | None
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: int | None
    notes: tuple[str, ...] = ()


def find_teacher_net(spec: TeacherSpec, num_classes: int, mean: tuple[float, ...], std: tuple[float, ...]) -> NetSource:
    """Load what a specification names; `mean`, `std` and `num_classes` are the data's.

    A pretrained timm model sees images at the size it was trained at. A MODEL:FILE checkpoint sees
    the data's size unless the model takes only one, and normalises as timm's model does. Raises
    InputError.
    """
    import timm

    if spec.kind == "auto":
        return NetSource(spec.model, AUTO_KWARGS, None, num_classes, mean, std, None)
    if spec.kind == "timm":
        model = load_timm_model(spec.model, name="--teacher")
        config: Mapping[str, Any] = dict(getattr(model, "pretrained_cfg", {}) or {})
        state = dict(model.state_dict())
        classes = int(getattr(model, "num_classes", num_classes))
        return _net_source(spec.model, {}, state, classes, config, always_resize=True)
    assert spec.path is not None
    if not spec.model:
        return _from_hub_folder(spec.path)
    state = load_checkpoint(spec.path, name="--teacher")
    classes = _count_classes(spec, state)
    found: Any = timm.get_pretrained_cfg(spec.model, allow_unregistered=True)
    config = dict(found.to_dict()) if found is not None else {}
    return _net_source(spec.model, {}, state, classes, config, always_resize=False)


def _from_hub_folder(folder: str) -> NetSource:
    """Load timm's hub layout, which `timm.models.save_for_hf` writes."""
    path = Path(folder).expanduser() / "config.json"
    what = "timm's config.json of a model"
    config = read_json(path, what)
    name = config.get("architecture") if isinstance(config, dict) else None
    if not isinstance(name, str):
        want = "a config.json naming an architecture"
        raise refuse("--teacher", path.parent, want, "see timm's hub")
    state = load_checkpoint(folder, name="--teacher")
    try:
        preprocess = {**config, **(config.get("pretrained_cfg") or {})}
        classes = int(preprocess.get("num_classes", 0)) or 1
        # The data may have other classes: `build_teacher_net` sets their number.
        given = config.get("model_args") or {}
        kwargs = {k: v for k, v in given.items() if k != "num_classes"}
        source = _net_source(name, kwargs, state, classes, preprocess, always_resize=True)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        got = f"{path} ({type(error).__name__}: {error})"
        raise refuse("--teacher", got, what, "see timm's hub") from None
    build_teacher_net(source, classes)
    return source


def _net_source(
    model: str, kwargs: Mapping[str, Any], state: State, classes: int, config: Mapping[str, Any], *, always_resize: bool
) -> NetSource:
    size = config.get("input_size")
    fixed = bool(config.get("fixed_input_size"))
    side = int(size[-1]) if size and (always_resize or fixed) else None
    mean = tuple(float(v) for v in config.get("mean", (0.485, 0.456, 0.406)))
    std = tuple(float(v) for v in config.get("std", (0.229, 0.224, 0.225)))
    return NetSource(model, kwargs, state, classes, mean, std, side)


def _count_classes(spec: TeacherSpec, state: State) -> int:
    """Return the class count with which a model takes a checkpoint. Raises InputError."""
    model = create_timm_model(spec.model, {}, 2)
    wider = create_timm_model(spec.model, {}, 3).state_dict()
    for key, tensor in model.state_dict().items():
        if tensor.shape != wider[key].shape and key in state and state[key].ndim == tensor.ndim:
            return max(1, int(state[key].shape[0]))
    raise refuse("--teacher", spec.name, f"weights of timm's {spec.model}", "name its own model")


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


def build_teacher_net(source: NetSource, num_classes: int) -> nn.Module:
    """Build a net for `num_classes` with the source's weights; another head starts fresh.

    Raises InputError.
    """
    from nas.export.weights import load_into

    net = create_timm_model(source.model, source.kwargs, num_classes)
    if source.state is None:
        return net
    state = source.state
    if source.num_classes != num_classes:
        shapes = create_timm_model(source.model, source.kwargs, source.num_classes).state_dict()
        state = {k: state[k] if k in state and shapes[k].shape == v.shape else v for k, v in net.state_dict().items()}
    load_into(net, state, name="--teacher")
    return net


# A model that a run or a training saved


@dataclass(frozen=True)
class SavedModel:
    """A model of a run or a training: its JSON (`record`), its weights, and the run's settings.

    `run` is the `run.json` (or `train.json`) of its folder, empty if there is none.
    """

    path: Path
    weights: Path
    record: Mapping[str, Any]
    family: Family
    arch: Arch
    context: Context
    run: Mapping[str, Any]

    @property
    def classes(self) -> list[str]:
        """The names of the classes."""
        return [str(name) for name in self.record["classes"]]

    @property
    def timm_call(self) -> tuple[str, dict[str, Any]]:
        """The name and arguments of the timm call: from the arch, whatever the file says."""
        return self.family.timm_call(self.arch, self.context)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The input's size and the preprocessing of an image."""
        overlay = self.record["timm"]["kwargs"]["pretrained_cfg_overlay"]
        size = self.context.img_size
        return {"input_size": [self.context.in_chans, size, size], **{name: overlay[name] for name in PREPROCESSING}}

    def build(self) -> nn.Module:
        """Build the network in plain timm, with its weights, in eval mode. Raises InputError."""
        import timm
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        name, kwargs = self.timm_call
        overlay = {**self.preprocessing, "num_classes": self.context.num_classes}
        model = timm.create_model(name, pretrained_cfg_overlay=overlay, **kwargs)
        assert isinstance(model, torch.nn.Module)
        try:
            model.load_state_dict(load_file(self.weights), strict=True)
        except (RuntimeError, OSError, ValueError, SafetensorError) as error:
            what = " ".join(str(error).split())[:160]
            raise refuse(str(self.weights), what, f"the weights of {self.path.name}") from None
        return model.train().eval()  # drops what eval mode may have cached


def load_saved_model(source: Path) -> SavedModel:
    """Find and check the model of a run's folder, of a JSON in it, or of the weights beside one.

    Raises InputError for what is missing, of another format, or damaged.
    """
    path = source
    if source.is_dir():
        path = source / "best.json"
        if not path.is_file():
            remedy = "name a model of its models/ instead"
            if (source / "run.json").is_file():
                remedy = f"finish it (python -m nas.contract --resume {source}), or {remedy}"
            raise refuse(str(source), "no best.json in it", "the folder of a finished run", remedy)
    elif source.suffix == ".safetensors":
        path = source.with_suffix(".json")
    record = read_object(path, "a model's JSON, such as a run's best.json", SAVED)
    try:
        family = get_family(str(record["family"]))
        arch = family.arch(record["arch"])
        try:
            overlay = record["timm"]["kwargs"]["pretrained_cfg_overlay"]
            channels = overlay["input_size"][0]
        except (KeyError, TypeError, IndexError):
            raise refuse("timm", "no input size", "what a run writes there") from None
        context = Context(record["img_size"], record["num_classes"], channels)
        family.check(arch, context)
        _check_classes_and_preprocessing(record["classes"], overlay, context)
        weights = path.with_suffix(".safetensors")
        check_sha256(weights, record["sha256"])
        return SavedModel(path, weights, record, family, arch, context, _run_settings(path))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _check_classes_and_preprocessing(classes: Any, overlay: Any, context: Context) -> None:
    if not isinstance(classes, list) or len(classes) != context.num_classes:
        raise refuse("classes", classes, f"a list of {context.num_classes} names")
    for name, count in {"mean": context.in_chans, "std": context.in_chans, "crop_pct": 0}.items():
        value = overlay.get(name)
        values = value if count and isinstance(value, list) else [value]
        real = all(type(v) in (int, float) and math.isfinite(v) for v in values)
        if not real or (count and len(values) != count):
            raise refuse(name, value, f"{count} numbers" if count else "a number")
    if overlay.get("interpolation") not in ("bicubic", "bilinear", "nearest"):
        raise refuse("interpolation", overlay.get("interpolation"), "bicubic, bilinear or nearest")


def _run_settings(path: Path) -> Mapping[str, Any]:
    """Read the settings of the run or training that a model belongs to; empty without."""
    for folder in (path.parent, path.parent.parent):
        for name in ("run.json", "train.json"):
            if (folder / name).is_file():
                data = read_json(folder / name, f"the {name} of a run")
                return data if isinstance(data, dict) else {}
    return {}
