"""Settings that replace parts of an augmentation, shared by every command that trains or labels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from nas.core.settings import setting, settings_of
from space.errors import refuse

_OFF = ("none", "off")


def _number(name: str, text: str | float) -> float | None:
    """Parse a part's number: `none` is 0, `default` the pipeline's own."""
    shown = str(text).strip().lower()
    if shown == "default":
        return None
    try:
        value = 0.0 if shown in _OFF else float(shown)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise refuse(name, text, "a number, or none for off")
    return value


def _numbers(name: str, text: Any) -> list[float]:
    """Parse one or two numbers: `0.5`, `0.5,1` or a pair."""
    parts = str(text).split(",") if isinstance(text, (str, int, float)) else list(text)
    try:
        found = [float(part) for part in parts]
    except ValueError:
        found = []
    if not (1 <= len(found) <= 2 and all(map(math.isfinite, found))):
        raise refuse(name, text, "LOW,HIGH, such as 0.5,1, or none for off")
    return found


def _crop_scale(name: str, text: Any) -> tuple[float, float] | None:
    """Parse shares of the area: `LOW,HIGH` or `LOW`; `none` is the whole image."""
    shown = str(text).strip().lower()
    if shown == "default":
        return None
    low, *high = [1.0] if shown in _OFF else _numbers(name, text)
    pair = (low, high[0] if high else 1.0)
    if not 0 < pair[0] <= pair[1] <= 1:
        raise refuse(name, text, "shares of the area, 0 < LOW <= HIGH <= 1")
    return pair


def _crop_ratio(name: str, text: Any) -> tuple[float, float] | None:
    """Parse width over height: `LOW,HIGH`, or one number R for 1/R to R; `none` is 1."""
    shown = str(text).strip().lower()
    if shown == "default":
        return None
    low, *high = [1.0] if shown in _OFF else _numbers(name, text)
    if low <= 0 or (high and high[0] < low):
        raise refuse(name, text, "width over height, 0 < LOW <= HIGH")
    return (low, high[0]) if high else (min(low, 1 / low), max(low, 1 / low))


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What replaces parts of a pipeline's augmentation; None keeps the pipeline's own.

    `hflip` and `erase_prob` are probabilities, `crop_scale` shares of the area, `crop_ratio` widths over heights,
    `policy` a timm auto-augment string or "none", `mixup` and `cutmix` the alphas of their beta distributions.
    """

    hflip: float | None = setting(
        None,
        "probability of mirroring; 0 where left and right tell classes apart",
        group="augmentation: replaces the pipeline's own; none switches a part off",
        metavar="PROB",
        parse=_number,
        low=0.0,
        high=1.0,
    )
    crop_scale: tuple[float, float] | None = setting(
        None, "share of the area that a random crop keeps; 1 for all of it", metavar="LOW[,HIGH]", parse=_crop_scale
    )
    crop_ratio: tuple[float, float] | None = setting(
        None, "width over height of a random crop; 1 for none", metavar="LOW,HIGH", parse=_crop_ratio
    )
    policy: str | None = setting(None, "timm's auto-augment, such as rand-m9-mstd0.5-inc1, or none")
    color_jitter: float | None = setting(
        None, "strength of brightness, contrast and saturation", metavar="X", parse=_number, low=0.0, high=1.0
    )
    erase_prob: float | None = setting(
        None, "probability of random erasing", metavar="PROB", parse=_number, low=0.0, high=1.0, spelling="--erase"
    )
    mixup: float | None = setting(None, "alpha of mixup", metavar="ALPHA", parse=_number, low=0.0)
    cutmix: float | None = setting(None, "alpha of CutMix", metavar="ALPHA", parse=_number, low=0.0)

    @classmethod
    def of(cls, config: object) -> AugmentConfig:
        """Take the settings of a command (anything with their names)."""
        return AugmentConfig(**{f.name: getattr(config, f.name) for f in fields(AugmentConfig)})

    @property
    def given(self) -> dict[str, Any]:
        """The settings that replace something, as plain JSON: the keyword arguments of `read_augment`."""
        values = {f.name: getattr(self, f.name) for f in fields(AugmentConfig)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v is not None}

    def changes(self) -> dict[str, Any]:
        """Return the fields of `nas.data.augment.spec.AugmentSpec` that the settings decide, with their values."""
        found: dict[str, Any] = {}
        for name, value in self.given.items():
            if name == "policy":
                off = str(value).lower() in _OFF
                found |= {} if str(value).lower() == "default" else {name: None if off else value}
            elif name == "color_jitter":
                found[name] = float(value) or None
            elif isinstance(value, list):
                found[_FIELD[name]] = tuple(float(each) for each in value)
            else:
                found[_FIELD.get(name, name)] = float(value)
        return found

    def check_stored(self, stored: Mapping[str, Any], store: object) -> None:
        """Refuse settings that contradict the augmentation of stored labels (an `AugmentSpec` as JSON).

        Raises InputError.
        """
        flags = {_FIELD.get(each.name, each.name): each.flag for each in settings_of(AugmentConfig)}
        for name, value in self.changes().items():
            there = stored[name] or None if name == "color_jitter" else stored[name]
            if (list(value) if isinstance(value, tuple) else value) != there:
                remedy = f"drop {flags[name]}, or build labels with it"
                raise refuse(flags[name], _shown(value), f"{_shown(there)}, as the labels in {store} are made", remedy)


_FIELD = {"crop_scale": "scale", "crop_ratio": "ratio", "mixup": "mixup_alpha", "cutmix": "cutmix_alpha"}
"""Names of settings in an `AugmentSpec`, where they differ."""


def _shown(value: Any) -> str:
    """Return a setting's value as its flag takes it."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(_shown, value))
    return "none" if value is None else str(value).removesuffix(".0")


def read_augment(values: Mapping[str, Any]) -> AugmentConfig:
    """Read what `AugmentConfig.given` returned; settings of other names are left out."""
    found: dict[str, Any] = {f.name: values[f.name] for f in fields(AugmentConfig) if f.name in values}
    for name in ("crop_scale", "crop_ratio"):
        if found.get(name) is not None:
            found[name] = tuple(found[name])
    return AugmentConfig(**found)
