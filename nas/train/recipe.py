"""Recipes: every hyperparameter of a full training, with the published ones as presets.

Plain values without torch. A recipe is JSON in `train.json`; `--set` overrides any value.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from nas.core.augment_config import AugmentConfig
from nas.core.io import read_json
from nas.core.settings import check_settings, settings_of
from space.errors import refuse

CHOICES: Mapping[str, tuple[Any, ...]] = {
    "lr_scales": ("all", "peak"),
    "schedule": ("step", "epoch"),
    "bn": ("train", "eval"),
    "augment": ("default", "official", "batched"),
    "distill": ("none", "sparse", "soft", "hard", "token"),
    "kl_reduction": ("batchmean", "numel"),
    "token_loss": ("hard", "soft"),
    "mix_mode": ("batch", "pair", "elem"),
}

_BELOW_ONE = ("label_smoothing", "drop_path", "drop_rate", "beta1", "beta2")
_RATES = ("lr", "min_lr", "warmup_lr", "warmup_epochs", "weight_decay", "eps", "clip_norm")
_SHARES = ("mix_prob", "mix_switch_prob", "distill_alpha", "layer_decay", "ema_decay")
_RANGES = (
    (("epochs", "repeats", "lr_batch"), 1, math.inf),
    (("batch_size",), 2, math.inf),
    (("img_size",), 16, 1024),
    ((*_RATES, "temperature"), 0, math.inf),
    ((*_SHARES, *_BELOW_ONE), 0, 1),
)
"""Names of values, and the least and largest that each may have."""


@dataclass(frozen=True)
class Recipe(AugmentConfig):
    """The hyperparameters of a full training: AdamW, a linear warm-up, then a cosine.

    `lr` is the peak rate for a whole batch of `lr_batch` images (None: of any); with `lr_scales` "all" the two ends of
    the schedule scale with it. `schedule`: rates change with every "step" or "epoch". `layer_decay` gives earlier
    blocks smaller rates. `bn` "eval" leaves batch norms' statistics as they are. `augment` "default" is the data's
    own, "official" that of TinyViT and DeiT, "batched" works on whole batches; what `AugmentConfig` names replaces its
    parts. `repeats` shows an image so many times an epoch, each view another. `ema_decay` averages
    weights. None is off, or the data's own. Raises InputError.
    """

    name: str
    epochs: int
    batch_size: int
    lr: float
    min_lr: float
    warmup_lr: float
    warmup_epochs: float
    weight_decay: float
    lr_batch: int | None = 512
    lr_scales: str = "all"
    schedule: str = "step"
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_norm: float | None = 5.0
    layer_decay: float | None = None
    bn: str = "train"
    drop_path: float = 0.0
    drop_rate: float = 0.0
    label_smoothing: float = 0.1
    img_size: int | None = None
    augment: str = "official"
    mix_prob: float = 1.0
    mix_switch_prob: float = 0.5
    mix_mode: str = "batch"
    repeats: int = 1
    ema_decay: float | None = None
    ema_warmup: bool = False
    distill: str = "none"
    distill_alpha: float = 0.5
    temperature: float = 1.0
    kl_reduction: str = "batchmean"
    token_loss: str = "hard"

    def __post_init__(self) -> None:
        check_settings(self)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise refuse(name, getattr(self, name), f"one of {', '.join(choices)}")
        for names, low, high in _RANGES:
            for name in names:
                value = getattr(self, name)
                if value is not None and not (math.isfinite(value) and low <= value <= high):
                    raise refuse(name, value, f"{low} to {high}" if high < math.inf else f"a finite number >= {low}")
        for name in _BELOW_ONE:
            if getattr(self, name) == 1:
                raise refuse(name, 1, "a share below 1")
        for name in ("clip_norm", "temperature"):
            if getattr(self, name) == 0:
                raise refuse(name, 0, "a number > 0" + (", or none for off" if name == "clip_norm" else ""))
        if self.warmup_epochs > self.epochs:
            raise refuse("warmup_epochs", self.warmup_epochs, f"at most the {self.epochs} epochs")

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed with each other."""
        return self.mix_prob > 0 and bool(self.mixup or self.cutmix)

    def rates(self) -> tuple[float, float, float]:
        """Return the peak, least and first rate for this batch size."""
        scale = 1.0 if self.lr_batch is None else self.batch_size / self.lr_batch
        ends = scale if self.lr_scales == "all" else 1.0
        return self.lr * scale, self.min_lr * ends, self.warmup_lr * ends

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON, the inverse of `read_recipe`."""
        return asdict(self)


# Name, epochs, whole batch, peak, least and first rate, warm-up epochs, weight decay.
_TINYVIT = Recipe("tinyvit-1k", 300, 1024, 5e-4, 5e-6, 5e-7, 20, 0.05, mixup=0.8, cutmix=1.0)
_LARGER = Recipe("tinyvit-384", 30, 1024, 2e-5, 2e-7, 2e-8, 5, 1e-8, bn="eval", drop_path=0.1, img_size=384)
_DEIT = Recipe("deit", 300, 1024, 5e-4, 1e-5, 1e-6, 5, 0.05, lr_scales="peak", schedule="epoch", clip_norm=None)
_DEIT = replace(_DEIT, drop_path=0.1, mixup=0.8, cutmix=1.0, repeats=3, ema_decay=0.99996)
PRESETS: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("small", 30, 32, 1e-3, 1e-5, 1e-5, 1, 0.05, lr_batch=None, augment="default"),
        Recipe("tinyvit-22k-distill", 90, 4096, 2.5e-4, 5e-6, 5e-7, 5, 0.01, distill="sparse"),
        Recipe("tinyvit-22k-1k", 30, 1024, 2.5e-4, 1e-5, 5e-7, 5, 1e-8, layer_decay=0.8, bn="eval"),
        _TINYVIT,
        _LARGER,
        replace(_LARGER, name="tinyvit-512", img_size=512),
        _DEIT,
        replace(_DEIT, name="deit-token", distill="token"),
        replace(
            _DEIT, name="deit-384", img_size=384, epochs=30, batch_size=512, lr=5e-6, min_lr=5e-6, weight_decay=1e-8
        ),
    )
}
"""`small` is this toolkit's own, for small data sets. The others have the values of the authors' configurations:
TinyViT's yaml files over its config.py, DeiT's main.py and README."""

_DROP_PATH: Mapping[str, tuple[float, float, float]] = {
    "tinyvit-22k-distill": (0.0, 0.0, 0.1),
    "tinyvit-22k-1k": (0.0, 0.0, 0.1),
    "tinyvit-1k": (0.0, 0.1, 0.2),
}
"""Published for 5M, 11M and 21M parameters; a net takes the value of the nearest size."""
WARMUP_SHARE = 0.2
PIPELINE = {each.name: each for each in settings_of(AugmentConfig)}
"""Values that replace the augmentation's own: None, or "default", keeps it; "none" is off."""
_SIZES = (5_392_764, 10_996_972, 21_198_568)


