"""Settings: one dataclass field holds the name, default, range and help of a setting.

The parser, its help and the checks are made from the fields. tyro and jsonargparse do this too;
neither keeps a refusal in one line, nor a default that depends on another setting.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from space.errors import refuse

EFFORTS = ("smoke", "normal", "high")
"""Smoke: the whole job on digits in about a minute and a half on two quiet cores; normal: the README's run, about ten
minutes; high: a night, or a GPU."""


@dataclass(frozen=True)
class SettingSpec:
    """What a field holds of a setting beside its name, type and default.

    `group` opens a heading of the help that the following settings belong to. Numbers lie in [`low`, `high`], or above
    `above`. `parse` reads a text that the type does not: (flag, text) to a value. `want` describes a legal value.
    `default_text` stands for the default in the help; `efforts` are the defaults by effort, in the order of
    `EFFORTS`. A tuple is given by repeating its flag, or with `many` by listing values behind one flag;
    one with `parse` is one text, or with `repeats` a list of texts.
    `const` is the value of the flag alone, `spelling` replaces the flag that follows from the name.
    """

    help: str
    group: str = ""
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    above: float | None = None
    parse: Callable[[str, str], Any] | None = None
    want: str = ""
    default_text: str | None = None
    efforts: tuple[Any, ...] = ()
    many: bool = False
    repeats: bool = False
    const: str | None = None
    spelling: str | None = None


def setting(default: Any, help: str, **more: Any) -> Any:
    """Return a dataclass field that is a setting; `default` may be `dataclasses.MISSING`."""
    spec = SettingSpec(help, **more)
    return dataclasses.field(default=default, metadata={"setting": spec})


def changed_setting(cls: type, name: str, **changes: Any) -> Any:
    """Return the setting of a base dataclass with some of its `SettingSpec`, or its default, changed."""
    field = next(f for f in dataclasses.fields(cls) if f.name == name)
    default = changes.pop("default", field.default)
    spec = dataclasses.replace(field.metadata["setting"], **changes)
    return dataclasses.field(default=default, metadata={"setting": spec})


def parse_share(name: str, text: str | float) -> float:
    """Parse a share: `0.01` or `1%`."""
    shown = str(text).strip()
    try:
        value = float(shown[:-1]) / 100 if shown.endswith("%") else float(shown)
    except ValueError:
        value = math.nan
    if not 0.0 <= value < 1.0:
        raise refuse(name, shown, "a share in [0, 1) such as 0.01 or 1%")
    return value


@dataclass(frozen=True)
class Field:
    """A setting with its name, kind (int, float, str, bool or tuple), default and flag."""

    name: str
    kind: type
    optional: bool
    default: Any
    about: SettingSpec

    @property
    def flag(self) -> str:
        """The command-line spelling: `target_params` -> `--target-params`, True -> `--no-...`."""
        if self.about.spelling is not None:
            return self.about.spelling
        return ("--no-" if self.default is True else "--") + self.name.replace("_", "-")


def settings_of(cls: type) -> Iterator[Field]:
    """Return the settings among the fields of a dataclass, in their order."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if "setting" in field.metadata:
            hint, optional = hints[field.name], False
            if get_origin(hint) in (Union, UnionType):
                (hint,) = (kind for kind in get_args(hint) if kind is not type(None))
                optional = True
            kind = get_origin(hint) or hint
            yield Field(field.name, kind, optional, field.default, field.metadata["setting"])


def add_settings(parser: argparse.ArgumentParser, cls: type) -> None:
    """Add a flag for every setting of a dataclass."""
    group: Any = parser
    for field in settings_of(cls):
        about = field.about
        if about.group:
            group = parser.add_argument_group(about.group)
        options: dict[str, Any] = {"dest": field.name, "help": help_of(field)}
        if field.kind is bool and field.optional:
            options["action"] = argparse.BooleanOptionalAction
        elif field.kind is bool:
            options["action"] = "store_false" if field.default is True else "store_true"
        else:
            options["metavar"] = about.metavar
            if field.kind is tuple and (about.parse is None or about.repeats):
                options |= {"nargs": "+"} if about.many else {"action": "append"}
            elif about.const is not None:
                options |= {"nargs": "?", "const": about.const}
            elif field.kind in (int, float) and about.parse is None:
                options["type"] = field.kind
        group.add_argument(field.flag, **options)


def help_of(field: Field) -> str:
    """Return the help of a flag, with its choices and default."""
    about = field.about
    text, default = about.help, about.default_text
    if about.choices:
        text += f": {', '.join(about.choices[:-1])} or {about.choices[-1]}"
    if default is None and about.efforts:
        default = ", ".join(f"{effort} {value}" for effort, value in zip(EFFORTS, about.efforts, strict=True))
    elif default is None and field.kind is not bool and field.default not in (None, (), dataclasses.MISSING):
        default = str(field.default)
    return (text + (f" (default: {default})" if default else "")).replace("%", "%%")


def parsed(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Read the texts of settings that have a parser of their own. Raises InputError."""
    found = dict(given)
    for field in settings_of(cls):
        value = found.get(field.name)
        if field.about.parse is not None and value is not None:
            found[field.name] = field.about.parse(field.flag, value)
    return found


def as_flags(cls: type, values: Mapping[str, Any], usual: Mapping[str, Any]) -> list[str]:
    """Return the arguments that set what differs from the `usual` value, or else the default: the parser's inverse."""
    found: list[str] = []
    for field in settings_of(cls):
        default = usual.get(field.name, field.default)
        value = values.get(field.name, default)
        if value == default or (field.kind is tuple and tuple(value) == default):
            continue
        if field.kind is bool:
            off = field.optional and not value
            found.append(f"--no-{field.flag[2:]}" if off else field.flag)
        elif field.kind is tuple and field.about.many:
            found += [field.flag, *map(str, value)]
        elif value is not None:
            if field.kind is tuple and field.about.parse is not None:
                value = [",".join(map(str, value))]
            for each in value if field.kind is tuple else [value]:
                text = str(each)
                found += [f"{field.flag}={text}"] if text.startswith("-") else [field.flag, text]
    return found


def check_settings(values: Any) -> None:
    """Refuse a setting of another type, outside its range or choices. Raises InputError."""
    for field in settings_of(type(values)):
        value, about = getattr(values, field.name), field.about
        if value is None and field.optional:
            continue
        legal, want = True, ""
        if about.choices:
            legal, want = value in about.choices, f"one of {', '.join(about.choices)}"
        elif field.kind is bool:
            legal, want = isinstance(value, bool), "true or false"
        elif field.kind is tuple and about.parse is not None:
            legal, want = about.parse(field.flag, value) == value, "a pair of numbers"
        elif field.kind is tuple:
            legal = not isinstance(value, str) and all(isinstance(each, str) for each in value)
            want = "a list"
        elif field.kind in (int, float):
            low, high, above = about.low, about.high, about.above
            low = 0 if low is None and field.kind is int else low
            what = "an integer" if field.kind is int else "a number"
            want = f"{what} above {above:g}" if above is not None else f"{what} >= {low}"
            want = want if high is None else f"{what} from {low} to {high}"
            kinds = int if field.kind is int else (int, float)
            legal = isinstance(value, kinds) and not isinstance(value, bool)
            legal = legal and (field.kind is int or math.isfinite(value))
            legal = legal and value >= (-math.inf if low is None else low) and (above is None or value > above)
            legal = legal and (high is None or value <= high)
        if not legal:
            raise refuse(field.flag, value, about.want or want)
