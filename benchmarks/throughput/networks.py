"""Which networks `python -m benchmarks.throughput` measures, from what a user names them by."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nas.core.io import check_object, read_json
from nas.export.load import CheckpointFile, HubFolder, ModelName, SavedNetwork, find_network
from nas.measure.jobs import NetworkSpec
from nas.report.read import read_run
from space import Arch, Context, Family, get_family
from space.contractions import Band
from space.errors import InputError, refuse
from space.sampling import sample_band

SLICES = 16
"""Of the sizes that a sample is spread over."""


@dataclass(frozen=True)
class Net:
    """A network to measure: the user's name for it, and what a worker builds it from.

    `arch` is None for a plain timm model, `weights` a safetensors file beside a `best.json`, which fits the context
    that it was trained in (`trained_in`), with the names of its `classes`, if it carries any; `found`: by a search.
    """

    name: str
    family: Family | None
    arch: Arch | None
    timm: str | None = None
    weights: Path | None = None
    found: bool = False
    trained_in: Context | None = None
    classes: tuple[str, ...] | None = None
    flag: str = "--arch"

    def trained(self, ctx: Context) -> bool:
        """Return whether the net has weights for a context."""
        return self.weights is not None and self.trained_in in (None, ctx)

    def spec(self, ctx: Context) -> NetworkSpec:
        """Return the network that is built in a context; weights of another one are left out."""
        weights = self.weights if self.trained(ctx) else None
        if self.family is None or self.arch is None:
            return NetworkSpec(timm=self.timm, weights=weights)
        arch = self.family.to_dict(self.arch)
        return NetworkSpec(family=self.family.name, arch=arch, weights=weights)

    def columns(self, ctx: Context) -> dict[str, Any]:
        """Return what a row of a device table holds of the net: name, family, key, factors."""
        row = {"arch": self.name, "family": "timm", "key": self.key(ctx), "spec": ""}
        if self.family is not None and self.arch is not None:
            factors = json.dumps(self.family.to_dict(self.arch), separators=(",", ":"))
            row.update(family=self.family.name, spec=factors)
        return {**row, "img_size": ctx.img_size, "num_classes": ctx.num_classes}

    def counts(self, ctx: Context) -> dict[str, int] | None:
        """Return exact parameters and MACs as built in a context; None for a plain timm model."""
        if self.family is None or self.arch is None:
            return None
        params = self.family.count_params(self.arch, ctx)
        return {"params": params, "macs": self.family.count_macs(self.arch, ctx)}

    def key(self, ctx: Context) -> str:
        """Return the name of the net as built in a context."""
        if self.family is None or self.arch is None:
            return str(self.timm)
        return self.family.key(self.arch, ctx)


def find_nets(names: Sequence[str], family: Family) -> list[Net]:
    """Find the networks of each name (see `nas.export.load`); a run's folder stands for its Pareto set.

    Raises InputError.
    """
    found = {}
    for net in (net for name in names for net in _find(name, family)):
        if net.name in found:
            raise refuse("--arch", net.name, "each network once")
        found[net.name] = net
    return list(found.values())


def _find(name: str, family: Family) -> list[Net]:
    named = find_network(name, "--arch")
    path = Path(named.origin)
    # os.path's tests are false for an arch's JSON, too long for a name, where a Path's fail.
    if os.path.isfile(os.path.join(name, "run.json")):
        return _pareto_set(named.path, family)
    if isinstance(named, HubFolder) or (isinstance(named, CheckpointFile) and path.suffix != ".json"):
        saved = named.saved()
        weights = saved.weights if isinstance(named, HubFolder) else None
        names = named.classes if weights is not None else None
        return [Net(name, saved.family, saved.arch, weights=weights, trained_in=saved.context, classes=names)]
    data: Any = read_json(path, "an arch") if isinstance(named, SavedNetwork) else {}
    if isinstance(data, dict) and isinstance(data.get("finalists"), list):
        own = get_family(data.get("family", family.name))
        listed = [check_object(name, each, "the list of finalists", {"arch": dict}) for each in data["finalists"]]
        return [_inline(own, own.arch(each["arch"])) for each in listed]
    try:
        own, arch = named.arch(family.name)
    except InputError:
        if not (isinstance(named, ModelName) and name.isidentifier()):
            raise
        return [Net(name, None, None, timm=name)]
    weights = path.with_suffix(".safetensors")
    trained = weights if "timm" in data and weights.is_file() else None
    sizes = [data.get(each) for each in ("img_size", "num_classes")]
    made = Context(*sizes) if all(type(size) is int for size in sizes) else None
    classes = named.classes if trained is not None else None
    return [Net(name, own, arch, weights=trained, found="timm" in data, trained_in=made, classes=classes)]


def _pareto_set(folder: Path, family: Family) -> list[Net]:
    """Return the scored archs of a run that no other one beats in size, speed and score."""
    from nas.search.study import read_study

    study = read_study(folder, read_run(folder).run)  # refuses a damaged one in its own words
    with closing(study):
        rows = [r for r in study.rows if r.soft_loss is not None and r.images_per_s is not None]
        if not rows:
            raise refuse("--arch", folder, "a run with a scored candidate", "let it go on first")
        costs = np.array([(r.params, -(r.ratio or 1.0), r.soft_loss) for r in rows])
        beaten = [bool(((costs <= own).all(axis=1) & (costs < own).any(axis=1)).any()) for own in costs]
        best = {r.key: r for r, lost in zip(rows, beaten, strict=True) if not lost}
        return [Net(r.label, family, family.arch(study.arch(r.step, r.key)), found=r.step > 0) for r in best.values()]


def sample(family: Family, seed: Arch, ctx: Context, count: int, *, band: int | None, random_seed: int) -> list[Net]:
    """Draw contractions of a seed all over its space: `count` of them, the published archs of its range first.

    Sizes are spread evenly in log parameters from the seed to its floor; within each slice every net is equally likely.
    With `band`, a third of all lie within 10 % of that many parameters. Raises InputError where there are fewer.
    """
    most = family.count_params(seed, ctx)
    least = family.count_params(family.floor(seed, ctx), ctx)
    nets = [Net(p.name, family, p.arch) for p in family.published if least <= family.count_params(p.arch, ctx) <= most]
    if family.key(seed, ctx) not in {net.key(ctx) for net in nets}:
        nets.insert(0, _inline(family, seed))
    nets = nets[:count]
    first = len(nets)

    def draw(lo: float, hi: float, number: int) -> None:
        within, taken = Band(math.ceil(lo), math.floor(hi)), {net.key(ctx) for net in nets}
        found = sample_band(family, seed, ctx, within, number, random_seed=random_seed, exclude=taken)
        nets.extend(_inline(family, arch) for arch in found)

    if band is not None:
        draw(0.9 * band, 1.1 * band, (count - len(nets)) // 3)
    slices = list(itertools.pairwise(np.geomspace(least, most, SLICES + 1)))
    while len(nets) < count:
        before = len(nets)
        for at, (lo, hi) in enumerate(slices):
            draw(lo, hi, -(-(count - len(nets)) // (SLICES - at)))
        if len(nets) == before:
            raise refuse("--sample", count, f"at most {before} here", "ask for fewer")
    # In no order of size: a table that is cut short is of the whole range.
    order = first + np.random.default_rng(random_seed).permutation(count - first)
    return [*nets[:first], *(nets[i] for i in order)]


def _inline(family: Family, arch: Arch) -> Net:
    return Net(json.dumps(family.to_dict(arch), separators=(",", ":")), family, arch)
