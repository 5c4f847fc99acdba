"""The images of a folder, found in one walk: by content, without hidden folders, linked folders once."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from nas.data.decode import is_image, shown_name, suffixes
from space.errors import refuse

_SYSTEM = {
    *("@eadir", "__macosx", "__pycache__", "#recycle", "@recycle", "$recycle.bin", "lost+found", "thumbs.db"),
    *("system volume information", "thumbnails", "_thumbnails", "desktop.ini", "ehthumbs.db"),
}
"""Folders and files that systems and viewers make; what begins with a point is left out too."""
_DOCUMENTS = {
    *(".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".md", ".yaml", ".yml", ".html", ".log", ".py", ".ipynb"),
    *(".mat", ".npy", ".npz", ".h5", ".pkl", ".pt", ".pth", ".zip", ".gz", ".tar", ".pdf", ".rtf", ".docx", ".xlsx"),
}
"""Endings of what lies beside images; a folder of nothing else is no class."""


def plain_name(name: str) -> str:
    """Return a name in the one Unicode form in which names are compared (NFC)."""
    return unicodedata.normalize("NFC", name)


def counted(n: int, what: str) -> str:
    """Return "1 image" or "1,200 images"."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def joined(folder: str, name: str) -> str:
    """Return the path of what lies in a folder of a tree, whose own root is the empty text."""
    return f"{folder}/{name}" if folder else name


@dataclass
class Tree:
    """The images beneath `root`: `files` and `folders` by the folder they lie in, relative, with forward slashes.

    `folders` holds all that was walked, those without images too. What was left out is counted: in `others` by the
    ending of names, with `others_in` by folder; in `system` by the name of the folder or file; `links` are linked
    folders whose images were read elsewhere already.
    """

    root: Path
    files: dict[str, list[str]] = field(default_factory=dict)
    folders: dict[str, list[str]] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)
    others_in: dict[str, set[str]] = field(default_factory=dict)
    system: Counter[str] = field(default_factory=Counter)
    links: list[str] = field(default_factory=list)

    @cached_property
    def counts(self) -> dict[str, int]:
        """Images in and beneath each folder."""
        found = {folder: len(names) for folder, names in self.files.items()}
        for folder in sorted(self.folders, key=lambda f: f.count("/") if f else -1, reverse=True):
            inner = sum(found.get(joined(folder, name), 0) for name in self.folders[folder])
            found[folder] = found.get(folder, 0) + inner
        return found

    def inner(self, folder: str) -> list[str]:
        """List the folders right in a folder that hold images, by name."""
        return [name for name in self.folders.get(folder, ()) if self.counts[joined(folder, name)]]

    def images(self, folder: str) -> Iterator[str]:
        """Return all images in and beneath a folder, by path, in a fixed order."""
        yield from (joined(folder, name) for name in self.files.get(folder, ()))
        for name in self.folders.get(folder, ()):
            yield from self.images(joined(folder, name))

    def is_empty_class(self, folder: str) -> bool:
        """Return whether a folder without images could be meant for a class: it holds no mere documents."""
        endings = self._endings(folder)
        return not self.counts[folder] and (not endings or bool(endings - _DOCUMENTS))

    def _endings(self, folder: str) -> set[str]:
        found = set(self.others_in.get(folder, ()))
        return found.union(*(self._endings(joined(folder, name)) for name in self.folders.get(folder, ())))

    def left_out(self) -> list[str]:
        """Return lines for the user on what was no image, with counts."""
        lines = []
        if self.others:
            kinds = ", ".join(f"{n:,} {suffix or 'without an ending'}" for suffix, n in self.others.most_common(8))
            more = f" and {len(self.others) - 8} more kinds" if len(self.others) > 8 else ""
            heic = " (pip install pillow-heif reads .heic)" if {".heic", ".heif"} & set(self.others) else ""
            lines.append(f"files that are no images are left out: {kinds}{more}{heic}")
        if self.system:
            kinds = ", ".join(f"{name} ({counted(n, 'file')})" for name, n in self.system.most_common(8))
            more = f" and {len(self.system) - 8} more" if len(self.system) > 8 else ""
            lines.append(f"hidden and system files are left out: {kinds}{more}")
        if self.links:
            shown = ", ".join(self.links[:3])
            lines.append(f"{counted(len(self.links), 'linked folder')} to what is read anyway left out: {shown}")
        return lines


def walk(root: Path) -> Tree:
    """Find the images beneath a folder. Raises InputError for what cannot be read."""
    tree = Tree(root)
    about = os.stat(root)
    seen = {(about.st_dev, about.st_ino)}
    links: list[str] = []
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        waiting += _scan(tree, folder, seen, links)
        while links and not waiting:  # real folders first: a link among them is the one to leave out
            link = links.pop(0)
            target = (root / link).resolve()
            about = os.stat(target)
            if (about.st_dev, about.st_ino) in seen or root.is_relative_to(target):
                tree.links.append(link)
                continue
            seen.add((about.st_dev, about.st_ino))
            above, _, name = link.rpartition("/")
            tree.folders[above] = sorted([*tree.folders[above], name])
            waiting.append(link)
    return tree


def _scan(tree: Tree, folder: str, seen: set[tuple[int, int]], links: list[str]) -> list[str]:
    """Read one folder; returns the real folders in it."""
    at = tree.root / folder
    try:
        with os.scandir(at) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise unreadable(at, error) from error
    files: list[str] = []
    folders: list[str] = []
    for entry in found:
        path, name = joined(folder, entry.name), entry.name
        try:
            is_dir = entry.is_dir()
        except OSError:  # a link in a circle
            is_dir = False
        if name.startswith(".") or name.lower() in _SYSTEM or name.startswith("SYNOPHOTO_THUMB"):
            inside = sum(len(f) for *_, f in os.walk(entry.path)) if is_dir else 1
            kind = "._*" if name.startswith("._") else name if is_dir or name.startswith(".") else name.lower()
            if inside:
                tree.system[shown_name(kind)] += inside
        elif is_dir and entry.is_symlink():
            links.append(path)
        elif is_dir:
            about = entry.stat()
            seen.add((about.st_dev, about.st_ino))
            folders.append(name)
        else:
            suffix = os.path.splitext(name)[1].lower()
            if suffix in suffixes() or is_image(Path(entry.path)):
                files.append(name)
            else:
                shown = shown_name(suffix)
                tree.others[shown] += 1
                tree.others_in.setdefault(folder, set()).add(shown)
    if files:
        tree.files[folder] = files
    tree.folders[folder] = folders
    return [joined(folder, name) for name in folders]


def unreadable(path: Path, error: OSError) -> Exception:
    """Return the refusal of a folder that cannot be read."""
    return refuse("--data", f"{path} ({error.strerror})", "a folder that can be read")
