"""The family that docs/families.md writes out: registered as written there, true to timm, contracted."""

from __future__ import annotations

import importlib.metadata
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import space.family
from nas.contract import contract
from nas.inherit.slice import inherit
from space import Context, InputError, get_family
from space.contractions import Band, count_contractions, propose
from space.family import Family
from tests._inline import InlineExecutor

DOC = Path(__file__).resolve().parent.parent / "docs" / "families.md"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    text = DOC.read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    entry = re.search(r'entry-points\."(.+)"\]\n(\w+) = "my_package\.(\w+):(\w+)"', text)
    assert len(code) == 1
    assert sum(bool(line.strip()) for line in code[0].splitlines()) <= 100, "a short example"
    folder = tmp_path_factory.mktemp("package")
    group, name, module, value = entry.groups()
    (folder / f"{module}.py").write_text(code[0], encoding="utf-8")
    found = importlib.metadata.EntryPoint(name, f"{module}:{value}", group)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setattr(
            space.family.importlib.metadata, "entry_points", lambda group: [found] if group == found.group else []
        )
        yield get_family("resnet")
        sys.modules.pop(module, None)


def test_counts_are_timms_and_torchs(family: Family) -> None:
    assert family.count_params(family.seed("18"), Context(224, 1000)) == 11_689_512
    assert family.count_params(family.seed("resnet34"), Context(224, 1000)) == 21_797_672
    rng = random.Random(0)
    for _ in range(20):
        arch = family.arch(
            {
                "channels": [rng.choice([64, 1, 24, 96]) for _ in range(4)],
                "layers": [rng.randint(1, 3) for _ in range(4)],
            }
        )
        ctx = Context(rng.randint(32, 100), rng.randint(1, 50), rng.choice([1, 3]))
        with torch.device("meta"):
            net = family.build(arch, ctx).eval()
            image = torch.empty(1, ctx.in_chans, ctx.img_size, ctx.img_size)
        assert family.count_params(arch, ctx) == sum(p.numel() for p in net.parameters())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(image)
        assert family.count_macs(arch, ctx) == counter.get_total_flops() // 2


def test_children_take_the_first_of_everything(family: Family) -> None:
    ctx, parent = Context(32, 5), family.seed("18")
    child = family.arch({"channels": [32, 64, 128, 256], "layers": [1, 2, 1, 2]})
    net, old = family.build(child, ctx), family.build(parent, ctx).state_dict()
    slices = family.slicing(parent, child, ctx, ctx)
    inherit(net, old, slices)
    state = net.state_dict()
    own = {k for k in state if "num_batches" not in k and "layer1.0.downsample" not in k}
    assert own == set(slices)
    for key in own:
        part = tuple(slice(n) for n in state[key].shape)
        assert torch.equal(state[key], old[key][part]), key


def test_a_family_without_ways_to_resize_has_its_own(family: Family) -> None:
    contexts, arch = (Context(64, 5), Context(96, 7)), family.seed("18")
    assert family.resizes == ("own",)
    own = family.resized(arch, *contexts, "own")
    assert repr(own) == repr(family.slicing(arch, arch, *contexts))
    with pytest.raises(InputError, match=r"^--resize: got timm, want one of own$"):
        family.resized(arch, *contexts, "timm")


def test_contractions_are_listed(family: Family) -> None:
    ctx, seed = Context(32, 10), family.seed("18")
    band = Band(2_900_000, 3_100_000)
    assert count_contractions(family, seed, ctx, band) > 100
    for one in propose(family, [seed], ctx, band, 6, random_seed=0):
        assert band.lo <= one.params <= band.hi
    floor = family.floor(seed, ctx)
    assert np.array(family.to_dict(floor)["channels"]).max() == 32


@pytest.mark.slow
def test_a_contraction_runs(family: Family, tmp_path: Path) -> None:
    ended = contract(
        "18",
        "3M",
        family="resnet",
        effort="smoke",
        img_size=32,
        max_images=300,
        threads=1,
        teacher_epochs=3,
        out=tmp_path / "run",
        cache_dir=tmp_path / "cache",
        executor=InlineExecutor(),
    )
    assert ended.status == "reached"
    assert (tmp_path / "run" / "best.safetensors").is_file()
