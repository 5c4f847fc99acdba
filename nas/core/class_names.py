"""Names of classes: which ones data may have, and how files beside weights write them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nas.core.io import read_json
from space.errors import refuse

KEYS = ("label_names", "classes", "class_names", "id2label", "idx_to_class", "label2id", "class_to_idx")
"""Under which configurations and checkpoints keep them: a list, names by number or numbers by name."""
FILES = (
    *("config.json", "class_map.txt"),
    *(f"{name}.{kind}" for name in ("label_names", "class_names", "classes", "labels") for kind in ("txt", "json")),
    *("id2label.json", "idx_to_class.json", "class_to_idx.json", "class_indices.json"),
)
"""Files in the folder of weights that may name its classes; the first that does counts."""
_WANT = "a name for each class: a list, or numbers from 0 on, each once"


def check_class_names(names: Sequence[str], data: str) -> None:
    """Refuse names that a line of text cannot hold, or that two classes share. Raises InputError."""
    seen: dict[str, int] = {}
    for at, name in enumerate(names):
        odd = [c for c in name if unicodedata.category(c) in ("Cc", "Zl", "Zp")]
        if odd or not name or name != name.strip() or name.startswith("\ufeff"):
            got = f"{data} with class {at} {name!r}"
            want = "names on one line, without tabs, line ends or blanks around them"
            raise refuse("--data", got, want, "rename the class")
        first = seen.setdefault(unicodedata.normalize("NFC", name), at)
        if first != at:
            got = f"{data} with classes {first} and {at} both called {name!r}"
            raise refuse("--data", got, "a name for each class", "rename one of them")


def names_beside(file: Path, flag: str) -> tuple[str, ...] | None:
    """Read the class names of a weights file: out of the JSON of its name, or of the first of `FILES` beside it.

    None where none of them names classes. Raises InputError about `flag` for names that cannot be.
    """
    for path in (file.with_suffix(".json"), *map(file.with_name, FILES)):
        found = _read(path, flag) if path.is_file() and path != file else None
        if found is not None:
            return found
    return None


def _read(path: Path, flag: str) -> tuple[str, ...] | None:
    if path.suffix == ".json":
        value = read_json(path, "class names, or a model's JSON")
        named = names_in(value, str(path), flag)
        if named is not None:
            return named
        if isinstance(value, dict) and len(value) == 1 and isinstance(next(iter(value.values())), (list, dict)):
            (value,) = value.values()
        if _is_table(value) or path.name in FILES[1:]:  # what else could the file be
            return _names(value, str(path), flag)
        return None
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().split("\n")]
    except (OSError, ValueError) as error:
        raise refuse(flag, f"{path} ({error})", "class names in UTF-8, one a line") from None
    numbered = [re.fullmatch(r"(\d+)[\s:,]+(.+)", line) for line in lines]
    if path.name != "class_map.txt" and {int(m[1]) for m in numbered if m} == set(range(len(lines))):
        return _names({m[1]: m[2] for m in numbered if m}, str(path), flag)
    if lines == [""]:
        return None
    if "" in lines:
        raise refuse(flag, f"{path} with line {lines.index('') + 1} empty", "class names, one a line")
    return tuple(lines)


def names_in(value: object, where: str, flag: str) -> tuple[str, ...] | None:
    """Find the class names in a configuration or checkpoint, there or in its `pretrained_cfg`; None without.

    transformers' LABEL_0, LABEL_1, ... are no names. Raises InputError about `flag` for names that cannot be.
    """
    if not isinstance(value, Mapping):
        return None
    inner = value.get("pretrained_cfg")
    for at in (value, inner if isinstance(inner, Mapping) else {}):
        for key in KEYS:
            if isinstance(at.get(key), (list, tuple, Mapping)) and len(at[key]):
                return _names(at[key], f"{where}: {key}", flag)
    return None


def _is_table(value: object) -> bool:
    """Return whether JSON is a list of names, names by number or numbers by name, and nothing else."""
    if isinstance(value, list):
        return len(value) > 1
    if not isinstance(value, dict) or len(value) < 2:
        return False
    numbers = value.values() if _by_name(value) else value
    return {str(number) for number in numbers} == set(map(str, range(len(value))))


def _by_name(value: Mapping[Any, Any]) -> bool:
    """Return whether a mapping holds numbers by name, such as class_to_idx."""
    return all(type(number) is int for number in value.values())


def _names(value: Any, where: str, flag: str) -> tuple[str, ...] | None:
    """Return names in the order of their numbers. Raises InputError."""
    if not isinstance(value, (list, tuple, Mapping)):
        raise refuse(flag, where, _WANT)
    if isinstance(value, Mapping):
        pairs = ((n, name) for name, n in value.items()) if _by_name(value) else value.items()
        by_number = {str(number): name for number, name in pairs}
        if len(by_number) != len(value) or by_number.keys() != set(map(str, range(len(value)))):
            raise refuse(flag, where, _WANT, "number the classes from 0")
        value = [by_number[str(number)] for number in range(len(value))]
    # Keras gives each class its WordNet id and a word.
    found = [one[0] if isinstance(one, (list, tuple)) and one else one for one in value]
    if not all(isinstance(name, str) or type(name) is int for name in found):
        raise refuse(flag, where, _WANT)
    names = tuple(map(str, found))
    return None if names == tuple(f"LABEL_{at}" for at in range(len(names))) else names
