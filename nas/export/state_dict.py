"""State dicts out of weights files, whatever program wrote them; no code of a file is ever run."""

from __future__ import annotations

import argparse
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nas.core.class_names import names_in
from nas.export.weights import State, load_weights, unreadable
from space.errors import refuse

_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict")
_WRAPPERS = (*_AVERAGED, "state_dict", "model", "model_state_dict", "model_state", "net", "module")
_DEEPEST = 3
"""Wrappers inside one another."""
_PREFIXES = ("module.", "_orig_mod.", "model.", "timm_model.")
_DERIVED = ("attention_bias_idxs", "n_averaged", "total_ops", "total_params")
"""What some programs save beside the weights, and timm's models compute or do not have."""
_BESIDE = ("ema.", "model_ema.", "ema_model.", "criterion.", "loss_fn.", "loss.")
"""Modules of a training that hold its net as `model.` beside them."""

_MICROSOFT = "patch_embed.seq.0.c.weight"
_RENAMED = (
    (r"^patch_embed\.seq\.0\.", "patch_embed.conv1."),
    (r"^patch_embed\.seq\.2\.", "patch_embed.conv2."),
    (r"^layers\.(\d+)\.downsample\.", lambda found: f"stages.{int(found[1]) + 1}.downsample."),
    (r"^layers\.", "stages."),
    (r"^norm_head\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
    (r"\.c\.weight$", ".conv.weight"),
)
"""TinyViT's authors' names (github.com/microsoft/Cream) into timm's, where a stage begins with its downsampling."""


@dataclass(frozen=True, eq=False)
class LoadedState:
    """A state dict in timm's names; what a training program wrote beside it.

    `model` is the timm model that it names, "" for none, `args` its settings, `classes` the names of its classes, if it
    has any; `notes` are decisions to tell the user. Tensors are mapped: a file is read where they are used.
    """

    state: State
    model: str = ""
    args: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None

    def preprocessing(self, model: str = "") -> dict[str, Any]:
        """Return the preprocessing that the program names, over that of its timm model (or of `model`)."""
        import timm

        known = self.model or model
        found: Any = timm.get_pretrained_cfg(known, allow_unregistered=True) if known else None
        seen = {"input_size": (3, 224, 224), **(found.to_dict() if found is not None else {})}
        seen |= {name: self.args[name] for name in ("mean", "std", "crop_pct", "interpolation") if self.args.get(name)}
        sizes = (self.args.get("img_size"), self.model_args.get("img_size"), self.args.get("input_size"))
        size = next(filter(None, (*sizes, seen["input_size"])))
        size = size[-1] if isinstance(size, (list, tuple)) else size
        channels = self.args.get("in_chans") or 3
        if type(size) is not int or type(channels) is not int:
            raise refuse("weights", f"a checkpoint made for {size!r} pixels and {channels!r} channels", "whole numbers")
        return {**seen, "input_size": (channels, size, size)}

    @property
    def model_args(self) -> Mapping[str, Any]:
        """The arguments that the program gave to the timm model."""
        found = self.args.get("model_kwargs")
        return found if isinstance(found, Mapping) else {}


class _PlainDict:
    """Stands in for mappings of other libraries: reads as an ordinary dictionary."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


class _Ignored:
    """Stands in for values that no network needs."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


_DICTS = (
    *("yacs.config.CfgNode", "config.CfgNode", "easydict.EasyDict", "addict.addict.Dict"),
    *(f"{at}.utilities.parsing.AttributeDict" for at in ("pytorch_lightning", "lightning.pytorch")),
    *(f"{at}.utilities.data.AttributeDict" for at in ("lightning_fabric", "lightning.fabric")),
)
_OF_ARRAYS = ("scalar", "_reconstruct")
_STAND_INS: tuple[Any, ...] = (
    *(argparse.Namespace, (argparse.Namespace, "types.SimpleNamespace")),
    *((_PlainDict, name) for name in _DICTS),
    *((_Ignored, f"{at}.multiarray.{kind}") for at in ("numpy.core", "numpy._core") for kind in _OF_ARRAYS),
    *((_Ignored, f"pathlib{at}.{kind}") for at in ("", "._local") for kind in ("PosixPath", "WindowsPath", "Path")),
    *((_Ignored, name) for name in ("numpy.dtype", "numpy.ndarray", "datetime.datetime", "datetime.timedelta")),
)
"""What training programs save beside their weights; anything else in a pickle is refused."""


def load_state(path: Path, flag: str) -> LoadedState:
    """Load a weights file: safetensors, or a pickle with tensors and plain settings. Raises InputError about `flag`."""
    suffix = path.suffix.lower()
    content = load_weights(path, name=flag) if suffix == ".safetensors" else _load_pickle(path, flag)
    state, notes = _state_dict(content, flag, path)
    if _MICROSOFT in state:
        state = {_renamed(key): value for key, value in state.items()}
        notes = (*notes, f"{path.name}: the TinyViT authors' names of weights, read as timm's")
    found = content if isinstance(content, Mapping) else {}
    args = found.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    args = args if isinstance(args, Mapping) else {}
    model = found.get("arch") if isinstance(found.get("arch"), str) else args.get("model")
    # A hub's name or a tag may stand around it: timm/tiny_vit_5m_224.dist_in22k.
    model = str(model or "").rpartition("/")[-1].split(".")[0]
    return LoadedState(state, model, args, notes, names_in(found, str(path), flag))


def _load_pickle(path: Path, flag: str) -> object:
    from pickle import UnpicklingError  # the exception alone: torch.load raises it

    import torch

    try:
        with torch.serialization.safe_globals(list(_STAND_INS)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is refused is refused in one line
            try:
                return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                return torch.load(path, map_location="cpu", weights_only=True)  # saved before torch 1.6
    except UnpicklingError as error:
        want = "tensors only (objects in pickles can run code)"
        remedy = "save model.state_dict() alone, best as .safetensors"
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise refuse(flag, f"{path} with a {named[1]}" if named else path, want, remedy) from error
    except Exception as error:  # a damaged pickle raises almost anything
        if "TorchScript" in str(error):
            want, remedy = "the weights of a network", "save model.state_dict()"
            raise refuse(flag, f"{path}, a TorchScript program", want, remedy) from error
        raise unreadable(flag, path, error) from error


def _state_dict(content: object, flag: str, path: Path) -> tuple[State, tuple[str, ...]]:
    """Unwrap a loaded checkpoint to its state dict, without the prefixes that wrappers leave."""
    import torch

    notes: tuple[str, ...] = ()
    for _ in range(_DEEPEST):
        inside = content if isinstance(content, Mapping) else {}
        found = [name for name in _WRAPPERS if isinstance(inside.get(name), Mapping) and inside[name]]
        if not found:
            break
        if len(found) > 1:
            kind = "averaged weights" if found[0] in _AVERAGED else "weights"
            notes = (*notes, f"{path.name}: its {kind} ({found[0]}) are taken, not its {found[1]}")
        content = inside[found[0]]
    is_state = isinstance(content, Mapping) and all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items()
    )
    if not is_state or not content:
        raise refuse(flag, path, 'a state dict, or one under "state_dict" or "model"', "save model.state_dict()")
    assert isinstance(content, Mapping)
    state: State = {key: value for key, value in content.items() if not key.endswith(_DERIVED)}
    beside = {key for key in state if key.startswith(_BESIDE)}
    if beside and all(key.startswith("model.") for key in state.keys() - beside):
        notes = (*notes, f"{path.name}: {len(beside)} tensors beside its model. are left out ({min(beside)}, ...)")
        state = {key: value for key, value in state.items() if key not in beside}
    for prefix in (*_PREFIXES, *_PREFIXES):  # one around another, as of a compiled net in DDP
        if state and all(key.startswith(prefix) for key in state):
            state = {key[len(prefix) :]: value for key, value in state.items()}
    return state, notes


def _renamed(key: str) -> str:
    for pattern, name in _RENAMED:
        key = re.sub(pattern, name, key)
    return key
