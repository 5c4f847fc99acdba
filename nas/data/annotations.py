"""Classes of images from a CSV file: file, class and perhaps split, as people name these columns."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas.data.decode import shown_name, suffixes
from nas.data.roles import word_role
from nas.data.tree import Tree, counted, joined, plain_name
from space.errors import refuse

FILE_NAMES = (
    *("filename", "filepath", "file", "path", "imagepath", "imagefile", "imagename", "image", "img", "imgpath"),
    *("imageid", "imgid", "fname", "id", "name"),
)
CLASS_NAMES = (
    *("class", "classname", "label", "labelname", "category", "categoryname", "target", "species", "y"),
    *("classid", "labelid", "labels", "diagnosis", "breed", "tag", "predictionstring"),
)
SPLIT_NAMES = ("split", "set", "subset", "fold", "partition", "phase", "dataset", "usage")
_FLAG = "--annotations"
_ONES, _ZEROS = {"1", "1.0", "true", "yes"}, {"0", "0.0", "false", "no", ""}
_NUMBERS = re.compile(r"\s*[-+]?\d[-+.\de]*(\s+[-+]?\d[-+.\de]*)+\s*")
"""Several numbers, such as the boxes of Kaggle's PredictionString."""
_WANT = "a CSV file with a header line: file, class and perhaps split"


@dataclass(frozen=True)
class Annotations:
    """Images by path in their tree, each with its class and its role (None: its folder's); lines for the user."""

    rows: dict[str, tuple[str, str | None]]
    notes: tuple[str, ...]

    @property
    def with_splits(self) -> bool:
        """Whether the file gives the splits too."""
        return any(role is not None for _, role in self.rows.values())


def open_annotations(given: str, root: Path) -> tuple[Path, Any]:
    """Read the table of annotations of a folder, with its path; nothing else of the folder. Raises InputError."""
    path = Path(os.path.expanduser(given))
    if not path.is_file():
        path = root / path
    table = _read(path, given)
    if not _headless(table):
        _columns(table.copy(), given)
    return path, table


def read_annotations(given: str, tree: Tree, most_missing: float) -> Annotations:
    """Read the classes of a tree's images.

    Files are named relative to the tree, to the CSV file or to any one folder, with or without their ending. Of names
    that are not there, and of images of two classes, a share of `most_missing` is tolerated: they are left out, and
    named. Raises InputError.
    """
    path, table = open_annotations(given, tree.root)
    finder = _Finder(tree, path)
    if _headless(table) and finder.knows(str(table.columns[0])):
        table = _read(path, given, ("file", "class", "split")[: len(table.columns)])
    file, label, split = _columns(table, given)
    names = [plain_name(text.strip().replace("\\", "/")) for text in table[file]]
    labels = [plain_name(text.strip()) for text in table[label]]
    roles = [None if split is None else word_role(text) for text in table[split or file]]
    found = finder.find(names, given)
    rows: dict[str, tuple[str, str | None]] = {}
    odd: dict[str, str] = {}
    twice: set[str] = set()
    for name, at, value in zip(names, found, zip(labels, roles, strict=True), strict=True):
        if at is None:
            odd[name] = "not there"
        elif not value[0]:
            odd[name] = "without a class"
        elif rows.setdefault(at, value) != value:
            odd[name] = f"both {rows[at][0]} and {value[0]}" if rows[at][0] != value[0] else "in two splits"
            twice.add(at)
    rows = {at: value for at, value in rows.items() if at not in twice}
    examples = ", ".join(f"{shown_name(name)} ({why})" for name, why in [*odd.items()][:3])
    if len(odd) > most_missing * len(names) or not rows:
        raise refuse(
            _FLAG,
            f"{len(odd):,} of {counted(len(names), 'line')} that cannot be used, e.g. {examples}",
            f"at most {most_missing:.2%}, files of --data with one class each",
            "correct the file, or raise --max-corrupt",
        )
    classes = len({name for name, _ in rows.values()})
    columns = ", ".join(name for name in (file, label, split) if name is not None)
    notes = [f"{path.name} (columns {columns}): {len(rows):,} images, {classes} classes"]
    unnamed = tree.counts[""] - len(rows)
    if unnamed:
        notes.append(f"{counted(unnamed, 'image')} of the folder not named in {path.name}")
    if odd:
        notes.append(f"{counted(len(odd), 'line')} of {path.name} left out, e.g. {examples}")
    return Annotations(rows, tuple(notes))


