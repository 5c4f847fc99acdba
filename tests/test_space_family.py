"""Contexts, seeds, choices and the registry: what every family shares."""

from __future__ import annotations

import importlib.metadata
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from space_cases import FAMILY, random_arch

import space.family
from space import Context, InputError, family_names, get_family
from space.family import Choices


def test_interface_is_there_without_torch() -> None:
    """Everything but `build` works where torch cannot be imported."""
    script = """
import sys
sys.modules["torch"] = sys.modules["timm"] = None
from space import Context, get_family
from space.contractions import Band, count_contractions, propose
f = get_family("tinyvit")
a, b, c = f.seed("21M"), f.seed("5M"), Context(img_size=48, num_classes=10)
assert f.count_params(a, c) > f.count_params(b, c) and f.count_macs(a, c) > 0
assert f.key(a, c) and f.label(a) and f.timm_call(a, c) and f.slicing(a, b, c, c)
band = Band(5_000_000, 6_000_000)
assert count_contractions(f, a, c, band) and propose(f, [a], c, band, 3, random_seed=0)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parent.parent)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ((15, 10, 3), "img_size: got 15, want an integer from 16 to 4096"),
        ((224.0, 10, 3), "img_size: got 224.0, want an integer from 16 to 4096"),
        ((224, True, 3), "num_classes: got True, want an integer from 1 to 10000000"),
        ((224, 10, 0), "in_chans: got 0, want an integer from 1 to 4096"),
    ],
)
def test_bad_contexts_are_refused(values: tuple[int, int, int], line: str) -> None:
    with pytest.raises(InputError, match=re.escape(line)):
        Context(*values)


def test_seeds_by_name_alias_and_case() -> None:
    for name in ("21M", "21m", "tiny_vit_21m", "tiny_vit_21m_224", "TINY_VIT_21M_384"):
        assert FAMILY.seed(name) == FAMILY.published[2].arch
    assert [FAMILY.seed(p.name) for p in FAMILY.published] == [p.arch for p in FAMILY.published]


def test_seeds_from_files(tmp_path: Path) -> None:
    rng = random.Random(0)
    for i in range(20):
        arch, path = random_arch(rng), tmp_path / f"{i}.json"
        plain = FAMILY.to_dict(arch)
        whole = {"family": "tinyvit", "arch": plain, "params": 1}
        path.write_text(json.dumps(rng.choice([plain, whole, {"arch": plain}])))
        assert FAMILY.seed(str(path)) == arch


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No such file"),
        ("{", "it is not JSON"),
        ("[1, 2]", "an object, not a list"),
        ('{"arch": 3}', "holds no object"),
        ('{"family": "swin", "arch": {}}', "want an arch of family tinyvit"),
        ('{"depths": [2, 2, 6, 2]}', "got no embed_dims"),
        ("\xff\xfe", "want a JSON file with an arch"),
        ("[" * 100_000, "want a JSON file with an arch"),
    ],
)
def test_bad_seed_files_are_refused_in_one_line(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "arch.json"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=words) as refused:
        FAMILY.seed(str(path))
    assert str(refused.value).startswith("--seed")
    assert "\n" not in str(refused.value)
    assert str(path) in str(refused.value)


def test_unknown_seeds_are_refused() -> None:
    for name in ("7M", "", "tiny_vit", "swin"):
        with pytest.raises(InputError, match="want one of 5M, 11M, 21M or a JSON file"):
            FAMILY.seed(name)
    with pytest.raises(InputError, match="--seed"):
        FAMILY.seed("bad\0name")


def test_labels_and_moves_for_people() -> None:
    big, small = FAMILY.seed("21M"), FAMILY.seed("5M")
    assert FAMILY.label(small) == "D64-128-160-320 N2-2-6-2 W7-14-7 R4 M4 E32"
    changed = FAMILY.arch({**FAMILY.to_dict(big), "depths": [2, 2, 6, 1], "mlp_ratio": 2.5})
    assert FAMILY.describe_moves(big, changed) == "depths[3] 2->1, mlp_ratio 4->2.5"
    assert FAMILY.describe_moves(big, big) == ""


def test_laws_of_choices() -> None:
    rng = random.Random(1)
    every = [choices for f in FAMILY.factors for choices in f.choices]
    for _ in range(400):
        choices: Choices = rng.choice(every)
        present = rng.choice([rng.randint(1, 200), rng.uniform(0.1, 40.0)])
        options = choices.options(present)
        assert options == sorted(set(options))
        grid = [*range(choices.step, int(present) + 101, choices.step)] if choices.step else []
        assert set(options) <= {present, *grid, *choices.values}
        at = options.index(present)
        # One more step for every value farther away, on both sides.
        assert [choices.steps(present, v) for v in options] == [abs(i - at) for i in range(len(options))]
        assert options[:at] == [v for v in grid or choices.values if v < present]
        assert choices.up is None or len(options) - at - 1 <= choices.up


def test_moves_are_tables_that_hold_the_present() -> None:
    rng = random.Random(2)
    for arch in [random_arch(rng) for _ in range(30)]:
        moves, now = FAMILY.moves(arch), FAMILY.table([arch])
        steps = FAMILY.grid_steps(arch, moves)
        for f in FAMILY.factors:
            values = moves[f.field]
            assert values.shape[1:] == (() if f.scalar else (f.slots,))
            here = (values.reshape(len(values), -1) == now[f.field].reshape(1, -1)).all(axis=1)
            assert here.sum() == 1
            assert np.array_equal(steps[f.field] == 0, here)


def test_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    assert get_family("tinyvit") is get_family("TinyViT") is FAMILY
    assert family_names() == ("tinyvit", "vit")
    with pytest.raises(InputError, match="--family: got resnet, want one of tinyvit, vit"):
        get_family("resnet")
    other = "vision_contraction.families"
    entries = [
        importlib.metadata.EntryPoint("Mine", "space.tinyvit:FAMILY", other),
        importlib.metadata.EntryPoint("broken", "space.tinyvit:WRITTEN_AT", other),
    ]
    monkeypatch.setattr(space.family.importlib.metadata, "entry_points", lambda group: entries)
    assert get_family("mine") is FAMILY
    assert family_names() == ("tinyvit", "vit", "broken", "mine")
    with pytest.raises(InputError, match=r"--family: got space.tinyvit:WRITTEN_AT"):
        get_family("broken")


@pytest.mark.parametrize("name", family_names())
def test_published_archs_are_legal_and_symbols_differ(name: str) -> None:
    family = get_family(name)
    assert len({f.symbol for f in family.factors}) == len({f.field for f in family.factors}) == len(family.factors)
    for p in family.published:
        assert family.arch(family.to_dict(p.arch)) == p.arch
        assert family.count_params(p.arch, Context(224, 1000)) > 0