def find_recipe(name: str, params: int, overrides: Sequence[str] = ()) -> Recipe:
    """Return a preset or a JSON file's recipe for a net of `params` parameters, with overrides.

    `overrides` are "key=value". Where they change the epochs and not the warm-up, it is a fifth of them at most.
    Raises InputError, naming the nearest key for a misspelt one.
    """
    if name in PRESETS:
        recipe = PRESETS[name]
        if name in _DROP_PATH:
            near = min(range(3), key=lambda i: abs(math.log(_SIZES[i] / params)))
            recipe = replace(recipe, drop_path=_DROP_PATH[name][near])
    elif name.endswith(".json") or Path(name).is_file():
        read = read_json(Path(name), "a recipe")
        if isinstance(read, dict):  # a recipe, or the train.json of a training
            inner = read.get("config", read)
            read = inner.get("recipe", inner) if isinstance(inner, dict) else inner
        recipe = read_recipe(read)
    else:
        raise refuse("--recipe", name, f"one of {', '.join(PRESETS)}, or a JSON file", _hint(name, PRESETS))
    changes: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise refuse("--set", text, "key=value, such as --set weight_decay=0.1")
        changes[_known(key.strip().replace("-", "_"))] = value.strip()
    if "epochs" in changes and "warmup_epochs" not in changes:
        epochs = _typed("epochs", changes["epochs"])
        if epochs != recipe.epochs:  # a shorter training warms up for a fifth of it at most
            changes["warmup_epochs"] = min(recipe.warmup_epochs, round(WARMUP_SHARE * epochs, 3))
    return changed(recipe, changes)


def read_recipe(value: Any) -> Recipe:
    """Read plain JSON; raises InputError for unknown, missing or ill-typed fields."""
    if not isinstance(value, dict):
        raise refuse("--recipe", value, "an object of a recipe's values")
    for key in value:
        _known(str(key))
    known = {f.name: f for f in fields(Recipe)}
    missing = [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in value]
    if missing:
        raise refuse("--recipe", f"no {', '.join(missing)}", "all values without a default")
    return Recipe(**{k: _typed(k, v) for k, v in value.items()})


def changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Return a recipe with other values, given as text or as values. Raises InputError."""
    return replace(recipe, **{key: _typed(key, value) for key, value in changes.items()})


def _hint(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), 1)
    return f"did you mean {close[0]}?" if close else ""


def _known(key: str) -> str:
    names = [f.name for f in fields(Recipe)]
    if key not in names:
        raise refuse("recipe", f"the value {key!r}", f"one of {', '.join(names)}", _hint(key, names))
    return key


def _typed(key: str, value: Any) -> Any:
    """Return a value as its field's type; "none" means off where a field allows it."""
    kind = next(str(f.type) for f in fields(Recipe) if f.name == key)
    if key in PIPELINE:
        if isinstance(value, str) and value.lower() == "default":
            return None
        parse = PIPELINE[key].about.parse
        return value if parse is None or value is None else parse(key, value)
    none = value is None or (isinstance(value, str) and value.lower() in ("none", "off"))
    if none and "None" in kind:
        return None
    try:
        if kind == "str" and isinstance(value, str):
            return value
        if kind == "bool":
            return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]
        if isinstance(value, bool):
            raise ValueError
        if kind.startswith("int"):
            number = float(value)
            if number != int(number):
                raise ValueError
            return int(number)
        if kind.startswith("float"):
            return float(value)
    except (KeyError, TypeError, ValueError, OverflowError):
        pass
    words = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "a word"}
    want = words[kind.split(" ")[0]] + (", or none" if "None" in kind else "")
    raise refuse(key, value, want)