def _read(path: Path, given: str, columns: Sequence[str] | None = None) -> Any:
    """Read a table of texts, with `columns` where it has no header. Raises InputError."""
    import pandas as pd

    try:
        with open(path, encoding="utf-8-sig") as file:
            header = file.readline()
        mark = max(",;\t|", key=header.count)
        if not header.count(mark) and len(header.split()) in (2, 3):
            mark = " "  # FILE CLASS, as in lists of ImageNet
        options: dict[str, Any] = {} if columns is None else {"header": None, "names": list(columns)}
        options |= {"sep": mark, "dtype": str, "keep_default_na": False, "encoding": "utf-8-sig", "index_col": False}
        table = pd.read_csv(path, **options)
    except OSError as error:
        raise refuse(_FLAG, f"{given} ({error.strerror})", _WANT) from None
    except ValueError as error:  # pandas' parser errors, and text that is not UTF-8
        raise refuse(_FLAG, f"{given} ({error})", _WANT, "save it as CSV in UTF-8") from None
    if not len(table):
        raise refuse(_FLAG, f"{given} without lines", _WANT)
    return table


def _one_hot(table: Any, names: Sequence[str], given: str) -> str | None:
    """Add a column of classes made of columns of 0 and 1, and name it; None where other things stand in them.

    Raises InputError for a line of no class, or of several.
    """
    said = table[list(names)].apply(lambda column: column.str.strip().str.lower())
    if len(names) < 2 or not said.isin(_ONES | _ZEROS).all(axis=None):
        return None
    hot, shown = said.isin(_ONES).to_numpy(), ", ".join(names)
    odd = [at for at, many in enumerate(hot.sum(axis=1).tolist()) if many != 1]
    if odd:
        got = f"{given} with none or several of {shown} in {counted(len(odd), 'line')} (the first: {odd[0] + 2})"
        raise refuse(_FLAG, got, "one class an image", "leave these lines out, or write one column of classes")
    name = f"one of {shown}"
    table[name] = [names[at] for at in hot.argmax(axis=1).tolist()]
    return name


def _headless(table: Any) -> bool:
    """Tell whether the first line may be one like the others: it has a file's ending or a class that others have."""
    first = [str(name) for name in table.columns]
    if len(first) not in (2, 3):
        return False
    return os.path.splitext(first[0])[1].lower() in suffixes() or first[1] in set(table[first[1]])


def _columns(table: Any, given: str) -> tuple[str, str, str | None]:
    """Find the columns of file, class and split by their names; the class may be spread over columns of 0 and 1."""
    plain = {re.sub(r"[\W_]+", "", str(name).lower()): str(name) for name in table.columns}

    def first(names: Sequence[str], taken: Sequence[str | None] = ()) -> str | None:
        return next((plain[name] for name in names if name in plain and plain[name] not in taken), None)

    file = first(FILE_NAMES)
    split = first(SPLIT_NAMES)
    odd = [] if split is None else [text for text in table[split] if not word_role(text)]
    if split is not None and odd:
        # Ignoring some of the splits would train on test images.
        if split.lower() in ("split", "subset") or len(odd) < len(table):
            got = f"{split} {odd[0]!r} in {given} ({counted(len(odd), 'line')})"
            raise refuse(_FLAG, got, "train, val or test in each line", "fill it in, or rename the column")
        split = None  # a fold by number, a data set by name
    labels = [plain[name] for name in CLASS_NAMES if name in plain and plain[name] != file]
    rest = [str(name) for name in table.columns if name not in (file, split) and not str(name).startswith("Unnamed")]
    if file is not None and not labels and (hot := _one_hot(table, rest, given)) is not None:
        return file, hot, split
    if not labels and len(rest) == 1:
        labels = rest
    shown = ", ".join(map(str, table.columns[:8]))
    if file is None or not labels:
        raise refuse(_FLAG, f"{given} with the columns {shown}", _WANT, "rename its columns to file, class, split")
    boxed = labels[0] == plain.get("predictionstring")
    boxes = [text for text in table[labels[0]] if _NUMBERS.fullmatch(text) or (boxed and len(text.split()) > 1)]
    if boxes:
        got = f"{given} with {boxes[0][:40]!r} in {labels[0]} ({counted(len(boxes), 'line')}), boxes or several classes"
        raise refuse(_FLAG, got, "one class an image", "write one line an image, with its class")
    # A class may stand there twice, as a number and as a name: the name is taken.
    for one in labels[1:]:
        if len(table[[labels[0], one]].drop_duplicates()) != len(set(table[labels[0]])):
            got = f"{given} with the columns {labels[0]} and {one}, which differ"
            raise refuse(_FLAG, got, "one column of classes", "rename the other")
    named = [name for name in labels if not all(text.strip().isdigit() for text in set(table[name]))]
    return file, (named or labels)[0], split


