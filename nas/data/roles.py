"""What the top folders of a data set are for: splits by their usual names, or classes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nas.data.tree import Tree, joined, plain_name
from space.errors import InputError, refuse

_USUAL = {
    "train": ("train", "training"),
    "holdout": ("val", "valid", "validation", "validate", "dev", "holdout", "eval", "evaluation"),
    "test": ("test", "testing"),
}
_ROLE_OF = {word: role for role, words in _USUAL.items() for word in words}
_FILLERS = (
    *("set", "sets", "split", "data", "dataset", "folder", "files", "images", "image", "imgs", "img"),
    *("pictures", "photos", "samples"),
)
_GLUED = re.compile(f"({'|'.join(sorted(_ROLE_OF, key=len, reverse=True))})({'|'.join(_FILLERS)})*")
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[^\W\d_A-Z]+|\d+")
BY_HAND = "--splits 'train=FOLDER,test=FOLDER'"


@dataclass(frozen=True)
class Part:
    """A folder of a tree with its role, "train", "holdout" or "test"; `label` where all its images are of one class."""

    role: str
    folder: str
    label: str | None = None

    @property
    def shown(self) -> str:
        """Its name for users."""
        return f"{self.folder or '.'}/"


def word_role(text: str) -> str | None:
    """Return the role of a word such as "Training", "valid" or "test_set"; None for other words."""
    role, rest = _role_and_rest(text)
    return role if not rest else None


def _role_and_rest(name: str) -> tuple[str | None, tuple[str, ...]]:
    """Return the role that a name holds, and its other words in lower case."""
    role, rest = None, []
    for word in (w.lower() for w in _WORDS.findall(plain_name(name))):
        glued = _GLUED.fullmatch(word)
        if glued is not None and role is None:
            role = _ROLE_OF[glued[1]]
        elif glued is not None:
            return None, ()
        elif word not in _FILLERS:
            rest.append(word)
    return role, tuple(rest)


def _usual_roles(names: Sequence[str]) -> dict[str, str]:
    """Return the roles of those names that are a split's: alone, or with words that another split's name has too."""
    found = {name: pair for name in names if (pair := _role_and_rest(name))[0] is not None}
    rests = Counter(rest for _, rest in found.values())
    plain = any(not rest for _, rest in found.values())
    out = {}
    for name, (role, rest) in found.items():
        numbered = plain and len(rest) == 1 and rest[0].isdigit()
        if role is not None and (not rest or rests[rest] > 1 or numbered):
            out[name] = role
    return out


def opened(tree: Tree, folder: str, classes: frozenset[str] = frozenset()) -> str:
    """Go into a folder as long as it holds nothing but one folder of folders, or of images under a usual name.

    A folder named like one of the `classes` stays closed.
    """
    while not tree.files.get(folder):
        inner = tree.inner(folder)
        if len(inner) != 1 or plain_name(inner[0]) in classes or _empty(tree, folder):
            break
        below = joined(folder, inner[0])
        usual = inner[0].lower() in _FILLERS or word_role(inner[0]) is not None
        if not (usual or tree.inner(below)):
            break
        folder = below
    return folder


def _empty(tree: Tree, folder: str) -> bool:
    return any(tree.is_empty_class(joined(folder, name)) for name in tree.folders.get(folder, ()))


def parts_by_hand(tree: Tree, text: str) -> list[Part]:
    """Read `train=A,holdout=B,test=C`, a role perhaps of several folders. Raises InputError."""
    want = "train=FOLDER,holdout=FOLDER,test=FOLDER, some of them"
    parts = []
    for item in text.split(","):
        role, equals, folder = (piece.strip() for piece in item.partition("="))
        role = _ROLE_OF.get(role.lower(), role)
        if role not in _USUAL or not equals or not folder:
            raise refuse("--splits", text, want)
        names = {plain_name(name): name for name in tree.folders}
        found = names.get(plain_name(folder.removeprefix("./").strip("/")).removeprefix("."))
        if found is None or not tree.counts[found]:
            there = ", ".join(tree.inner("")[:8]) or "none"
            raise refuse("--splits", f"{folder} in {text}", "a folder of --data with images", f"there are: {there}")
        parts.append(Part(role, found))
    folders = [part.folder for part in parts]
    if len(set(folders)) < len(folders):
        raise refuse("--splits", text, "each folder once")
    roles = {part.role for part in parts}
    if "holdout" in roles and roles != set(_USUAL):
        raise refuse("--splits", text, "train and test beside a holdout", "without a holdout, one is cut from train")
    return parts


def find_parts(tree: Tree, *, ask: bool = True) -> list[Part]:
    """Find the splits of a tree, else its one part "train", to be cut.

    With `ask`, what could be splits as well as classes is refused with the question. Raises InputError.
    """
    top = opened(tree, "")
    names = tree.inner(top)
    roles = _usual_roles(names)
    other = [name for name in names if name not in roles]
    held = {name: set(map(plain_name, tree.inner(opened(tree, joined(top, name))))) for name in names}
    by_role: dict[str, list[str]] = {}
    for name, role in roles.items():
        by_role.setdefault(role, []).append(name)
    parts = [Part(role, joined(top, name)) for name, role in roles.items()]
    whole = [Part("train", top)]
    if not roles:
        holds = [name for name in names if name.lower() in ("image", "images", "img", "imgs")]
        if ask and holds and len(names) > 1:  # beside masks/, say
            rest = [name for name in names if name not in holds]
            raise _question(tree, top, rest, dict.fromkeys(holds, "train"))
        return _splits_in_classes(tree, top, names) or whole
    if "train" in by_role and len(by_role) > 1:
        flat = not held[by_role["train"][0]]
        if ask and other and flat:
            raise _question(tree, top, other, roles)
    elif "train" in by_role:
        if other and ask and (held[by_role["train"][0]] or len(other) < 2):
            raise _question(tree, top, other, roles)
        if other and not held[by_role["train"][0]]:
            return whole
    else:
        inside = set().union(*(held[name] for name in roles))
        if len(inside) > 1 and inside <= set(map(plain_name, other)):
            return [*whole, *parts]  # root/CLASS beside root/test/CLASS
        if other:
            if ask and len(other) < 2:
                raise _question(tree, top, other, roles)
            return whole
    twice = [found for found in by_role.values() if len(found) > 1]
    if twice and ask:
        raise _question(tree, top, twice[0], roles)
    return parts


def _splits_in_classes(tree: Tree, top: str, names: Sequence[str]) -> list[Part]:
    """Find CLASS/train and CLASS/test; empty if the classes do not hold splits."""
    inner = {name: tree.inner(joined(top, name)) for name in names}
    roles = {sub: word_role(sub) for subs in inner.values() for sub in subs}
    loose = any(tree.files.get(joined(top, name)) for name in names)
    if len(names) < 2 or loose or None in roles.values() or len(set(roles.values())) < 2:
        return []
    if not all(any(roles[sub] == "train" for sub in subs) for subs in inner.values()):
        return []
    return [
        Part(str(roles[sub]), joined(top, f"{name}/{sub}"), plain_name(name))
        for name, subs in inner.items()
        for sub in subs
    ]


def _question(tree: Tree, top: str, odd: Sequence[str], roles: Mapping[str, str]) -> InputError:
    shown = ", ".join(f"{name}/" for name in odd[:4]) + (f" and {len(odd) - 4} more" if len(odd) > 4 else "")
    known = ", ".join(f"{name}/" for name in roles)
    example = ",".join(f"{role}={joined(top, name)}" for name, role in roles.items())
    return refuse(
        "--data",
        f"{shown} beside {known} in {tree.root / top}",
        "to be told whether these are splits or classes",
        f"splits: --splits '{example}' with the folders meant; classes: --splits 'train={top or '.'}'",
    )


def check_levels(tree: Tree, folder: str, skip: frozenset[str] = frozenset()) -> None:
    """Refuse top folders that hold equal sub-folder names: either level could be the classes. Raises InputError."""
    names = [name for name in tree.inner(folder) if joined(folder, name) not in skip]
    inner = {name: {plain_name(sub) for sub in tree.inner(joined(folder, name))} for name in names}
    often = Counter(sub for subs in inner.values() for sub in subs)
    shared = sorted(sub for sub, n in often.items() if n > 1)
    if len(shared) < 2 or 2 * len(shared) < len(often) or all(tree.files.get(joined(folder, n)) for n in names):
        return
    tops = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    subs = ", ".join(shared[:3]) + (", ..." if len(shared) > 3 else "")
    raise refuse(
        "--data",
        f"folders {tops} in {tree.root / folder} that each hold {subs}",
        "to be told which of the two are the classes",
        f"--classes top ({tops}) or --classes leaf ({subs}); if {names[0]} is a split: {BY_HAND}",
    )


def classes_in(
    tree: Tree, part: Part, level: str | None, skip: frozenset[str], known: frozenset[str] = frozenset()
) -> dict[str, list[str]]:
    """Return the images of a part by class; empty if it has no class folders. Raises InputError.

    `level`: "top" folders are the classes, the innermost ("leaf"), or None: top, unless that is a question. Folders of
    `skip` are other parts. An empty class has an empty list.
    """
    if part.label is not None:
        return {part.label: list(tree.images(part.folder))}
    folder = opened(tree, part.folder, known)
    found: dict[str, list[str]] = {}
    if level is None:
        check_levels(tree, folder, skip)
    for name in tree.folders.get(folder, ()):
        below = joined(folder, name)
        if below in skip:
            continue
        if level != "leaf":
            images = list(tree.images(below))
            if images or tree.is_empty_class(below):
                found.setdefault(plain_name(name), []).extend(images)
            continue
        for path in tree.images(below):
            found.setdefault(plain_name(path.split("/")[-2]), []).append(path)
    return found if any(found.values()) else {}
