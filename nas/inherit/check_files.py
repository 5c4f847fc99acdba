"""Opens the files that a command will need and matches them, before data, a teacher or labels are made for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nas.core.class_match import match_head
from nas.export.arch_of_weights import check_arch, checkpoint_context
from nas.export.load import find_network
from nas.export.teacher_net import check_fits
from nas.labels.store import open_store
from space import Context
from space.family import Arch, Family


def check_weights(
    family: Family, arch: Arch, ctx: Context | None, source: str, flag: str, classes: Sequence[str] = ()
) -> None:
    """Open weights of `arch` and match them by names and shapes, and their head to the data's classes.

    `ctx` is None before the data are known. Raises InputError.
    """
    named = find_network(source, flag)
    state = named.weights()
    if ctx is None:
        check_arch(family, arch, state, name=flag)
    else:
        made_in = checkpoint_context(family, arch, ctx, state, name=flag)
        match_head(named, made_in.num_classes, classes)


def check_teacher(source: str, classes: Sequence[str] = ()) -> None:
    """Open a teacher's weights and match them to its net, and its head to the data's classes. Raises InputError."""
    named = find_network(source, "--teacher")
    net = named.teacher()
    if net.state is not None:
        match_head(named, net.num_classes, classes)
        check_fits(net)


def check_store(folder: str) -> None:
    """Open a label store: its manifest, its tables of keys and the presence of its shards. Raises InputError."""
    open_store(Path(folder).expanduser())