class _Finder:
    """Finds the images that lines name: by path, by name, or by name without its ending."""

    def __init__(self, tree: Tree, csv: Path) -> None:
        self._tree = tree
        self._beside = os.path.relpath(csv.resolve().parent, tree.root).replace(os.sep, "/")
        self._exact: dict[str, str] = {}
        self._ends: dict[str, list[str]] = defaultdict(list)
        for path in tree.images(""):
            plain = plain_name(path)
            self._exact[plain] = path
            name = plain.rpartition("/")[2]
            for key in {name, os.path.splitext(name)[0]}:
                self._ends[key].append(path)

    def knows(self, name: str) -> bool:
        """Return whether a text names an image of the tree."""
        return bool(self._candidates(plain_name(name.strip().replace("\\", "/"))))

    def find(self, names: Sequence[str], given: str) -> list[str | None]:
        """Return the path of each named image, None where there is none. Raises InputError for a doubt."""
        many = [self._candidates(name) for name in names]
        votes = Counter(os.path.dirname(path) for paths in many for path in paths)
        found: list[str | None] = []
        for name, paths in zip(names, many, strict=True):
            if len(paths) > 1:
                # The folder that most lines fit; of equal ones the one to train on.
                ranked = sorted(paths, key=lambda p: (-votes[os.path.dirname(p)], not _trains(p)))
                first, second = ((votes[os.path.dirname(p)], _trains(p)) for p in ranked[:2])
                if first == second:
                    got = f"{name} in {given}, which is {' or '.join(ranked[:3])}"
                    raise refuse(_FLAG, got, "names of one image each", "write them relative to --data")
                paths = ranked
            found.append(paths[0] if paths else None)
        return found

    def _candidates(self, name: str) -> list[str]:
        root = f"{plain_name(str(self._tree.root))}/"
        name = name.removeprefix(root).removeprefix("./").lstrip("/")
        beside = joined("" if self._beside == "." else self._beside, name)
        for exact in (name, os.path.normpath(beside)):
            if exact in self._exact and "/" in exact:
                return [self._exact[exact]]
        last = name.rpartition("/")[2]
        found = self._ends.get(last, [])
        if "/" not in name:
            # Beside the CSV file rather than elsewhere, where that is a folder of the tree.
            near = f"{self._beside}/"
            return [path for path in found if plain_name(path).startswith(near)] or found
        # Some of the path may be of another machine: as much of its end as fits.
        parts = name.split("/")[:-1]
        for depth in range(len(parts), 0, -1):
            tail = "/".join(parts[-depth:])
            fits = [p for p in found if f"/{plain_name(os.path.dirname(p))}".endswith(f"/{tail}")]
            if fits:
                return fits
        return [] if len(found) > 1 else found


def _trains(path: str) -> bool:
    return any(word_role(part) == "train" for part in path.split("/")[:-1])
